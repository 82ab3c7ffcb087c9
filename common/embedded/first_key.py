"""`python -m common.embedded.first_key PATH`: makes sure that the file at PATH holds a valid administrator's key.

A process of its own, so that `tunery up` itself holds no connection to the database while it forks children.
"""

from __future__ import annotations

import sys
from pathlib import Path

from common import context, settings
from common.keys import ensure_first_key


def main(path: Path) -> None:
    """Write the key, into the database of this process's settings and the file at `path`, unless both have one."""
    parts = context.build(settings.load())
    try:
        with parts.write() as session:
            ensure_first_key(session, path)
    finally:
        parts.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
