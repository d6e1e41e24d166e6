"""Packing: input files become shards (`bigtrain data pack`)."""
