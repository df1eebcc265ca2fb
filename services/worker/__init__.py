"""The worker process: one engine, and the services of the roles that it may have."""
