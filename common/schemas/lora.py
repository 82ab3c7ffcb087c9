"""The adapter, and how the frozen base under it is held: the names of peft and bitsandbytes."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from common.schemas.values import Strict, Text

_TARGET_LIST_MAX = 256


class Lora(Strict):
    """The adapter. `target_modules` is a list of module names, a regular expression, or `all-linear`."""

    r: Annotated[int, Field(ge=1, le=1024)] = 16
    lora_alpha: Annotated[float, Field(gt=0, le=65536)] = 32.0
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    bias: Literal["none", "all", "lora_only"] = "none"
    target_modules: (
        Annotated[
            list[Annotated[Text, Field(min_length=1, max_length=200)]], Field(min_length=1, max_length=_TARGET_LIST_MAX)
        ]
        | Annotated[Text, Field(min_length=1, max_length=500)]
    ) = ["q_proj", "k_proj", "v_proj", "o_proj"]

    @field_validator("target_modules")
    @classmethod
    def _is_a_pattern(cls, value: list[str] | str) -> list[str] | str:
        # Compiled again where the adapter is attached, on a GPU worker: too late to say that it is broken.
        try:
            return value if isinstance(value, list) else re.compile(value).pattern
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"is not a regular expression ({error}); a list of names needs none") from error


class Quantization(Strict):
    """How the frozen base is held: bitsandbytes' names."""

    load_in_4bit: bool = True
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    bnb_4bit_use_double_quant: bool = True
