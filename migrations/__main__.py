"""`python -m migrations`: upgrade the database of the settings, make sure that the bucket is there."""

from __future__ import annotations

import sys

import migrations
from common import context, settings
from common.errors import TuneryError


def main() -> int:
    """Upgrade and return an exit code."""
    try:
        parts = context.build(settings.load())
        migrations.upgrade(parts.sessions.engine)
        parts.store.ensure_bucket()
    except TuneryError as error:
        print(f"{error.message}{f' {error.hint}' if error.hint else ''}", file=sys.stderr)
        return 1
    print(f"database at {migrations.newest()}, bucket {parts.store.bucket!r} there")
    return 0


if __name__ == "__main__":
    sys.exit(main())
