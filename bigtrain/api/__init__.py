"""The Python API, for notebooks and scripts; README.md describes each part.

Its names are available in the package `bigtrain`, which imports their modules at the first use.
"""
