"""Callbacks, one file each: `callbacks` in the config chooses them by name."""
