"""Writes grey frames of 320 x 240, and their number to a file.

`frames.py` goes on until there is a file `end`, `frames.py FRAMES` for so many frames."""

import os
import sys
import time

WIDTH, HEIGHT = 320, 240
# Not sys.stdout: it is without a buffer where PYTHONUNBUFFERED is set, and then writes parts.
out = open(1, "wb", closefd=False)
wanted = int(sys.argv[1]) if len(sys.argv) > 1 else None
row = bytes((x * x // 31) % 256 for x in range(8 * WIDTH))
number = 0
while number != wanted if wanted is not None else not os.path.exists("end"):
    lines = (row[(number * 3 + y * 5) % (7 * WIDTH):][:WIDTH] for y in range(HEIGHT))
    out.write(b"".join(lines))
    out.flush()
    number += 1
    if wanted is None:
        time.sleep(0.03)
with open("frames", "w") as file:
    file.write(str(number))
