"""The optimizers: one file each, selected by `optimizer.name`."""
