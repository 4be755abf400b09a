"""The Mandelbrot set as a picture: each index computes one pixel, on whatever node is free.

    python examples/mandelbrot.py out.png        prints 116965 pixels belong to the set
    python examples/mandelbrot.py out.png 240    prints 7313 pixels belong to the set

The picture is 960 by 640, or as wide as the second argument says. The kernel gives a number for
each pixel; colours are made of all of them at once, here, by numpy.
"""

from __future__ import annotations

import struct
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

import manifold

STEPS_MAX = 1000
LEFT, TOP, ACROSS = -2.4, 1.15, 3.45  # of the plane, in the width of the picture
ESCAPED = 256.0  # |z|², far out: the further, the smoother the colours
# |z|² at the end is below (256 + |c|)² < 2^17, so that steps and |z|² fit in one exact number.
SCALE = 131072.0

# The palette, from far away to the edge of the set: where on it, and how red, green, blue it is.
AT = (0.0, 0.2, 0.4, 0.55, 0.7, 0.85, 1.0)
RED = (4, 12, 32, 237, 255, 160, 20)
GREEN = (6, 40, 107, 255, 180, 50, 4)
BLUE = (38, 110, 203, 255, 20, 10, 20)
FAR, NEAR = 1.0, 7.0  # log2 of the steps at the two ends


@manifold.kernel
def escape(pixel: int, width: int) -> float:
    """After how many steps z*z + c has escaped, times SCALE, plus |z|² then; -1 if it does not."""
    y, x = divmod(pixel, width)
    step = ACROSS / width
    cx, cy = LEFT + x * step, TOP - y * step
    zx, zy = 0.0, 0.0
    for steps in range(STEPS_MAX):
        xx, yy = zx * zx, zy * zy
        if xx + yy > ESCAPED:
            return steps * SCALE + xx + yy
        zx, zy = xx - yy + cx, 2.0 * zx * zy + cy
    return -1.0


def colours(escapes: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """Red, green and blue of each pixel; what never escapes is black."""
    inside = escapes < 0
    steps, square = np.divmod(np.where(inside, ESCAPED, escapes), SCALE)
    # The step at which it would have escaped, as a fraction: |z| is squared at each.
    smooth = steps + 1.0 - np.log2(np.log2(np.maximum(square, ESCAPED)) / np.log2(ESCAPED))
    place = (np.log2(np.maximum(smooth, 1.0)) - FAR) / (NEAR - FAR)
    found = np.stack([np.interp(place, AT, each) for each in (RED, GREEN, BLUE)], axis=-1)
    found[inside] = 0
    return found.astype(np.uint8)


def png(width: int, rows: Sequence[bytes]) -> bytes:
    """A picture of three bytes a pixel: red, green, blue."""

    def chunk(name: bytes, data: bytes) -> bytes:
        check = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", check)

    head = struct.pack(">IIBBBBB", width, len(rows), 8, 2, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    end = chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + end


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit("usage: python examples/mandelbrot.py FILE.png [WIDTH]")
    width = int(sys.argv[2]) if len(sys.argv) > 2 else 960
    height = width * 2 // 3
    with manifold.connect(up=4) as m:
        began = time.perf_counter()
        found = m.parallel_for(escape, 0, width * height, arguments=(width,))
        seconds = time.perf_counter() - began
    picture = colours(np.array(found).reshape(height, width))
    Path(sys.argv[1]).write_bytes(png(width, [row.tobytes() for row in picture]))
    print(f"{found.count(-1.0)} pixels belong to the set")
    print(f"{sys.argv[1]}: {width} by {height}, computed in {seconds:.2f} s")


if __name__ == "__main__":
    main()
