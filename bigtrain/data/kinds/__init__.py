"""Sample kinds, one file each. A kind defines how its samples are packed, indexed, read, batched and checked."""
