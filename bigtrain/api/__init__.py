"""The Python API: what a notebook or a script of one's own uses. README.md shows each part.

Its names stand in `bigtrain` itself; they are imported at their first use.
"""
