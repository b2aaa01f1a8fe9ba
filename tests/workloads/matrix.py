"""Multiplies matrices with several threads, and prints the number of rounds and a hash of the result.

`matrix.py` goes on until there is a file `end`, `matrix.py ROUNDS` for so many rounds."""

import hashlib
import os
import sys

import numpy as np

rounds = int(sys.argv[1]) if len(sys.argv) > 1 else None
a = np.random.default_rng(1).standard_normal((500, 500))
b = a.copy()
history = np.zeros((20, 500, 500))
print("ready", flush=True)
i = 0
while i != rounds if rounds is not None else not os.path.exists("end"):
    b = a @ b
    b /= np.abs(b).max()
    history[i % 20] = b
    i += 1
assert len(os.listdir("/proc/self/task")) > 1, "OpenBLAS has no threads here"
print(i, hashlib.sha256(np.round(history, 6).tobytes()).hexdigest())
