"""What the harness itself saw and did, one JSON object a line: part of the log outside the system."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any


class Journal:
    """Appends entries to a file. Safe to use from several threads."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()

    def write(self, kind: str, **values: Any) -> None:
        """Append an entry with the present time."""
        line = json.dumps({"at": time.time(), "kind": kind, **values})
        with self._lock, self.path.open("a") as stream:
            stream.write(f"{line}\n")


def entries(path: Path, kind: str) -> list[dict[str, Any]]:
    """Return the entries of a kind, in order."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [entry for entry in map(json.loads, lines) if entry["kind"] == kind]
