"""Decoders of untrusted files: tars, .npy, compressed files, text documents, text members, images."""
