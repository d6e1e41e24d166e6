"""Sample kinds, one file each: how samples of a kind are packed, indexed, read, batched and checked."""
