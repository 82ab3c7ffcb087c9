"""What every test may use."""

from __future__ import annotations

pytest_plugins = ["tests.servers", "tests.installations", "tests.node", "tests.stock_libraries"]
