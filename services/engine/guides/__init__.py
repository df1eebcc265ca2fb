"""Structured outputs: what a request's output must look like, and the tokens that can lead there.

`grammar` turns a guide into a grammar of llguidance and refuses what that would not enforce;
`vocabulary` is the model's tokens as the library wants them; `guided` follows one sequence.
"""
