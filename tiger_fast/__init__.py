"""Fast, exact, drop-in routing over frozen vision experts (TIGER, TAVER)."""
__version__ = "0.1.0"
