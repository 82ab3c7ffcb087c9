"""Files that are no dataset, through the preflight's own code."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hostile import parquets, texts, turns
from tests.hostile.checking import Bad, lay_out, refusal


@pytest.mark.parametrize("bad", [pytest.param(bad, id=bad.name) for bad in [*texts.ALL, *turns.ALL, *parquets.ALL]])
def test_refused_with_the_place(tmp_path: Path, base: Path, bad: Bad):
    failed = refusal(lay_out(tmp_path, base, bad.file, bad.content, limits=bad.limits))
    assert failed.message.startswith("dataset: ") and bad.says in failed.message, failed.message[:2000]
