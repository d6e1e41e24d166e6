"""Which samples a step consumes: the global order, mixtures of sources, and how well the order shuffles."""
