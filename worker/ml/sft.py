"""SFTTrainer with the few things that it does not do: count real tokens, order rows by seed, resume without a trace."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from worker.ml.order import EpochOrder
from worker.ml.render import NO_LOSS
from worker.ml.score import Score

# What TRL takes the mean of, batch by batch.
_TRL_MEANS = ("mean_token_accuracy", "entropy")


@dataclass(frozen=True)
class StepFacts:
    """One optimizer step: mean loss per trained token, and the real tokens in it, without padding."""

    loss: float
    tokens: int
    trained_tokens: int


class Meter:
    """Adds up the micro-batches of a step on the device, so that a step costs one transfer."""

    def __init__(self) -> None:
        self._sums: torch.Tensor | None = None

    def add(self, loss: torch.Tensor, inputs: dict[str, torch.Tensor]) -> None:
        """Count one micro-batch; `loss` is its share of the step's mean."""
        labels, mask = inputs["labels"], inputs.get("attention_mask")
        tokens = torch.tensor(labels.numel(), device=loss.device) if mask is None else mask.sum().to(loss.device)
        trained = (labels[:, 1:] != NO_LOSS).sum().to(loss.device)
        sums = torch.stack([loss.detach().double(), tokens.double(), trained.double()])
        self._sums = sums if self._sums is None else self._sums + sums

    def take(self) -> StepFacts:
        """Return the facts of the step that has ended, and begin the next."""
        loss, tokens, trained = self._sums.tolist() if self._sums is not None else (0.0, 0, 0)
        self._sums = None
        return StepFacts(loss, int(tokens), int(trained))


@dataclass
class Counters:
    """Sums over the whole run, kept in its checkpoints. The window is what was not logged yet."""

    tokens: int = 0
    trained_tokens: int = 0
    train_s: float = 0.0
    loss_sum: float = 0.0
    steps: int = 0
    window_loss: float = 0.0
    window_steps: int = 0
    first_loss: float | None = None
    last_loss: float | None = None

    def add(self, facts: StepFacts, seconds: float) -> None:
        """Count one optimizer step."""
        self.tokens += facts.tokens
        self.trained_tokens += facts.trained_tokens
        self.train_s += seconds
        self.loss_sum += facts.loss
        self.steps += 1
        self.window_loss += facts.loss
        self.window_steps += 1
        self.first_loss = facts.loss if self.first_loss is None else self.first_loss
        self.last_loss = facts.loss

    def take_window(self) -> float:
        """Return the mean loss of the steps since the last call."""
        mean = self.window_loss / max(1, self.window_steps)
        self.window_loss, self.window_steps = 0.0, 0
        return mean

    def as_dict(self) -> dict[str, Any]:
        """Return the values as JSON."""
        return asdict(self)


def checkpointed_layers(model: torch.nn.Module) -> int:
    """Return the number of layers that recompute their activations."""
    return sum(
        isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing for module in model.modules()
    )


class Trainer(SFTTrainer):
    """The trainer of a job. `order` decides the rows of each epoch."""

    def __init__(self, *args: Any, order: EpochOrder, **kwargs: Any):
        self._order = order
        self.meter = Meter()
        self._score = Score()
        super().__init__(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochOrder:
        return self._order

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run one micro-batch forward and backward, and count it."""
        loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
        self.meter.add(loss, inputs)
        return loss

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
