"""Several processes that compute one model together, bit for bit as one would."""
