"""The embedded engine: PyTorch, and kernels of its own by Numba, on this machine's CPU.

Importing it says how OpenMP's threads shall wait between parallel regions, of which a step has
some two hundred: asleep. OpenMP libraries read this once, when torch loads them, so it is said
before torch is imported. By default the threads spin, which gains little on an idle machine and
costs a lot on one that has other work, such as a second worker: a thread that spins keeps the one
it waits for from its core (docs/engine.md has figures). OMP_WAIT_POLICY, if set, is left alone.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
