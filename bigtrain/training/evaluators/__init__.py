"""Evaluators, one file each: `evaluation.evaluators` in the config chooses them by name."""
