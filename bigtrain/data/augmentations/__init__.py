"""Augmentations of images, one file each: `data.augment` in the config chooses them by name."""
