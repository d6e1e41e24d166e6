"""bigtrain: one YAML file trains a transformer, from a laptop's CPU to a cluster of GPUs.

Importing the package is cheap: torch, ray and deepspeed are imported where they are first needed.
"""

__version__ = "0.1.0"
