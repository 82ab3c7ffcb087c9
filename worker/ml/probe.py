"""Tries out, within seconds, the programs that come with a job: a base's configuration and template, a user's pattern.

Each runs again on a GPU worker. What would hang, fill the memory or break there is found here.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from jinja2.exceptions import SecurityError, TemplateSyntaxError
from transformers import AutoConfig, PreTrainedTokenizerBase

from common.errors import InvalidInput
from worker.ml.base_files import bad

LIMIT_S = 5.0
_TEMPLATE_CHARS = 1 << 20
_TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
_LAYER = "model.layers.31.self_attn"
_MODULES = (
    *(f"{_LAYER}.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    "model.layers.31.mlp.gate_proj",
    "model.layers.31.mlp.down_proj",
    "transformer.h.31.attn.c_attn",
    "gpt_neox.layers.31.attention.query_key_value",
    "model.embed_tokens",
    "model.norm",
    "lm_head",
)


class _TooLong(BaseException):
    # Not an Exception: what is tried may catch those.
    pass


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise _TooLong in the block after `seconds`. Only the main thread can be interrupted; others are not timed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def probe_config(folder: Path) -> None:
    """Raise InvalidInput unless transformers reads the configuration of the base in `folder`."""
    try:
        with time_limit(LIMIT_S):
            AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except _TooLong:
        raise bad("its config.json takes too long to be read") from None
    except Exception as error:  # the library raises whatever its checks raise
        raise bad(f"its config.json is refused by transformers: {_line(error)}") from error


def probe_template(tokenizer: PreTrainedTokenizerBase, limit_s: float = LIMIT_S, *, asked: bool = False) -> None:
    """Raise InvalidInput if the chat template cannot be run at all: whether it likes a conversation, its rows tell.

    Args:
        asked: it came with the job, not with the base.
    """
    refuse = _bad_template if asked else lambda reason: bad(f"its chat template {reason}")
    if len(str(tokenizer.chat_template)) > _TEMPLATE_CHARS:
        raise refuse(f"is longer than {_TEMPLATE_CHARS:,} characters")
    try:
        with time_limit(limit_s):
            text = str(tokenizer.apply_chat_template(_TURNS, tokenize=False))
    except _TooLong:
        raise refuse(f"does not end within {limit_s:.0f} s on two short turns") from None
    except (SecurityError, TemplateSyntaxError, MemoryError, ArithmeticError, RecursionError) as error:
        raise refuse(f"cannot be run: {type(error).__name__} {_line(error)}") from error
    except Exception:  # e.g. it wants a system turn first
        return
    if len(text) > _TEMPLATE_CHARS:
        raise refuse(f"makes {len(text):,} characters of two short turns")


def _bad_template(reason: str) -> InvalidInput:
    return InvalidInput(
        f"chat_template: it {reason}",
        code="bad_chat_template",
        param="chat_template",
        hint="write a Jinja template over messages and add_generation_prompt, as tokenizer_config.json has them",
    )


def probe_targets(targets: list[str] | str, limit_s: float = LIMIT_S) -> None:
    """Raise InvalidInput if a pattern of module names takes too long on such names (nested repetition does)."""
    if isinstance(targets, list):
        return
    try:
        with time_limit(limit_s):
            for name in _MODULES:
                re.fullmatch(targets, name)
    except _TooLong:
        raise InvalidInput(
            "lora.target_modules: the regular expression takes too long on the name of a module",
            param="lora.target_modules",
            hint="repeat no group that repeats something itself, or list the names",
        ) from None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]
