"""The one value that a run's stages hand on to each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.schemas.jobs import JobSpec
from common.schemas.precision import PrecisionRead
from worker.data.limits import Limits
from worker.data.source import Source
from worker.ml.checkpoint import BEST_WEIGHTS
from worker.trainer.holding import Holder
from worker.trainer.lifeline import Wishes
from worker.trainer.protocol import Message, Note, TrainSpec

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from common.memory.fitting import BatchPlan
    from worker.ml.adapters import Factors
    from worker.ml.best import Best
    from worker.ml.checkpoint import Manifest
    from worker.ml.kernels.fused import Fused
    from worker.ml.meter import Counters
    from worker.ml.options import Choice, Options
    from worker.ml.precision import Precision
    from worker.ml.prompts import Prompt
    from worker.ml.sft import Trainer
    from worker.ml.trend import Trend


@dataclass
class Run:
    """One attempt at a job. The fields below `holder` are filled by the stages, in order."""

    folder: Path
    spec: TrainSpec
    job: JobSpec
    send: Callable[[Message], None]
    wishes: Wishes
    limits: Limits = field(default_factory=Limits)
    holder: Holder = field(default_factory=Holder)
    report: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)

    device: torch.device = field(init=False)
    threads: int = field(init=False)
    tokenizer: PreTrainedTokenizerBase = field(init=False)
    plan: BatchPlan | None = field(init=False, default=None)
    options: Options = field(init=False)
    optim: str = field(init=False)
    precision: Precision = field(init=False)
    train_rows: Dataset = field(init=False)
    highest_token: int = field(init=False)
    eval_rows: Dataset | None = field(init=False, default=None)
    prompts: list[Prompt] = field(init=False, default_factory=list)
    model: PeftModel | PreTrainedModel = field(init=False)
    initial: Factors | None = field(init=False, default=None)
    fused: Fused | None = field(init=False, default=None)
    held: PrecisionRead = field(init=False)
    resumed: Manifest | None = field(init=False, default=None)
    counters: Counters = field(init=False)
    best: Best = field(init=False)
    trend: Trend = field(init=False)
    trainer: Trainer = field(init=False)

    @property
    def base_folder(self) -> Path:
        """The folder of the base model."""
        return Path(self.spec.base.path)

    @property
    def checkpoints(self) -> Path:
        """The folder that sealed checkpoints are renamed into."""
        return self.folder / "checkpoints"

    @property
    def out(self) -> Path:
        """The folder of what is published: adapter or model, and reports."""
        return self.folder / "out"

    @property
    def best_weights(self) -> Path:
        """The file of the weights of the best evaluation, where these are kept."""
        return self.folder / BEST_WEIGHTS

    def stopped_early(self) -> bool:
        """Return whether the validation loss has not improved for as long as was asked."""
        return 0 < self.options.patience <= self.best.waited

    def source(self, name: str, param: str) -> Source:
        """Return the dataset file `name` of the run's folder; `param` is the field of the job that named it."""
        return Source(self.folder / name, self.limits, param)

    def tell(self, *choices: Choice) -> None:
        """Send choices as events."""
        for choice in choices:
            self.send(Note(choice.name, choice.message, choice.level, choice.data))
