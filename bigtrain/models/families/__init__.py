"""The model families: one file each, named by `model.arch`."""
