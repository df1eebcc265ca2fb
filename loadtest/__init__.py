"""Load generator, reports."""
