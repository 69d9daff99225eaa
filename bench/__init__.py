"""Measurements of tiger_fast: what they are and how to read them is in bench/README.md. Not installed."""
