"""Loads the base: 4-bit NF4 for QLoRA, 16 bit for LoRA, both frozen; 32 bit to train every weight.

Safetensors only, and no code but the library's own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import prepare_model_for_kbit_training
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from common.errors import InvalidInput
from common.memory.fitting import WEIGHTS_SHARE, read_wish
from common.schemas.jobs import JobSpec
from common.schemas.lora import Quantization
from common.schemas.precision import MemoryFootprint
from worker.ml.base_check import BaseFacts
from worker.ml.memory import is_fault_of_device
from worker.ml.offload import Plan, decoder_layers, plan_offload, quantize_onto, room_for_weights
from worker.ml.options import Choice
from worker.ml.precision import Precision
from worker.ml.quantized import Form, Shelf
from worker.ml.towers import auto_class, empty_model, freeze, model_class, outside_text


@dataclass(frozen=True)
class Base:
    """The loaded base.

    `unquantized` names the weight matrices that stayed in 16 bit, with their parameters; `outside` the modules that no
    text passes through: a vision tower. `plan`: which layers wait in host memory, if any. `form`: that of a cache of
    4-bit bases, where one was asked.
    """

    model: PreTrainedModel
    unquantized: dict[str, int]
    outside: list[str]
    plan: Plan | None
    footprint: MemoryFootprint
    choices: tuple[Choice, ...]
    form: Form | None = None


def load_base(
    folder: Path,
    job: JobSpec,
    facts: BaseFacts,
    precision: Precision,
    device: torch.device,
    shelf: Shelf | None = None,
) -> Base:
    """Return the base of `folder` on `device`, frozen unless its own weights are what is trained.

    Args:
        shelf: where its 4-bit form may lie already. A base that is stored in 4 bit, one whose layers wait in host
            memory, and one in 16 bit have none.

    Raises:
        InvalidInput: the method and the base do not fit together, or the weights do not fit the configuration.
    """
    if facts.quantized and job.method != "qlora":
        raise InvalidInput(
            f'method "{job.method}" needs the 16-bit weights of the base, but this one is stored in 4 bit',
            code="bad_base_model",
            param="method",
            hint='use method "qlora", or the 16-bit version of the model',
        )
    with _bad_weights():
        empty = empty_model(AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
        outside = outside_text(empty)
        # A checkpoint that is stored in 4 bit brings its own settings.
        fresh = job.method == "qlora" and not facts.quantized
        left_out = _left_out(empty, outside)
        config = nf4_config(job.quantization, precision, left_out) if fresh else None
        plan = _plan(job, empty, left_out, device)
        form = None
        if plan is None and config is not None and shelf is not None:
            form = shelf.form(config, precision.base, device)
            model = _load_form(form, folder, empty.config, config, precision, device)
        elif plan is None:
            model = _load(folder, empty.config, precision.base, device, config)
        else:
            model = _load(folder, empty.config, precision.base, torch.device("cpu"), None)
            quantize_onto(model, config or model.config.quantization_config, left_out, device, plan)
    model.requires_grad_(job.method == "full")
    freeze(model, outside)
    model.config.get_text_config().use_cache = False
    keep_training_layout(model)
    unquantized = left_in_16_bit(model, outside) if job.method == "qlora" else {}
    lean = model.get_memory_footprint()
    if job.quantization is not None and job.quantization.prepare_kbit_training:
        # Without checkpointing, which the trainer turns on where it is asked for.
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    held = model.get_memory_footprint()
    footprint = MemoryFootprint(
        before_bytes=empty.get_memory_footprint(), after_bytes=held, kbit_preparation_bytes=held - lean
    )
    choices = _choices(job, model, unquantized, footprint)
    if plan is not None:
        choices += (plan.choice(len(decoder_layers(model))),)
    return Base(model, unquantized, outside, plan, footprint, choices, form)


def nf4_config(
    quantization: Quantization | None, precision: Precision, left_out: list[str] | None = None
) -> BitsAndBytesConfig:
    """Return bitsandbytes' settings for `quantization`, computing in `precision`.

    Args:
        left_out: modules to hold in 16 bit; otherwise the library chooses the head.
    """
    asked = quantization or Quantization()
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=asked.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=asked.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=precision.compute,
        llm_int8_skip_modules=left_out,
    )


def four_bit_config(folder: Path, quantization: Quantization | None, precision: Precision) -> BitsAndBytesConfig:
    """Return the settings by which training holds the base of `folder` in 4 bit."""
    empty = empty_model(AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
    return nf4_config(quantization, precision, _left_out(empty, outside_text(empty)))


def load_weights(
    folder: Path, dtype: torch.dtype | str, device: torch.device, config: BitsAndBytesConfig | None = None
) -> PreTrainedModel:
    """Return the model of `folder` on `device`, in `dtype` ("auto": as it is stored), in 4 bit if `config` says so.

    Raises:
        InvalidInput: the weights do not fit the configuration.
    """
    with _bad_weights():
        known = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return _load(folder, known, dtype, device, config)


@contextmanager
def _bad_weights() -> Iterator[None]:
    try:
        yield
    except (ValueError, RuntimeError, KeyError) as error:
        if is_fault_of_device(error):
            raise
        raise InvalidInput(
            f"base model: its weights cannot be loaded: {error}",
            code="bad_base_model",
            param="model",
            hint="use an unaltered copy of the model",
        ) from error


def _load(
    folder: Path,
    known: PreTrainedConfig,
    dtype: torch.dtype | str,
    device: torch.device,
    quantization: BitsAndBytesConfig | None,
    **options: Any,
) -> PreTrainedModel:
    if quantization is not None:
        options["quantization_config"] = quantization
    # Named here, so that nothing in the folder chooses it; some older architectures have the eager form only.
    fused = getattr(model_class(known), "_supports_sdpa", False)
    return auto_class(known).from_pretrained(
        folder,
        dtype=dtype,
        device_map={"": str(device)},
        attn_implementation="sdpa" if fused else "eager",
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        **options,
    )


def _load_form(
    form: Form,
    folder: Path,
    known: PreTrainedConfig,
    config: BitsAndBytesConfig,
    precision: Precision,
    device: torch.device,
) -> PreTrainedModel:
    def read(entry: Path) -> PreTrainedModel:
        # As the configuration of a checkpoint in 4 bit says it; the entry's own is not read.
        stored = copy.deepcopy(known)
        stored.quantization_config = config.to_dict()
        model = _load(entry, stored, precision.base, device, None, config=stored)
        model.config.name_or_path = model.name_or_path = str(folder)
        return model

    return form.load(read, lambda: _load(folder, known, precision.base, device, config))


def _plan(job: JobSpec, empty: PreTrainedModel, left_out: list[str] | None, device: torch.device) -> Plan | None:
    room = room_for_weights(device)
    if room is None or job.quantization is None or job.quantization.device_map != "auto":
        return None
    most = read_wish(job.hyperparameters).most_bytes
    room = room if most is None else min(room, int(most * WEIGHTS_SHARE))
    return plan_offload(empty, job.quantization, left_out, room)


def _left_out(model: PreTrainedModel, outside: list[str]) -> list[str] | None:
    # A list of one's own replaces the library's, which has the head.
    if not outside:
        return None
    head = model.get_output_embeddings()
    return [*outside, *(name for name, module in model.named_modules() if module is head)]


def keep_training_layout(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit layers for inference.

    bitsandbytes 0.50 on CPUs with AVX512-BF16: one forward in eval mode without gradients repacks every layer, after
    which the next training step leaves all adapter gradients None, with a warning only.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def left_in_16_bit(model: torch.nn.Module, outside: list[str]) -> dict[str, int]:
    """Return the weight matrices that are not 4-bit, by name: embeddings, head, fused experts; none of `outside`."""
    return {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2
        and getattr(parameter, "quant_state", None) is None
        and not name.startswith(tuple(f"{other}." for other in outside))
    }


def _choices(
    job: JobSpec, model: torch.nn.Module, unquantized: dict[str, int], footprint: MemoryFootprint
) -> tuple[Choice, ...]:
    if job.method != "qlora":
        return ()
    states = [getattr(parameter, "quant_state", None) for parameter in model.parameters()]
    quantized = sum(torch.Size(state.shape).numel() for state in states if state is not None)
    left = sum(unquantized.values())
    names = ", ".join(list(unquantized)[:6]) + (" …" if len(unquantized) > 6 else "")
    message = (
        f"{quantized:,} weights in 4 bit; {left:,} stay in 16 bit ({names or 'none'}); "
        f"{_gigabytes(footprint.before_bytes)} → {_gigabytes(footprint.after_bytes)}"
    )
    data = {"quantized": quantized, "left": left, "names": list(unquantized)[:32], **footprint.model_dump()}
    choices = [Choice("base.quantized", message, data)]
    if job.quantization is not None and job.quantization.prepare_kbit_training:
        cost = footprint.kbit_preparation_bytes
        message = f"prepare_kbit_training: norms, embeddings and head in fp32 take {_gigabytes(cost)} more"
        choices.append(Choice("base.prepared", message, {"bytes": cost}))
    return tuple(choices)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"
