"""From files to batches: formats, sample kinds, packing, the index, the global order, streaming, the loader.

A batch is a pure function of (seed, data fingerprint, context, batch size, step); see `bigtrain.data.order`.
"""
