"""An engine that Tandem steps itself: scheduling, sampling, KV hand-off, around any model.

The model (torch/, scripted/) computes logits over a paged KV pool; everything else is here.
"""
