"""Answers to a few fixed prompts at each checkpoint: an event each time, and all of them in a report."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from worker.ml.sample import answer
from worker.ml.sft import Trainer
from worker.trainer.protocol import Note
from worker.trainer.run import Run

# Each checkpoint carries those before it.
_KEPT = 500
_SHOWN_CHARS = 500


class Sampler(TrainerCallback):
    """One run's callback; called before the checkpoint is sealed, so that the answers are sealed with it."""

    def __init__(self, run: Run, trainer: Trainer):
        self._run = run
        self._trainer = trainer

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask the model of this step, unless there is no time: a run that has to leave asks nothing."""
        run, answers = self._run, []
        for prompt in run.prompts:
            if run.wishes.reason():
                return
            with self._trainer.accelerator.autocast():
                answers.append(answer(run.model, run.tokenizer, prompt))
        if not answers:
            return
        run.samples.append({"step": state.global_step, "answers": answers})
        del run.samples[:-_KEPT]
        shown = [
            {"prompt": prompt.text[:_SHOWN_CHARS], "answer": text[:_SHOWN_CHARS]}
            for prompt, text in zip(run.prompts, answers, strict=True)
        ]
        message = f"answers to {len(shown)} prompts at step {state.global_step}"
        run.send(Note("samples.taken", message, data={"step": state.global_step, "samples": shown}))


def sample_report(run: Run) -> list[dict[str, Any]]:
    """Return every answer of the run with its step, its prompt, and what the validation row says."""
    return [
        {"step": taken["step"], "prompt": prompt.text, "answer": text}
        | ({} if prompt.expected is None else {"expected": prompt.expected})
        for taken in run.samples
        for prompt, text in zip(run.prompts, taken["answers"], strict=True)
    ]
