"""The placers, which provide nodes: this machine, a Ray cluster, a Slurm allocation."""
