"""The kinds of gradient clipping: one file each, selected by `optimizer.clip.name`."""
