"""A model's files from running workers: described by digest, fetched in pieces, verified."""
