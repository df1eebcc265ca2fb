"""The public gRPC API: from text to tokens and back, placed again when workers die."""
