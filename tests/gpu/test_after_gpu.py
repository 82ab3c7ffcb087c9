"""What is done with a finished adapter, on a card: merged, at once and later, and answered with beside others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.gpu.running import run
from tests.worker.trainer import tiny
from worker.trainer import protocol
from worker.trainer.protocol import TrainSpec

if TYPE_CHECKING:
    from tests.worker.trainer.conftest import Attempt

pytestmark = pytest.mark.gpu

FORMS = ["merged", "merged_dequantized", "merged_4bit"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_base(tmp_path_factory.mktemp("base"), hidden_size=256, intermediate_size=512)


@pytest.fixture(scope="module")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Attempt:
    """A job that trained on the card and merged at once."""
    folder = tmp_path_factory.mktemp("made") / "run"
    return run(folder, base, max_steps=20, learning_rate=2e-2, num_train_epochs=10.0, export=["adapter", *FORMS])


def test_merging_happens_on_the_card_and_agrees(made: Attempt):
    assert made.code == protocol.DONE
    for form in FORMS:
        report = made.result["merged"][form]
        assert report["made"] and report["device"] == "cuda", report
    agreed = made.result["merged"]["merged"]
    gap, changed = agreed["from_adapter_on_16_bit_base"]["relative"], agreed["adapter_changes"]["relative"]
    assert gap < agreed["tolerance"] < changed


def test_an_export_later_gives_the_same_models(made: Attempt, tmp_path: Path):
    from tests.worker.trainer.conftest import attempt

    shutil.copytree(made.folder / "out" / "adapter", tmp_path / "adapter")
    shutil.copytree(made.folder / "dataset", tmp_path / "dataset")
    values = json.loads((made.folder / "spec.json").read_text())
    (tmp_path / "spec.json").write_text(json.dumps(values | {"adapter": "adapter", "source_job": "job_1"}))
    spec = TrainSpec.read(tmp_path)
    spec.job["export"] = FORMS
    spec.write(tmp_path)
    later = attempt(tmp_path)
    assert later.code == protocol.DONE
    for form in FORMS:
        name = Path("out") / form / "model.safetensors"
        assert (tmp_path / name).read_bytes() == (made.folder / name).read_bytes(), form


def test_rows_of_one_batch_give_what_each_adapter_gives_alone(made: Attempt, base: Path, tmp_path: Path):
    import torch

    from worker.ml.base import keep_training_layout, nf4_config
    from worker.ml.precision import Precision
    from worker.serve.engine.shared import SharedBase

    other = run(tmp_path / "other", base, max_steps=20, learning_rate=2e-2, num_train_epochs=10.0, seed=7)
    from transformers import AutoModelForCausalLM

    exact = Precision(torch.float32, torch.float32, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=nf4_config(None, exact), device_map={"": 0}
    )
    keep_training_layout(model)
    shared = SharedBase(model)
    ids = torch.tensor([[5, 80, 33, 200, 17, 91], [9, 41, 120, 7, 250, 64], [77, 3, 18, 160, 22, 30]], device="cuda")

    def logits(rows: list[str | None]) -> torch.Tensor:
        with shared.wearing(rows) as (dressed, arguments), torch.no_grad():
            return dressed(input_ids=ids, **arguments).logits

    bare = logits([None] * 3)
    for name, folder in (("a", made.folder), ("b", other.folder)):
        assert shared.load(name, [(folder / "out" / "adapter", 1.0)]) > 0
    mixed = logits(["a", "b", None])
    for row, name in enumerate(["a", "b", None]):
        assert torch.allclose(mixed[row], logits([name] * 3)[row], atol=1e-3), name
    assert (mixed[:2] - bare[:2]).abs().amax(dim=(1, 2)).min() > 1e-2
    for name in ("a", "b"):
        shared.unload(name)
    assert torch.equal(logits([None] * 3), bare)


def test_the_engine_answers_on_the_card(made: Attempt, base: Path):
    from tests.worker.serve.talking import Talk, asking
    from worker.serve.protocol import Loaded

    talk = Talk(base, device="cuda:0")
    assert isinstance(talk.load("job", made.folder / "out" / "adapter"), Loaded)
    asks = [asking(adapter=name) for name in ("job", None, "job")]
    first, bare, again = talk.ask(*asks)
    assert first == again and first != bare
