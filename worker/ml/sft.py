"""SFTTrainer with the few things that it does not do: count real tokens, order rows by seed, resume without a trace."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from worker.ml.kernels.fused import Fused
from worker.ml.kernels.layer import Recompute
from worker.ml.kernels.rows import FlatRows
from worker.ml.meter import Meter
from worker.ml.order import EpochOrder
from worker.ml.render import NO_LOSS
from worker.ml.score import Score

# What TRL takes the mean of, batch by batch.
_TRL_MEANS = ("mean_token_accuracy", "entropy")


class Trainer(SFTTrainer):
    """The trainer of a job. `order` decides the rows of each epoch; `fused` is the fast path, where it is taken."""

    def __init__(self, *args: Any, order: EpochOrder, fused: Fused | None = None, **kwargs: Any):
        self._order = order
        self._fused = fused
        self.meter = Meter()
        self._score = Score()
        super().__init__(*args, **kwargs)

    def checkpointed_layers(self) -> int:
        """Return the number of layers that recompute their activations in every step."""
        if self._fused is not None:
            return sum(way == Recompute.ALL for way in self._fused.least)
        assert self.model is not None
        modules = (item for item in self.model.modules() if isinstance(item, GradientCheckpointingLayer))
        return sum(bool(module.gradient_checkpointing) for module in modules)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the batches of an epoch; on the fast path each is the rows of a step, end to end."""
        if self._fused is None:
            return super().get_train_dataloader()
        padded, self.data_collator = self.data_collator, FlatRows()
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = padded

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochOrder:
        return self._order

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run one batch forward and backward, and count it. The fast path cuts it into micro-batches."""
        if self._fused is None:
            loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
            labels, mask = inputs["labels"], inputs.get("attention_mask")
            tokens = labels.numel() if mask is None else mask.sum()
            self.meter.add(loss, tokens, (labels[:, 1:] != NO_LOSS).sum())
            return loss
        losses = []
        for index, (micro, ways) in enumerate(self._fused.micro_batches(self._prepare_inputs(inputs))):
            part = {"micro": micro, "ways": ways, "index": index}
            losses.append(super().training_step(model, part, *args, **kwargs))
            self.meter.add(losses[-1], micro.num_tokens, len(micro.targets))
        return torch.stack(losses).sum()

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the mean loss of a batch: per trained token of the whole step, in training."""
        if self._fused is None or "micro" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        micro = inputs["micro"]
        # Of the step and the micro-batch alone, so that a resumed run drops what the one before would have.
        seed = Random(f"{self.args.seed}/{self.state.global_step}/{inputs['index']}").getrandbits(31)
        found = self._fused.loss(micro, inputs["ways"], seed)
        # The names, and the means of micro-batches, of TRL; on the device until they are logged.
        count = max(1, len(micro.targets))
        self._metrics["train"]["entropy"].append(found.entropy / count)
        self._metrics["train"]["mean_token_accuracy"].append(found.right / count)
        self._total_train_tokens += micro.num_tokens
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        items = count if num_items_in_batch is None else torch.as_tensor(num_items_in_batch).clamp(min=1)
        return found.loss / items

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the means since the last entry."""
        for values in self._metrics["train"].values():
            values[:] = [float(value) for value in values]
        super().log(logs, *args, **kwargs)

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[Any, Any, Any]:
        """Evaluate one batch, and count it."""
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        seen = self._metrics["eval"]
        means = {name: seen[name][-1] for name in _TRL_MEANS if seen[name]}
        self._score.add(int((inputs["labels"][:, 1:] != NO_LOSS).sum()), {"loss": float(loss), **means})
        return loss, logits, labels

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate, and report means per trained token."""
        self._score = Score()
        output = super().evaluation_loop(*args, **kwargs)
        means = self._score.means()
        assert output.metrics is not None
        output.metrics["eval_loss"] = means.pop("loss")
        for name, mean in means.items():
            self._metrics["eval"][name] = [mean]
        return output

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        # peft 0.21 loads adapters as fp32. The dtype must be back before the optimizer's state is loaded, because
        # torch casts that to the dtype of the weights.
        dtypes = {name: item.dtype for name, item in self._named_parameters() if item.requires_grad}
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for name, parameter in self._named_parameters():
            if name in dtypes:
                parameter.data = parameter.data.to(dtypes[name])

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # The library would store a copy of the tokenizer, and all of an embedding that carries an adapter.
        if isinstance(self.model, PeftModel):
            self.model.save_pretrained(str(output_dir), state_dict=state_dict, save_embedding_layers=False)
        else:
            assert isinstance(self.model, PreTrainedModel)
            # One file: the library's resume reads no index.
            self.model.save_pretrained(str(output_dir), state_dict=state_dict, max_shard_size="10TB")

    def _named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        assert self.model is not None
        return self.model.named_parameters()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: the export writes the card, and TRL would write one into every checkpoint."""

    def load_weights(self, checkpoint: Path) -> None:
        """Take the weights of a sealed checkpoint, without training on."""
        self._load_from_checkpoint(str(checkpoint))
