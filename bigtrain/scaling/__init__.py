"""Scaling laws fitted to runs, with intervals: arithmetic on NumPy and SciPy, no torch."""
