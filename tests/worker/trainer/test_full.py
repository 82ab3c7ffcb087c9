"""Full fine-tuning: every weight moves, in fp32, and the result is a model that stock transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.worker.trainer import tiny
from tests.worker.trainer.conftest import Attempt, Go
from tests.worker.trainer.test_resume import resumed, same
from worker.ml.checkpoint import MODEL, BadCheckpoint, verify
from worker.trainer import protocol

OPTIONS: dict[str, Any] = {"method": "full", "learning_rate": 1e-3, "max_steps": 4}
SIXTEEN_BIT = {"load_in_4bit": False, "bnb_4bit_compute_dtype": "float32"}


def full(go: Go, **options: Any) -> Attempt:
    made = go(**OPTIONS | options)
    assert made.code == protocol.DONE, made.messages[-1]
    return made


def stored(made: Attempt, step: int) -> dict[str, torch.Tensor]:
    return load_file(made.folder / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def test_every_weight_is_trained_and_published_as_a_model(go: Go, base: Path):
    made = full(go)
    before, masters = load_file(base / "model.safetensors"), stored(made, 4)
    assert masters.keys() == before.keys()
    for name, weight in masters.items():
        assert weight.dtype == torch.float32 and not torch.equal(weight, before[name].float()), name
    report = made.result
    assert report["trainable_parameters"] == report["total_parameters"] == sum(w.numel() for w in before.values())
    assert made.losses[-1] < made.losses[0] - 0.1
    folder = made.folder / "out" / "model"
    assert {path.name for path in (made.folder / "out").iterdir()} == {"model", "reports"}
    # As the base is stored: in bf16.
    for name, weight in load_file(folder / "model.safetensors").items():
        assert torch.equal(weight, masters[name].to(torch.bfloat16)), name
    assert AutoTokenizer.from_pretrained(folder).chat_template == tiny.CHATML
    config, original = (json.loads((place / "config.json").read_text()) for place in (folder, base))
    # The padding token is the tokenizer's choice.
    assert config == original | {"pad_token_id": 3}


def test_stock_transformers_gives_the_trainers_logits(go: Go):
    made = full(go, quantization=SIXTEEN_BIT)
    assert made.run
    ids = torch.tensor([made.run.train_rows[0]["input_ids"]])
    model = AutoModelForCausalLM.from_pretrained(made.folder / "out" / "model", dtype="auto")
    with torch.no_grad():
        ours, theirs = (one.eval()(input_ids=ids).logits.float() for one in (made.run.model, model))
    assert torch.equal(ours, theirs)


def test_it_begins_where_an_adapter_begins(go: Go):
    options = {"max_steps": 1, "quantization": SIXTEEN_BIT}
    assert full(go, **options).losses == pytest.approx(go(method="lora", **options).losses, abs=1e-5)


def test_a_resumed_run_is_the_same_bit_for_bit(go: Go, base: Path, tmp_path: Path):
    whole = full(go, save_steps=1, optim="adamw_8bit")
    again = resumed(whole, 2, base, tmp_path)
    assert same(stored(again, 4), stored(whole, 4)) and again.losses == whole.losses[2:]


def test_a_checkpoint_of_a_model_is_complete_or_refused(go: Go):
    made = full(go, max_steps=1)
    folder = made.folder / "checkpoints" / "step-00000001"
    assert {path.name for path in folder.iterdir()} == {*MODEL, "manifest.json"}
    for name in MODEL:
        kept = (folder / name).rename(folder.parent / name)
        with pytest.raises(BadCheckpoint, match=name):
            verify(folder)
        kept.rename(folder / name)
    verify(folder)


def test_the_output_names_no_path_and_is_the_same_twice(go: Go, base: Path):
    first, second = full(go, max_steps=1), full(go, max_steps=1)
    for path in (first.folder / "out" / "model").iterdir():
        assert path.read_bytes() == (second.folder / "out" / "model" / path.name).read_bytes(), path.name
        assert str(base).encode() not in path.read_bytes() and str(first.folder).encode() not in path.read_bytes()
    assert "AutoModelForCausalLM" in (first.folder / "out" / "model" / "README.md").read_text()
