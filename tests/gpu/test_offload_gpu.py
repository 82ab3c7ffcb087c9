"""Layers that wait in host memory: the card holds less, and the run is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.gpu.running import run
from tests.worker.trainer import tiny
from worker.ml import base as loading
from worker.trainer import protocol

pytestmark = pytest.mark.gpu

# 26.5 MB a layer in 4 bit.
SHAPE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 16}
LAYER_BYTES = 26_500_000


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_base(tmp_path_factory.mktemp("base"), **SHAPE)


# Without an adapter on a layer's last linear its backward pass comes before anything is recomputed.
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]], ids=["all", "query"])
def test_the_card_holds_less_and_the_losses_are_the_same(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, targets: Any
):
    options: dict[str, Any] = {"max_steps": 4, "lora": {"target_modules": targets}, "kernels": "plain"}
    plain = run(tmp_path / "plain", base, **options)
    monkeypatch.setattr(loading, "room_for_weights", lambda _device: 4 * LAYER_BYTES)
    offloaded = run(tmp_path / "offloaded", base, quantization={"device_map": "auto"}, **options)
    assert offloaded.code == protocol.DONE, offloaded.messages[-1]
    waiting = offloaded.result["offload"]["layers"]
    assert waiting >= 12 and offloaded.notes("base.offloaded")[0].level == "warning"
    assert offloaded.losses == pytest.approx(plain.losses, abs=1e-3)
    saved = plain.result["peak_memory_bytes"] - offloaded.result["peak_memory_bytes"]
    assert saved > (waiting - 4) * LAYER_BYTES, f"{saved:,} bytes less"


def test_the_weights_lie_in_pinned_host_memory(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch):
    from bitsandbytes.nn import Linear4bit

    monkeypatch.setattr(loading, "room_for_weights", lambda _device: 4 * LAYER_BYTES)
    made = run(tmp_path / "run", base, quantization={"device_map": "auto"}, max_steps=1, keep=True)
    assert made.run
    held = [module.weight.data for module in made.run.model.modules() if isinstance(module, Linear4bit)]
    hosted = [weight for weight in held if not weight.is_cuda]
    # Two of the layers that wait are visiting when the run ends.
    assert len(hosted) == 7 * (made.result["offload"]["layers"] - 2) and all(weight.is_pinned() for weight in hosted)
    trained = [parameter for parameter in made.run.model.parameters() if parameter.requires_grad]
    assert all(parameter.is_cuda for parameter in trained)
