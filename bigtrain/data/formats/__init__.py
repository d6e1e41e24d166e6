"""File formats, decoded without trust: tars, .npy, compressed files, documents of text, text members, images."""
