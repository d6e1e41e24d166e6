"""Ray clusters: submitting jobs, following their runs, and starting a local cluster for tests."""
