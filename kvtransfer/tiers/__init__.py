"""Where blocks go that the pool evicts, and come back from: memory of the host, a local disk."""
