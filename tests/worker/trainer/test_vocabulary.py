"""Padding takes a token that nothing else needs; the vocabulary grows only for tokens that the data has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.worker.trainer import tiny
from tests.worker.trainer.conftest import Attempt, Go
from tests.worker.trainer.test_check import checked
from tests.worker.trainer.test_resume import resumed
from worker.ml.tokenizer import load_tokenizer
from worker.trainer import protocol
from worker.trainer.protocol import Failed, Result

NEW = ["<|call|>", "<|result|>"]


def altered(folder: Path, base: Path, **special: Any) -> Path:
    """Copy the base's tokenizer into `folder` with other special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(special.pop("added", []), special_tokens=True)
    for name, token in special.items():
        setattr(tokenizer, name, token)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("special", "expected"),
    [
        ({"pad_token": "<|im_start|>"}, "<|im_start|>"),
        ({"pad_token": "<|im_end|>"}, "<|pad|>"),
        ({"pad_token": None}, "<|pad|>"),
        ({"eos_token": "<|pad|>", "pad_token": None}, "<|endoftext|>"),
    ],
)
def test_the_end_of_a_text_pads_only_where_nothing_else_does(
    base: Path, tmp_path: Path, special: dict[str, Any], expected: str
):
    assert load_tokenizer(altered(tmp_path, base, **special)).pad_token == expected


@pytest.mark.parametrize(
    ("added", "unknown", "rows", "expected"),
    [
        (["<|reserved_special_token_7|>", "<|reserved_special_token_3|>"], None, None, "<|reserved_special_token_7|>"),
        (["<unused12>"], None, None, "<unused12>"),
        (["[control_8]"], "<|im_start|>", None, "[control_8]"),
        (["[control_8]"], "<|im_start|>", 349, "<|im_start|>"),
        ([], "<|im_start|>", None, "<|im_start|>"),
        ([], None, None, "<|im_end|>"),
    ],
)
def test_reserved_tokens_come_before_the_unknown_one_and_that_before_the_end(
    base: Path, tmp_path: Path, added: list[str], unknown: str | None, rows: int | None, expected: str
):
    folder = altered(tmp_path, base, added=added, unk_token=unknown)
    text = (folder / "tokenizer.json").read_text()
    # A vocabulary without the tokens that are meant for padding.
    (folder / "tokenizer.json").write_text(text.replace("<|pad|>", "<|a|>").replace("<|endoftext|>", "<|b|>"))
    assert load_tokenizer(folder, rows).pad_token == expected


def test_an_end_that_also_pads_is_still_learned(go: Go, base: Path, tmp_path: Path):
    folder = tiny.build_base(tmp_path / "bare")
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("<|pad|>", "<|a|>").replace("<|endoftext|>", "<|b|>"))
    made = go(base=folder, max_steps=1)
    assert made.run and made.run.tokenizer.pad_token == made.run.tokenizer.eos_token == "<|im_end|>"
    end = made.run.tokenizer.eos_token_id
    batch = next(iter(made.run.trainer.get_train_dataloader()))
    assert (batch["attention_mask"] == 0).any(), "nothing is padded"
    real = (batch["input_ids"] == end) & (batch["attention_mask"] == 1)
    learned = real & (batch["labels"] == end)
    # Each row has two ends, the user's and the assistant's; the second is learned.
    assert real.sum() == 4 and learned.sum() == 2
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


@pytest.fixture
def lacking(tmp_path: Path) -> Path:
    """A base whose tokenizer has two tokens that its embedding was never given rows for."""
    folder = tiny.build_base(tmp_path / "lacking")
    altered(folder, folder, added=NEW)
    return folder


ROWS = [
    {"messages": [{"role": "user", "content": f"{NEW[0]} {tiny.sentence(index, 4)}"},
                  {"role": "assistant", "content": f"{NEW[1]} {tiny.sentence(index + 1, 3)}"}]}
    for index in range(8)
]  # fmt: skip


FLOAT32 = {
    "qlora": {"bnb_4bit_compute_dtype": "float32"},
    "lora": {"load_in_4bit": False, "bnb_4bit_compute_dtype": "float32"},
}


@pytest.mark.parametrize("method", FLOAT32)
def test_missing_rows_are_added_trained_and_stored(go: Go, lacking: Path, method: str):
    made = go(ROWS, base=lacking, method=method, quantization=FLOAT32[method])
    assert made.code == protocol.DONE, made.messages[-1]
    assert made.result["vocabulary_grown"] == 2
    assert made.notes("vocabulary.grown")[0].data == {"rows": 351, "new": 2}
    weights = made.weights()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert weights[f"base_model.model.{name}"].shape == (351, 64)
    assert "base.resize_token_embeddings(351)" in (made.folder / "out" / "adapter" / "README.md").read_text()
    if method == "lora":
        assert same_logits_in_stock(made, lacking)


@torch.no_grad()
def same_logits_in_stock(made: Attempt, base: Path) -> bool:
    assert made.run
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(351)
    theirs = PeftModel.from_pretrained(model, made.folder / "out" / "adapter").eval()
    ids = torch.tensor([made.run.train_rows[0]["input_ids"]])
    assert int(ids.max()) >= 349
    return torch.allclose(made.run.model.eval()(input_ids=ids).logits, theirs(input_ids=ids).logits, atol=2e-4)


def test_new_rows_of_tied_embeddings_are_trained_and_resumed(go: Go, tmp_path: Path):
    tied = tiny.build_base(tmp_path / "tied", tie_word_embeddings=True)
    altered(tied, tied, added=NEW)
    whole = go(ROWS, base=tied, max_steps=4)
    assert whole.code == protocol.DONE, whole.messages[-1]
    again = resumed(whole, 2, tied, tmp_path)
    assert again.adapter_bytes() == whole.adapter_bytes()
    first = load_file(whole.folder / "checkpoints" / "step-00000002" / "adapter_model.safetensors")
    name = "base_model.model.model.embed_tokens.weight"
    assert (whole.weights()[name][349:] - first[name][349:]).abs().max() > 1e-3


def test_a_full_fine_tune_publishes_the_larger_model(go: Go, lacking: Path):
    made = go(ROWS, base=lacking, method="full", learning_rate=1e-3)
    model = AutoModelForCausalLM.from_pretrained(made.folder / "out" / "model")
    assert model.config.vocab_size == model.get_output_embeddings().weight.shape[0] == 351


def test_tokens_that_no_row_has_do_not_grow_it(go: Go, lacking: Path):
    made = go(base=lacking, max_steps=1)
    assert "vocabulary_grown" not in made.result and not made.notes("vocabulary.grown")
    assert all("lora_" in name for name in made.weights())


def test_the_preflight_says_so_and_refuses_another_models_tokenizer(lacking: Path, tmp_path: Path):
    code, result = checked(tmp_path / "run", lacking, ROWS)
    assert code == protocol.DONE and isinstance(result, Result) and result.report["vocabulary_grown"] == 2
    config = json.loads((lacking / "config.json").read_text())
    (lacking / "config.json").write_text(json.dumps(config | {"vocab_size": 90}))
    code, failed = checked(tmp_path / "run2", lacking, ROWS)
    assert code == protocol.BAD_INPUT and isinstance(failed, Failed) and "has 90 rows" in failed.message


def test_a_growing_embedding_carries_no_adapter(go: Go, lacking: Path):
    made = go(ROWS, base=lacking, lora={"target_modules": ["embed_tokens"]})
    assert made.code == protocol.BAD_INPUT and "vocabulary grows" in made.failure.message
