"""Which chat template a job's conversations are written in: the request's, the base's own, or a plain one."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from worker.ml.options import Choice
from worker.ml.tokenizer import ensure_chat_template


def choose_template(tokenizer: PreTrainedTokenizerBase, asked: str | None) -> tuple[Choice, ...]:
    """Give `tokenizer` the template `asked`, or a plain one where it has none; returns a choice unless it has its own.

    The tokenizer is saved with the adapter, so that the template is too.
    """
    if asked is not None:
        tokenizer.chat_template = asked
        return (Choice("template.replaced", "conversations are written in the request's chat_template"),)
    if not ensure_chat_template(tokenizer):
        return ()
    message = "the base model has no chat template: conversations are written in a plain one, saved with the adapter"
    return (Choice("template.defaulted", message),)
