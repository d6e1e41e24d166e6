"""The engine fsdp, which is the default: PyTorch's FSDP2."""
