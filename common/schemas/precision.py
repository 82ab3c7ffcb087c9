"""How each module of a trained model was held: shared by trainer, API and client."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Holding = Literal["quantized", "trained", "frozen", "not_quantizable"]


class ModulePrecision(BaseModel):
    """A module that has weights of its own. `dtype` and `bits` are those of its largest weight.

    `parameters` counts 4-bit weights unpacked. `trained` of them are trained: a quantised layer may have a trained
    bias. `not_quantizable` is a weight matrix that stayed in 16 bit though the base is held in 4. A weight that two
    modules share (embedding and head) is listed with both.
    """

    model_config = ConfigDict(populate_by_name=True)

    name: str
    kind: str = Field(alias="class")
    dtype: str
    bits: int
    parameters: int
    trained: int
    status: Holding


class MemoryFootprint(BaseModel):
    """The bytes of the base's weights in 16 bit, and as they were held: transformers' `get_memory_footprint`.

    `kbit_preparation_bytes` of the second are what `prepare_kbit_training` cost.
    """

    before_bytes: int
    after_bytes: int
    kbit_preparation_bytes: int = 0


class PrecisionRead(BaseModel):
    """What `reports/precision.json` says: sums by format, and every module. 4-bit weights count unpacked."""

    compute_dtype: str
    adapter_dtype: str
    parameters: dict[str, int]
    bytes: dict[str, int]
    left_in_16_bit: dict[str, int] = {}
    memory_footprint: MemoryFootprint | None = None
    modules: list[ModulePrecision] = []
