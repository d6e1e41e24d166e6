"""The loop and what hangs on it: evaluation, metrics, checkpoints, the process of one rank."""
