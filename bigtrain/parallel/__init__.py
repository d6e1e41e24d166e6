"""How a model lies on the ranks: the mesh, and each technique in a file of its own."""
