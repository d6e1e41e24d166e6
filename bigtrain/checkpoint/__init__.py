"""Checkpoints: commit and verify, save and load at any layout, retention, export.

A checkpoint is a directory written by torch.distributed.checkpoint (DCP), made whole by `manifest.json`
(sizes, hashes, configuration, position), and published by a rename. See `commit` for the protocol.
The modules `config`, `manifest` and `commit` import no torch.
"""
