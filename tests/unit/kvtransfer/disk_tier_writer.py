"""Puts blocks into a disk tier until it is killed; says so, a byte for each on stdout.

`disk_tier_writer.py FOLDER SEED`. The test that starts it imports `shape` and the rest from here.
"""

import random
import sys
from pathlib import Path

import numpy as np

from kvtransfer.tiers.base import Label, Shape
from kvtransfer.tiers.disk import disk_tier

SHAPE = Shape("crash", (200_000, 200_000, 112_345))
PLACES = 8
KEYS = [bytes([i]) * 16 for i in range(24)]


def data_of(key: bytes) -> np.ndarray:
    return np.random.default_rng(key[0]).integers(0, 256, SHAPE.block_bytes, np.uint8)


def open_tier(folder: Path):
    return disk_tier(SHAPE, folder, 4096 + PLACES * (512 + 516_096))


def main() -> None:
    tier, chance = open_tier(Path(sys.argv[1])), random.Random(int(sys.argv[2]))
    blocks = {key: data_of(key) for key in KEYS}
    labels = {key: Label(key, "t", SHAPE.checksums(data)) for key, data in blocks.items()}
    while True:
        key = chance.choice(KEYS)
        if chance.random() < 0.1:
            tier.forget(key)
        else:
            assert tier.put(labels[key], blocks[key])
        sys.stdout.buffer.write(b".")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
