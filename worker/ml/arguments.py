"""Says a job's options in the words of the installed TRL and transformers, which rename theirs from time to time."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from trl import SFTConfig

from worker.ml.options import Choice, Options
from worker.ml.precision import Precision

# A CPU has nothing to page to, and bitsandbytes' 8-bit step is some fifty times slower there than torch's fused one
# (measured: 0.5 s against 0.01 s for 2.2 M parameters on two cores), while the state that it saves is of no weight.
_ON_CPU = {
    "paged_adamw_8bit": "adamw_torch_fused",
    "paged_adamw_32bit": "adamw_torch_fused",
    "paged_lion_8bit": "lion_32bit",
}


def choose_optimizer(name: str, device: torch.device) -> tuple[str, tuple[Choice, ...]]:
    """Return the optimizer to use on `device`, with a choice noted where it is not the one asked for."""
    if device.type == "cuda" or name not in _ON_CPU:
        return name, ()
    taken = _ON_CPU[name]
    message = f"optim {name} → {taken}: paged optimizer state exists on CUDA only; on the CPU it is kept in 32 bit"
    return taken, (Choice("option.replaced", message, {"asked": name, "taken": taken}),)


def sft_config(
    options: Options,
    precision: Precision,
    device: torch.device,
    *,
    optim: str,
    folder: Path,
    seed: int,
    evaluated: bool,
    fused: bool = False,
) -> SFTConfig:
    """Return the trainer's arguments. Checkpoints go to `folder`; `evaluated`: there are validation rows.

    Args:
        fused: the rows of a step come in one batch, which is cut, and whose layers recompute, as memory requires.
    """
    return SFTConfig(
        output_dir=str(folder),
        num_train_epochs=options.num_train_epochs,
        max_steps=options.max_steps,
        learning_rate=options.learning_rate,
        per_device_train_batch_size=options.micro_batch * (options.accumulation if fused else 1),
        per_device_eval_batch_size=options.micro_batch,
        gradient_accumulation_steps=1 if fused else options.accumulation,
        max_length=options.max_length,
        packing=options.packing is not None,
        packing_strategy=options.packing or "bfd",
        eval_packing=False,
        # The rows come tokenised, labelled, cut and packed; the library's own preparation would only copy them.
        dataset_kwargs={"skip_prepare_dataset": True},
        warmup_steps=options.warmup,
        lr_scheduler_type=options.lr_scheduler_type,
        # transformers ends it at 1e-7, and refuses a learning_rate that is no more.
        lr_scheduler_kwargs={"lr_end": 0.0} if options.lr_scheduler_type == "polynomial" else None,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        optim=optim,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        adam_epsilon=options.adam_epsilon,
        neftune_noise_alpha=options.neftune_noise_alpha or None,
        save_strategy="steps",
        save_steps=options.save_steps,
        eval_strategy="steps" if evaluated else "no",
        eval_steps=options.eval_steps if evaluated else None,
        logging_strategy="steps",
        logging_steps=options.logging_steps,
        logging_first_step=True,
        # A loss that is not a number has to be seen, not averaged away.
        logging_nan_inf_filter=False,
        seed=seed,
        data_seed=seed,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        # Otherwise each batch waits until the card has done all that came before.
        accelerator_config={"non_blocking": device.type == "cuda"},
        disable_tqdm=True,
        report_to="none",
        bf16=precision.compute == torch.bfloat16,
        fp16=precision.compute == torch.float16,
        **_checkpointing(0 if fused else options.checkpointing),
    )


def _checkpointing(every: int) -> dict[str, Any]:
    # transformers 5.18 and later call it activation checkpointing, and warn about the old name.
    names = {item.name for item in fields(SFTConfig)}
    name = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    return {name: bool(every), f"{name}_kwargs": {"every_n_layers": every} if every > 1 else None}
