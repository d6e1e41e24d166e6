"""Adapters, one file each: `model.adapter` in the config chooses one by name."""
