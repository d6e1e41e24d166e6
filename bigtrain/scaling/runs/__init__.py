"""The table of runs for a fit: read from files, sweeps or W&B, then selected and checked."""
