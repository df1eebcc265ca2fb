"""Content-addressed KV blocks, fetched by key, verified, over the best path both sides have."""
