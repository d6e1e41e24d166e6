"""Decoders of tar members that hold arrays in other formats than .npy, one file each; see `bigtrain.data.decoding`."""
