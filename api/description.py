"""`python -m api.description > docs/openapi.json`: the OpenAPI description, as the API serves it at `/openapi.json`."""

from __future__ import annotations

import json
import sys

from api.app import create_app
from common import context
from common.settings import Settings


def described() -> str:
    """Return the description as JSON; nothing is connected to."""
    # Addresses of nothing: they are not part of what is described.
    settings = Settings(database_url="sqlite://", broker_url="redis://localhost", _env_file=None)
    parts = context.build(settings)
    try:
        return json.dumps(create_app(parts).openapi(), indent=1, ensure_ascii=False) + "\n"
    finally:
        parts.close()


if __name__ == "__main__":
    sys.stdout.write(described())
