"""Checkpoints: commit and verify, save and load at any layout, retention, export.

A checkpoint is a directory of files written by torch.distributed.checkpoint (DCP). `manifest.json` completes it with
the files' sizes and hashes, the configuration and the loader's position. A rename publishes it; see `commit` for the
protocol. The modules `config`, `manifest` and `commit` do not import torch.
"""
