"""Tests that need a CUDA device are left out of a run on a machine without one.

They need no database, broker or store, and a machine with a card may lack the packages for them, which the fixtures of
the other tests import: `pytest tests/gpu --confcutdir=tests/gpu` leaves those out.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def has_cuda() -> bool:
    """Return whether torch sees a card; torch is imported only where there is a driver."""
    if not any(Path("/dev").glob("nvidia*")):
        return False
    # As the environment of a trainer has it; read when the card is first used.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect, and not skip: on a machine without a card there is nothing to report about them."""
    chosen = [item for item in items if item.get_closest_marker("gpu")]
    if not chosen or has_cuda():
        return
    config.hook.pytest_deselected(items=chosen)
    items[:] = [item for item in items if item not in chosen]
