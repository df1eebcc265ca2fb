"""How fast KV moves on this machine, beside what the machine can do: python -m kvtransfer.bench."""
