"""A checkpoint and an evaluation at the end of each epoch, where the job leaves their steps to the worker."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from common.schemas.hyperparameters import Hyperparameters

# A small file that is read a thousand times would leave a thousand checkpoints.
_EPOCHS_MAX = 50


class EpochEnds(TrainerCallback):
    """Asks for what the steps do not bring anyway. `evaluated`: there are validation rows."""

    def __init__(self, asked: Hyperparameters, evaluated: bool):
        self._save = asked.save_steps == "auto"
        self._evaluate = asked.eval_steps == "auto" and evaluated
        self._saved_at = self._evaluated_at = -1

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remember the step of a checkpoint."""
        self._saved_at = state.global_step

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remember the step of an evaluation."""
        self._evaluated_at = state.global_step

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for a checkpoint and an evaluation, unless this step has them or the run was stopped within the epoch."""
        if state.num_train_epochs <= _EPOCHS_MAX and not control.should_training_stop:
            control.should_save |= self._save and self._saved_at != state.global_step
            control.should_evaluate |= self._evaluate and self._evaluated_at != state.global_step
