"""Running a job's ranks: a node agent, a controller, and placers that give it nodes."""
