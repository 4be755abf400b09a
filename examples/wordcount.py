"""How often each word stands in some files, by ordinary functions: no decorator, any type.

    python examples/wordcount.py LICENSE     prints 170 words, the most frequent: the 15
    python examples/wordcount.py             counts the words of this repository's docs

Each file is read and counted in a process of some node; the counts are added up in pairs, there
too, and one `Counter` comes back. Names of files mean the same everywhere on this machine.
"""

from __future__ import annotations

import operator
import re
import sys
from collections import Counter
from pathlib import Path

import manifold

DOCS = Path(__file__).parents[1] / "docs"
SHOWN = 5


def count(path: Path) -> Counter[str]:
    """The words of one file, in lower case."""
    return Counter(re.findall(r"[a-z]+", path.read_text(encoding="utf-8").lower()))


def main() -> None:
    files = [Path(each).resolve() for each in sys.argv[1:]] or sorted(DOCS.glob("*.md"))
    with manifold.connect(up=4) as m:
        words = m.reduce(operator.add, m.map(count, files))
    ranking = sorted(words.items(), key=lambda each: (-each[1], each[0]))
    shown = ", ".join(f"{word} {number}" for word, number in ranking[:SHOWN])
    print(f"{words.total()} words, the most frequent: {shown}")


if __name__ == "__main__":
    main()
