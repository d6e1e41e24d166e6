"""For tests, of bigtrain and of models built on it: an independent reference, ranks, benchmarks.

Nothing in bigtrain imports this package.
"""
