"""Model families, one file each, and what they share: layers, loss, initial weights, random bits, sampling.

`config.family(arch)` finds the file `ARCH.py`; what a built module must offer is `contract.Model`.
"""
