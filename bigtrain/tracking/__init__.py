"""Metrics and events of a run: metrics.jsonl, trackers such as W&B, the live display, the status, the report."""
