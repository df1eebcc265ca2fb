"""A model's answers: what it thinks, what it says, and what it calls.

`format` is what the frontend sees; `choose` finds a model's format; a file for each family of
models. `marks` finds markers in text that comes in pieces.
"""
