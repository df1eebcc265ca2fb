"""The decode process: fetches KV, runs continuous batches, streams tokens."""
