"""Decides where requests run. Holds soft state only, rebuilt from workers."""
