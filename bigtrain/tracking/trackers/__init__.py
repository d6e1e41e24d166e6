"""Trackers, one file each: they take a run's logged metrics somewhere else. See `tracking.config.TrackerConfig`."""
