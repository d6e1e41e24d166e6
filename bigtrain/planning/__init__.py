"""Estimates a run's memory, time and cost before it starts. Only `rehearsal` and `measure` use torch."""
