"""The trainer on a CUDA device: paged optimizers, bf16, packing, resume, lack of memory, and a model of 8 billion."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.running import run
from tests.worker.trainer import tiny
from worker.trainer import protocol
from worker.trainer.protocol import Result

pytestmark = pytest.mark.gpu

LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit", "adamw_torch_fused"])
def test_every_optimizer_is_the_asked_one(tmp_path: Path, base: Path, optim: str):
    options = {"max_steps": 30, "learning_rate": 2e-2, "num_train_epochs": 10.0, "optim": optim}
    made = run(tmp_path / "run", base, keep=True, **options)
    assert made.code == protocol.DONE and not made.notes("option.replaced")
    assert made.run and made.run.trainer.optimizer is not None
    inner = made.run.trainer.optimizer.optimizer
    assert getattr(inner, "is_paged", False) == optim.startswith("paged")
    assert made.losses[-1] < made.losses[0] - 0.5
    assert made.result["precision"]["compute_dtype"] == "bfloat16"


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_a_resumed_run_follows_the_uninterrupted_one(tmp_path: Path, base: Path, method: str):
    # Large enough for bitsandbytes to page its state: 100,000 elements a tensor and more.
    wide = tiny.build_base(tmp_path / "wide", hidden_size=1024, intermediate_size=2048)
    options = {
        "max_steps": 6,
        "save_steps": 3,
        "logging_steps": 1,
        "method": method,
        "lora": {"r": 128, "lora_dropout": 0.1},
    }
    whole = run(tmp_path / "whole", wide, **options)
    again = run(tmp_path / "again", wide, checkpoint=whole.folder / "checkpoints" / "step-00000003", **options)
    assert again.code == protocol.DONE
    ours, theirs = again.weights(), whole.weights()
    worst = max(float((ours[name].float() - theirs[name].float()).abs().max()) for name in ours)
    assert worst < 1e-3, worst
    assert len(again.losses) == 3 and again.losses == pytest.approx(whole.losses[3:], abs=1e-3)


def test_packed_rows_do_not_see_each_other(tmp_path: Path, base: Path):
    options = {"gradient_accumulation_steps": 1, "max_steps": 1, "max_length": 256, "lora": {"lora_dropout": 0.0}}
    options |= {"quantization": {"bnb_4bit_compute_dtype": "float32"}}
    rows = run(tmp_path / "rows", base, per_device_train_batch_size=12, **options)
    packed = run(tmp_path / "packed", base, per_device_train_batch_size=2, packing=True, **options)
    assert packed.losses == pytest.approx(rows.losses, abs=1e-4)


def test_fp16_trains_under_a_loss_scaler(tmp_path: Path, base: Path):
    made = run(tmp_path / "run", base, max_steps=10, quantization={"bnb_4bit_compute_dtype": "float16"})
    assert made.code == protocol.DONE and made.result["precision"]["adapter_dtype"] == "float32"
    assert made.losses[-1] < made.losses[0]
    assert (made.folder / "checkpoints" / "step-00000010" / "scaler.pt").is_file()


def test_a_card_without_room_is_out_of_memory(tmp_path: Path, base: Path):
    rows = [{"text": tiny.sentence(index, 4000)} for index in range(4)]
    long = tiny.build_base(tmp_path / "long", max_position_embeddings=8192, vocab_size=128256)
    # The fast path never holds all logits, and has room enough.
    options = {"max_length": 8192, "gradient_checkpointing": False, "kernels": "plain", "max_memory_gib": 0.15}
    made = run(tmp_path / "run", long, rows, **options)
    assert made.code == protocol.OUT_OF_MEMORY and made.failure.code == "out_of_memory"


@pytest.mark.timeout(1200)
def test_an_8b_shape_trains_and_writes_an_adapter(tmp_path: Path):
    """The child, fed the defaults of the API: rank 16 on q, k, v, o, NF4, paged 8-bit AdamW, micro-batch 4 x 4.

    But for its memory: on a large card the base would be held in 16 bit too.
    """
    base = build_8b(tmp_path / "base")
    rows = [{"messages": [{"role": "user", "content": tiny.sentence(i, 60 + i % 90)}, *answer(i)]} for i in range(192)]
    folder = tmp_path / "run"
    folder.mkdir()
    options = {"max_steps": 12, "max_length": 1024, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    options |= {"max_memory_gib": 16.0}
    tiny.write_run(folder, base, rows, hyperparameters=options | {"learning_rate": 2e-4, "save_steps": "auto"})
    spec = json.loads((folder / "spec.json").read_text()) | {"device": "cuda:0", "threads": 0}
    (folder / "spec.json").write_text(json.dumps(spec))
    child = subprocess.Popen(
        [sys.executable, "-m", "worker.trainer", str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout and child.stdin
    said = [protocol.decode(line) for line in child.stdout]
    assert child.wait() == protocol.DONE and isinstance(said[-1], Result)
    report = said[-1].report
    print(json.dumps(report))
    assert report["trainable_parameters"] == 13_631_488
    assert report["precision"]["parameters"]["nf4"] == 6_979_321_856
    assert report["peak_memory_bytes"] <= 16 * 2**30
    assert (folder / "out" / "adapter" / "adapter_model.safetensors").stat().st_size > 27_000_000
    child.stdin.close()
    child.stdout.close()


def answer(index: int) -> list[dict[str, str]]:
    """Return an answer of some 200 words."""
    return [{"role": "assistant", "content": tiny.sentence(index + 1, 150 + index % 100)}]


def build_8b(folder: Path) -> Path:
    """Write the shape of Llama-3-8B with random weights: 16 GB."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny.build_tokenizer(folder)
    config = LlamaConfig(**LLAMA_8B, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(0)
    with torch.device("cuda"):
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(default)
    model.save_pretrained(folder, max_shard_size="4GB")
    del model
    torch.cuda.empty_cache()
    return folder
