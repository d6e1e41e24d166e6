"""How ranks live and die: a node agent, a controller, and placers that give it nodes."""
