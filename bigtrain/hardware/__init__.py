"""What accelerators can do on paper, and what this machine has."""

from bigtrain.hardware.devices import Device, lookup, mfu

__all__ = ["Device", "lookup", "mfu"]
