"""The Mandelbrot set as a picture: each index computes one pixel, on whatever node is free.

manifold up                                  in another terminal
python examples/mandelbrot.py set.png        writes a picture of 960 by 640
python examples/mandelbrot.py set.png 240    the same, 240 wide
"""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import manifold

STEPS_MAX = 255
LEFT, TOP, ACROSS = -2.2, 1.0, 3.0  # of the plane, in the width of the picture


@manifold.kernel
def escape_steps(pixel: int, width: int) -> int:
    """After how many steps z*z + c leaves the circle of radius 2; STEPS_MAX if it does not."""
    y, x = divmod(pixel, width)
    step = ACROSS / width
    cx, cy = LEFT + x * step, TOP - y * step
    zx, zy = 0.0, 0.0
    for steps in range(STEPS_MAX):
        xx, yy = zx * zx, zy * zy
        if xx + yy > 4.0:
            return steps
        zx, zy = xx - yy + cx, 2.0 * zx * zy + cy
    return STEPS_MAX


def png(width: int, rows: Sequence[bytes]) -> bytes:
    """A picture in shades of grey, a byte a pixel."""

    def chunk(name: bytes, data: bytes) -> bytes:
        check = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", check)

    head = struct.pack(">IIBBBBB", width, len(rows), 8, 0, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    end = chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + end


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit("usage: python examples/mandelbrot.py FILE.png [WIDTH]")
    width = int(sys.argv[2]) if len(sys.argv) > 2 else 960
    height = width * 2 // 3
    with manifold.connect() as m:
        steps = m.parallel_for(escape_steps, 0, width * height, arguments=(width,))
    shades = bytes(255 - each for each in steps)
    rows = [shades[at : at + width] for at in range(0, len(shades), width)]
    Path(sys.argv[1]).write_bytes(png(width, rows))
    inside = steps.count(STEPS_MAX)
    print(f"{sys.argv[1]}: {width} by {height}, {inside} pixels belong to the set")


if __name__ == "__main__":
    main()
