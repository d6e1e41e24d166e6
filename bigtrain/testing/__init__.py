"""Tools for tests of bigtrain and of models built on it: an independent reference, pools of ranks, benchmarks.

Nothing else in bigtrain imports this package.
"""
