"""What gives the controller machines: this one, a Ray cluster, a Slurm allocation."""
