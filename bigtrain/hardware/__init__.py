"""Data-sheet figures of accelerators, and the hardware of this machine."""

from bigtrain.hardware.devices import Device, lookup, mfu

__all__ = ["Device", "lookup", "mfu"]
