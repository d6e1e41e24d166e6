"""Distributes a model over the ranks: the mesh, and one file for each kind of parallelism."""
