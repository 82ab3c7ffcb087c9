"""A base model small enough to train in a second: random Llama weights, and a tokenizer trained on a few sentences."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from worker.trainer.protocol import BaseRef, TrainSpec

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = "the quick brown fox jumps over a lazy dog while rivers carry small boats to the quiet sea and birds sing"
WORDS = TEXT.split()


def sentence(seed: int, length: int) -> str:
    return " ".join(WORDS[(seed * 7 + index * 5) % len(WORDS)] for index in range(length))


def build_tokenizer(folder: Path, template: str | None = CHATML) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([sentence(seed, 12) for seed in range(50)] + ["system user assistant tool"], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template=template
    )
    fast.save_pretrained(folder)
    return fast


def build_base(folder: Path, *, seed: int = 0, template: str | None = CHATML, **config: Any) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer(folder, template)
    values = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(values | config))).to(torch.bfloat16)
    torch.set_rng_state(state)
    model.save_pretrained(folder)
    return folder


def build_family(folder: Path, model_type: str, **config: Any) -> Path:
    """Write a base of another architecture, with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = build_tokenizer(folder)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    torch.manual_seed(0)
    known = type(AutoConfig.for_model(model_type))(vocab_size=len(tokenizer), **ids, **config)
    AutoModelForCausalLM.from_config(known).save_pretrained(folder)
    return folder


def build_vision(folder: Path, model_type: str) -> Path:
    """Write a vision-language base, with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    tokenizer = build_tokenizer(folder)
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None,
    }  # fmt: skip
    vision: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    if model_type.startswith("qwen"):
        text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}}
        sizes = (64, "embed_dim", 32) if model_type == "qwen2_vl" else (32, "out_hidden_size", 64)
        vision = {"depth": 2, "num_heads": 2, "intermediate_size": 64, "hidden_size": sizes[0], sizes[1]: sizes[2]}
    torch.manual_seed(0)
    known = AutoConfig.for_model(model_type)
    parts = {"text_config": text, "vision_config": vision}
    config = type(known)(**{name: type(getattr(known, name))(**part).to_dict() for name, part in parts.items()})
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    return folder


def chat_rows(count: int) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": sentence(index, 3 + index % 9)},
                {"role": "assistant", "content": sentence(index + 1, 2 + index % 5)},
            ]
        }
        for index in range(count)
    ]


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_run(
    folder: Path,
    base: Path,
    rows: list[dict[str, Any]] | None = None,
    *,
    hyperparameters: dict[str, Any] | None = None,
    validation: list[dict[str, Any]] | None = None,
    resume_from: str | None = None,
    shrink: int = 0,
    threads: int = 1,
    **job: Any,
) -> TrainSpec:
    """Lay out the folder of a run as the supervisor does, and return its spec."""
    write_jsonl(folder / "dataset" / "train.jsonl", chat_rows(12) if rows is None else rows)
    if validation is not None:
        write_jsonl(folder / "dataset" / "validation.jsonl", validation)
    spec = TrainSpec(
        job_id="job-1",
        attempt=1,
        job={
            "model": "tiny/llama",
            "dataset": "dataset:0",
            "validation_dataset": "dataset:1" if validation is not None else None,
            "hyperparameters": {
                "max_steps": 3,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 2,
                "max_length": 64,
                "learning_rate": 1e-2,
                "logging_steps": 1,
                "save_steps": 2,
            }
            | (hyperparameters or {}),
        }
        | job,
        base=BaseRef(str(base), "tiny/llama", "0123abc"),
        train_file="dataset/train.jsonl",
        train_sha256="0" * 64,
        validation_file="dataset/validation.jsonl" if validation is not None else None,
        resume_from=resume_from,
        device="cpu",
        threads=threads,
        shrink=shrink,
    )
    spec.write(folder)
    return spec
