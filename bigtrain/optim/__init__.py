"""Optimizers with parameter groups by pattern, and learning-rate schedules as pure arithmetic."""
