"""The optimizers: one file each, named by `optimizer.name`."""
