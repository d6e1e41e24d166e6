"""The training loop with its callbacks, evaluation, logs and restoring, and the process of one rank."""
