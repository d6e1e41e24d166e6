"""Shards on a server: fetching, the cache on disk, and the store that provides shards to readers."""
