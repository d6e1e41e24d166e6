"""Runs as one table: read from files, sweeps and W&B, selected and checked before a fit."""
