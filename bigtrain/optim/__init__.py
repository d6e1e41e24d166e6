"""Optimizers with parameter groups by pattern, gradient clipping, and learning-rate schedules as pure arithmetic."""
