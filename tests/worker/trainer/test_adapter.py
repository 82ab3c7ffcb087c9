"""What a run leaves behind: an adapter that stock peft loads anywhere."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from tests.worker.trainer import tiny
from tests.worker.trainer.conftest import Go


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_stock_peft_gives_the_logits_of_the_trainer(go: Go, base: Path, method: str):
    made = go(method=method)
    assert made.run is not None
    made.run.model.eval()
    ids = torch.tensor([made.run.train_rows[0]["input_ids"]])
    with torch.no_grad():
        ours = made.run.model(input_ids=ids).logits
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=made.run.precision.compute,
    )
    options = {"quantization_config": config} if method == "qlora" else {}
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=made.run.precision.compute, **options)
    model = PeftModel.from_pretrained(plain, made.folder / "out" / "adapter").eval()
    with torch.no_grad():
        theirs = model(input_ids=ids).logits
        with model.disable_adapter():
            bare = model(input_ids=ids).logits
    assert torch.allclose(ours.float(), theirs.float(), atol=0.02)
    assert (ours.float() - bare.float()).abs().max() > 0.1


def test_the_adapter_names_the_public_base_and_no_path(go: Go, base: Path):
    made = go()
    folder = made.folder / "out" / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("tiny/llama", "0123abc")
    assert config["target_modules"] == sorted(config["target_modules"])
    for path in (made.folder / "out").rglob("*"):
        if path.is_file():
            assert str(base).encode() not in path.read_bytes(), path.name
            assert str(made.folder).encode() not in path.read_bytes(), path.name
    assert "base_model: tiny/llama" in (folder / "README.md").read_text()


def test_the_tokenizer_and_template_come_along(go: Go):
    made = go()
    tokenizer = AutoTokenizer.from_pretrained(made.folder / "out" / "adapter")
    assert tokenizer.chat_template == tiny.CHATML
    assert tokenizer.pad_token == "<|pad|>"


def test_the_same_job_gives_the_same_bytes(go: Go):
    first, second = go(), go()
    names = sorted(path.name for path in (first.folder / "out" / "adapter").iterdir())
    for name in names:
        left, right = ((made.folder / "out" / "adapter" / name).read_bytes() for made in (first, second))
        assert left == right, name
    data = first.adapter_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    assert header["__metadata__"] == {"format": "pt"}


def test_another_seed_gives_another_adapter(go: Go):
    assert go(seed=1).adapter_bytes() != go(seed=2).adapter_bytes()


def test_the_reports_say_what_was_done(go: Go):
    made = go()
    reports = made.folder / "out" / "reports"
    metrics = json.loads((reports / "metrics.json").read_text())
    assert [entry["step"] for entry in metrics] == [1, 2, 3]
    precision = json.loads((reports / "precision.json").read_text())
    assert precision["parameters"]["nf4"] == 73728
    assert set(precision["left_in_16_bit"]) == {"model.embed_tokens.weight", "lm_head.weight"}
    report = json.loads((reports / "report.json").read_text())
    assert report["trainable_parameters"] == 14336 and report["steps"] == 3
    assert report["tokens_trained"] == report["data"]["tokens"] == 264
    assert report["loss_tokens_trained"] == report["data"]["trained_tokens"]
    assert set(report["seconds"]) >= {"prepare", "train", "evaluate"}
