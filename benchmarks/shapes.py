"""Base models of a real shape with random weights, and chat rows of realistic lengths: speed and memory depend on the
shape alone. Random weights say nothing about quality."""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

LLAMA3_8B: dict[str, Any] = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    "tie_word_embeddings": False,
}
TINY = LLAMA3_8B | {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                    "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
LLAMA3_1B = LLAMA3_8B | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                         "tie_word_embeddings": True}  # fmt: skip
SHAPES = {"llama3-8b": LLAMA3_8B, "llama3-1b": LLAMA3_1B, "tiny": TINY}

_TEMPLATE = (
    "{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>"]
_WORDS = [
    start + end
    for start in ["ba", "ke", "li", "mo", "nu", "pra", "sti", "tre"]
    for end in ["ck", "der", "ful", "ling", "x"]
]


def build(folder: Path, shape: str, *, seed: int = 0, device: str = "cuda") -> Path:
    """Write a base model of `shape` with random bf16 weights into `folder`, unless it is there already."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True)
    tokenizer = _tokenizer(folder)
    config = LlamaConfig(**SHAPES[shape], bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    # What is measured next has the card to itself.
    del model
    torch.cuda.empty_cache()
    (folder / "tunery.json").write_text(json.dumps({"id": f"benchmark/{shape}", "revision": f"random-{seed}"}))
    return folder


def _tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=_SPECIAL, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    tokenizer.train_from_iterator([" ".join(_WORDS)] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=_SPECIAL[0], eos_token="<|eot_id|>", pad_token="<|pad|>",
        chat_template=_TEMPLATE,
    )  # fmt: skip
    fast.save_pretrained(folder)
    return fast


def chat_rows(
    count: int, *, seed: int = 0, mean: float = 5.4, spread: float = 0.6, most: int = 900
) -> list[dict[str, Any]]:
    """Return chat rows whose length in words is log-normal (`exp(mean)` is the median), at most `most` words."""
    source = random.Random(seed)
    rows = []
    for _ in range(count):
        length = min(most, max(8, int(source.lognormvariate(mean, spread))))
        asked = max(4, length // 3)
        text = [source.choice(_WORDS) for _ in range(length)]
        rows.append({"messages": [{"role": "user", "content": " ".join(text[:asked])},
                                  {"role": "assistant", "content": " ".join(text[asked:])}]})  # fmt: skip
    return rows


def write_rows(path: Path, count: int, **lengths: Any) -> None:
    """Write chat rows to `path` as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in chat_rows(count, **lengths)))


def mean_tokens(base: Path, rows: int, max_length: int, **lengths: Any) -> int:
    """Return the tokens that `rows` rows have on average, each cut to `max_length`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    sample = [row["messages"] for row in chat_rows(200, **lengths)]
    texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in sample]
    found = [min(max_length, len(ids)) for ids in tokenizer(texts, add_special_tokens=False).input_ids]
    return round(rows * sum(found) / len(found))


def build_nf4(folder: Path, whole: Path) -> Path:
    """Write the base of `whole` in 4 bit into `folder`, as a card quantises it, so that each run loads it sooner."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if (folder / "config.json").exists():
        return folder
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                bnb_4bit_compute_dtype=torch.bfloat16)  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.bfloat16, quantization_config=config,
                                                 device_map={"": "cuda:0"})  # fmt: skip
    model.save_pretrained(folder)
    for path in [*whole.glob("tokenizer*"), *whole.glob("chat_template*"), whole / "tunery.json"]:
        shutil.copy(path, folder)
    return folder


if __name__ == "__main__":
    import torch

    parent, name = Path(sys.argv[1]), sys.argv[2]
    made = build(parent / name, name, device="cuda" if torch.cuda.is_available() else "cpu")
    if torch.cuda.is_available():
        build_nf4(parent / f"{name}-nf4", made)
