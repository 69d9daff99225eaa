"""What shows where time and registers go; run from the repository's root."""
