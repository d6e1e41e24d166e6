"""Packing: turns input files into shards (`bigtrain data pack`)."""
