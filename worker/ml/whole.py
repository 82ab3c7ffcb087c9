"""Writes a model whose every weight was trained, as stock transformers loads it."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedModel

_SHARD = "5GB"


def save_model(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """Write `model` into `folder` in shards of 5 GB, after casting it to `dtype` in place: training is over."""
    for parameter in model.parameters():  # and no buffer: the rotary frequencies stay in fp32
        parameter.data = parameter.data.to(dtype)
    model.config.get_text_config().use_cache = True
    model.save_pretrained(folder, max_shard_size=_SHARD)


def stored_dtype(folder: Path) -> torch.dtype:
    """Return the dtype that the base in `folder` is published in: 16 bit for nearly all."""
    dtype = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32
