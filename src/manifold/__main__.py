"""`python -m manifold`, and the console script."""

from __future__ import annotations

from manifold.shells.cli.main import main

if __name__ == "__main__":
    main()
