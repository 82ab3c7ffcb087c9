"""A base that is read in 4 bit from the disk is on the card what one that was quantised there is, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.gpu.running import give_back
from tests.worker.trainer import tiny
from worker.trainer import protocol
from worker.trainer.holding import Holder
from worker.trainer.protocol import CacheRef

if TYPE_CHECKING:
    from tests.worker.trainer.conftest import Attempt

pytestmark = pytest.mark.gpu

WIDE = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 3}


def work(folder: Path, base: Path, cache: CacheRef | None, quantization: dict[str, Any]) -> Attempt:
    """Do a run on the card as a trainer's process does, up to what it writes into the cache."""
    from tests.worker.trainer.conftest import attempt

    give_back()
    folder.mkdir()
    hyperparameters = {"max_steps": 4, "optim": "paged_adamw_8bit", "kernels": "plain"}
    spec = tiny.write_run(folder, base, hyperparameters=hyperparameters, quantization=quantization)
    replace(spec, device="cuda:0", cache=cache).write(folder)
    holder = Holder()
    made = attempt(folder, holder=holder)
    assert made.code == protocol.DONE
    made.run = None
    holder.tidy()
    told = holder.store()
    assert told is None or told.name == "base.cached", told
    return made


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("compute", ["bfloat16", "float16"])
def test_a_cached_base_gives_the_same_losses(tmp_path: Path, quant_type: str, double: bool, compute: str):
    base = tiny.build_base(tmp_path / "base", **WIDE)
    settings = {
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": double,
        "bnb_4bit_compute_dtype": compute,
    }
    cache = CacheRef(str(tmp_path / "quantized"), 1 << 40, 0)
    alone = work(tmp_path / "alone", base, None, settings)
    cold = work(tmp_path / "cold", base, cache, settings)
    cached = work(tmp_path / "cached", base, cache, settings)
    origins = [made.result["base_load"]["from"] for made in (alone, cold, cached)]
    # That it has the bits of what was quantised is checked by the seal of the entry, or it would not have been used.
    assert origins == ["files", "files", "cache"] and not cached.notes("base.cache_dropped")
    assert cached.losses[0] == cold.losses[0] == alone.losses[0]
    # The backward pass of attention adds in any order, so equal runs drift apart.
    assert cached.losses == pytest.approx(alone.losses, abs=1e-3) and cold.losses == pytest.approx(
        alone.losses, abs=1e-3
    )
