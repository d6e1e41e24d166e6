"""Model families, one file each, and their shared code: layers, loss, initial weights, random bits, sampling.

`config.FAMILIES[arch]` is the config class of a family, in families/ARCH.py. The modules that it builds implement
`contract.Model`.
"""
