"""A trainer that is killed while it saves leaves a checkpoint that is whole, or none: `make faults` kills 500."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT

# In the order of a save. What lies at `sealed` is complete, and nobody was told of it yet.
BEFORE, DURING, AFTER = ("not begun",), ("half written", "written", "described"), ("sealed", "announced")


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("method", ["qlora", "full"])
def test_no_kill_leaves_a_checkpoint_that_is_not_whole(request: pytest.FixtureRequest, tmp_path: Path, method: str):
    kills, seed = request.config.getoption("saving_kills", 60) // 2, random.randrange(10**6)
    # A CUDA context does not live on in a fork, and the tiny model needs none.
    variables = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.saving", str(tmp_path), method, str(kills), str(seed)],
        cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    tally = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(tally))
    assert not tally["wrong"], f"seed {seed}: {tally['wrong'][:10]}"
    stages = tally["stages"]
    assert sum(stages.values()) == kills and stages.keys() <= {*BEFORE, *DURING, *AFTER}
    # That the kills met what they were meant for: a save in all its parts, and folders that the library would trust.
    assert sum(stages.get(stage, 0) for stage in DURING) > kills / 3, tally
    if tally["calls"]:
        assert all(stages.get(stage) for stage in ("half written", "written", "announced")), tally
        assert tally["trusted_torn"], tally
