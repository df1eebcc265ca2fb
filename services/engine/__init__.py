"""Engines: what runs the model, behind one protocol (api.py)."""
