"""Engines: model, optimizer and layout behind one contract (`contract.py`)."""
