"""A worker of several processes: a leader that has its services, ranks that have its engines."""
