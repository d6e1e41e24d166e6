"""PyTorch FSDP2: the default engine."""
