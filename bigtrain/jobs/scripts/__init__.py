"""Running a user's own script, written for torchrun, accelerate or deepspeed, on bigtrain's agents."""
