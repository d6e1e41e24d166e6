"""Running the ranks of a job: one agent on each node, a controller, and placers that provide the nodes."""
