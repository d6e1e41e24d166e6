"""The data pipeline from files to batches: formats, sample kinds, packing, index, global order, streaming, loader.

A batch is a pure function of (seed, data fingerprint, context, batch size, step); see `bigtrain.data.order`.
"""
