"""Validation: exact measures, a split that nothing leaks through, and the best weights published in time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from tests.worker.trainer import tiny
from tests.worker.trainer.conftest import Attempt, Go
from tests.worker.trainer.test_check import checked
from tests.worker.trainer.test_resume import history, resumed
from worker.trainer import protocol
from worker.trainer.protocol import Result

FLOAT32 = {"bnb_4bit_compute_dtype": "float32"}
# Rows that training makes worse: after a step or two the validation loss goes up and never down again.
SPOILT: dict[str, Any] = {
    "validation": [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "0123456789"}]}],
    "learning_rate": 0.03,
    "max_steps": 20,
    "eval_steps": 1,
    "save_steps": 1,
    "lora": {"lora_dropout": 0.1},
}


def test_measures_are_means_over_tokens_whatever_the_batch(go: Go):
    rows = tiny.chat_rows(7)
    options = {"validation": rows, "max_steps": 1, "quantization": FLOAT32, "lora": {"lora_dropout": 0.0}}
    sizes = ((1, 4), (2, 2), (4, 1))
    runs = [go(per_device_train_batch_size=micro, gradient_accumulation_steps=more, **options) for micro, more in sizes]
    assert runs[0].run
    logits, labels = [], []
    with torch.no_grad():
        for row in runs[0].run.eval_rows or ():
            logits.append(runs[0].run.model.eval()(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].float())
            labels.append(torch.tensor(row["labels"][1:]))
    joined, wanted = torch.cat(logits), torch.cat(labels)
    loss = float(cross_entropy(joined, wanted, ignore_index=-100))
    accuracy = float((joined.argmax(-1) == wanted)[wanted != -100].float().mean())
    for made in runs:
        (values,) = made.metrics("eval")
        assert values["loss"] == pytest.approx(loss, abs=1e-4)
        assert values["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
        assert values["mean_token_accuracy"] == pytest.approx(accuracy, abs=1e-6)
        assert made.result["eval_token_accuracy"] == values["mean_token_accuracy"]


def texts(dataset: Any) -> set[tuple[int, ...]]:
    return {tuple(row) for row in dataset["input_ids"]}


def test_a_share_is_split_off_and_counted_before(go: Go, tmp_path: Path, base: Path):
    rows = tiny.chat_rows(20)
    made, whole = go(rows, validation_split=0.25, max_length=128), go(rows, max_length=128)
    assert made.run and whole.run
    assert len(made.run.train_rows) == 15 and len(made.run.eval_rows or ()) == 5
    assert texts(made.run.train_rows) | texts(made.run.eval_rows) == texts(whole.run.train_rows)
    assert not texts(made.run.train_rows) & texts(made.run.eval_rows)
    assert made.metrics("eval")
    (tmp_path / "check").mkdir()
    code, result = checked(tmp_path / "check", base, rows, validation_split=0.25, max_length=128)
    assert code == protocol.DONE and isinstance(result, Result)
    assert result.report["rows"] == 15 and result.report["validation"] == made.result["validation_data"]


def test_the_split_is_the_seeds(go: Go):
    rows = tiny.chat_rows(20)
    first, second, other = (go(rows, validation_split=0.25, max_steps=1, seed=seed) for seed in (1, 1, 2))
    assert first.run and second.run and other.run
    assert texts(first.run.eval_rows) == texts(second.run.eval_rows) != texts(other.run.eval_rows)


def test_a_run_stops_where_validation_gets_no_better(go: Go):
    made = go(**SPOILT, early_stopping_patience=2)
    losses = [values["loss"] for values in made.metrics("eval")]
    best = losses.index(min(losses)) + 1
    assert made.code == protocol.DONE and best + 2 <= len(losses) < 20
    assert made.result["steps"] == len(losses) and made.result["best_step"] == best
    note = made.notes("run.stopped_early")[0]
    assert note.data["step"] == len(losses) and f"at step {best}" in note.message
    assert made.result["best_eval_loss"] == min(losses) < made.result["eval_loss"]


def published(made: Attempt, step: int) -> bool:
    """Return whether the published adapter is that of the checkpoint at `step`."""
    theirs = load_file(made.folder / "checkpoints" / f"step-{step:08d}" / "adapter_model.safetensors")
    ours = made.weights()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_the_best_weights_are_published(go: Go, method: str):
    made = go(**SPOILT, early_stopping_patience=2, method=method)
    best, last = made.result["best_step"], made.result["steps"]
    assert made.result["published_step"] == best and published(made, best) and not published(made, last)
    assert made.notes("best.taken")[0].data["step"] == best


def test_the_last_weights_are_published_where_that_is_asked(go: Go):
    made = go(**SPOILT, early_stopping_patience=2, load_best_model_at_end=False)
    assert published(made, made.result["steps"]) and made.result["published_step"] == made.result["steps"]
    kept = go(**SPOILT | {"max_steps": 6}, load_best_model_at_end=True)
    assert kept.result["steps"] == 6 and published(kept, kept.result["best_step"])


def test_the_threshold_says_what_an_improvement_is(go: Go):
    options = {"validation": tiny.chat_rows(3), "max_steps": 8, "eval_steps": 1, "early_stopping_patience": 3}
    patient = go(**options, learning_rate=1e-3)
    strict = go(**options, learning_rate=1e-3, early_stopping_threshold=5.0)
    assert patient.result["steps"] == 8 and strict.result["steps"] == 4


@pytest.mark.parametrize("extra", [{}, {"method": "lora", "neftune_noise_alpha": 5.0}])
def test_a_run_that_stops_early_resumes_to_the_same_end(go: Go, base: Path, tmp_path: Path, extra: dict[str, Any]):
    whole = go(**SPOILT, early_stopping_patience=3, **extra)
    last, best = whole.result["steps"], whole.result["best_step"]
    assert best < last - 1
    # Before the best, between the best and the stop, and after the stop.
    for step in sorted({1, last - 1, last}):
        again = resumed(whole, step, base, tmp_path)
        assert again.adapter_bytes() == whole.adapter_bytes() and published(whole, best)
        assert history(again) == history(whole) and again.result["steps"] == last


def test_a_split_run_resumes_to_the_same_end(go: Go, base: Path, tmp_path: Path):
    whole = go(tiny.chat_rows(20), validation_split=0.2, eval_steps=2, max_steps=6, save_steps=3, packing="wrapped")
    again = resumed(whole, 3, base, tmp_path)
    assert again.adapter_bytes() == whole.adapter_bytes() and history(again) == history(whole)
