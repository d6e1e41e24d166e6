"""Decoders of members that hold arrays in a format of their own, one file each; see `bigtrain.data.decoding`."""
