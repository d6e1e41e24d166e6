"""Trackers, one file each, which send a run's logged metrics to another tool; see `tracking.config.TrackerConfig`."""
