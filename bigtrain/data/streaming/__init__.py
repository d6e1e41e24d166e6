"""Shards from a server: fetching, the cache on disk, and the store that the readers take shards from."""
