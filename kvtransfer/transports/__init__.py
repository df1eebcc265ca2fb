"""Ways to read bytes from a source's memory, behind one contract."""
