"""The adapter, and how the frozen base under it is held: the names of peft and bitsandbytes."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from common.schemas.values import Strict, Text

_LIST_MAX = 256

ModuleNames = Annotated[
    list[Annotated[Text, Field(min_length=1, max_length=200)]], Field(min_length=1, max_length=_LIST_MAX)
]
# What peft can begin with from the base's weights alone. Its other ways need data or settings of their own.
Init = bool | Literal["gaussian", "orthogonal", "olora", "pissa"]
PissaIterations = Annotated[str, Field(pattern=r"^pissa_niter_[1-9][0-9]?$")]


class Lora(Strict):
    """The adapter. `target_modules` is a list of module names, a regular expression, or `all-linear`.

    `modules_to_save` names modules that are trained as a whole and stored with the adapter.
    """

    r: Annotated[int, Field(ge=1, le=1024)] = 16
    lora_alpha: Annotated[float, Field(gt=0, le=65536)] = 32.0
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    bias: Literal["none", "all", "lora_only"] = "none"
    target_modules: ModuleNames | Annotated[Text, Field(min_length=1, max_length=500)] = [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    ]
    modules_to_save: ModuleNames | None = None
    use_dora: bool = False
    use_rslora: bool = False
    init_lora_weights: Init | PissaIterations = True

    @field_validator("target_modules")
    @classmethod
    def _is_a_pattern(cls, value: list[str] | str) -> list[str] | str:
        # Compiled again where the adapter is attached, on a GPU worker: too late to say that it is broken.
        try:
            return value if isinstance(value, list) else re.compile(value).pattern
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"is not a regular expression ({error}); a list of names needs none") from error

    @model_validator(mode="after")
    def _fit_together(self) -> Lora:
        if self.init_lora_weights == "orthogonal" and self.r % 2:
            raise ValueError('init_lora_weights: "orthogonal" needs an even r')
        if self.changes_base and self.use_dora:
            asked = f'init_lora_weights: "{self.init_lora_weights}"'
            raise ValueError(f"{asked} changes the base that use_dora measures; use one of them")
        return self

    @property
    def changes_base(self) -> bool:
        """Whether the adapter begins with a part of the base's weights, which are taken out of the base."""
        return str(self.init_lora_weights).startswith(("olora", "pissa"))


class Quantization(Strict):
    """How the frozen base is held: bitsandbytes' names.

    `prepare_kbit_training` is peft's preparation: norms, embeddings and head in fp32. `device_map` "auto" lets layers
    that the card has no room for wait in host memory.
    """

    load_in_4bit: bool = True
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    bnb_4bit_use_double_quant: bool = True
    prepare_kbit_training: bool = False
    device_map: Literal["single", "auto"] = "single"

    @model_validator(mode="after")
    def _fit_a_4_bit_base(self) -> Quantization:
        for name, asked in (
            ("prepare_kbit_training", self.prepare_kbit_training),
            ("device_map", self.device_map == "auto"),
        ):
            if asked and not self.load_in_4bit:
                raise ValueError(f"{name}: is for a base in 4 bit; leave it out, or set load_in_4bit")
        return self
