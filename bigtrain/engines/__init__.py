"""Engines: each executes training steps for a model, an optimizer and a layout, behind one contract (`contract.py`)."""
