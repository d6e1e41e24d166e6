"""From text and tars to batches: packing into shards, the index, the global order, the loader, tokenizers.

A batch is a pure function of (seed, data fingerprint, context, batch size, step): see `bigtrain.data.order`.
"""
