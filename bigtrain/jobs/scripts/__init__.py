"""Scripts of the user's own, written for torchrun, accelerate or deepspeed, on bigtrain's agents."""
