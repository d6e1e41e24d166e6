"""What a run needs before it runs: arithmetic, no torch."""
