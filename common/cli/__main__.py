"""`python -m common.cli` is `tunery`."""

from __future__ import annotations

from common.cli import main

if __name__ == "__main__":
    main()
