"""What a run says about itself: metrics.jsonl, W&B, the live display, its status, its report."""
