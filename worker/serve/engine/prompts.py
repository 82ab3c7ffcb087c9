"""Messages to tokens, by the chat template that an adapter was trained with, or by the base's own."""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import PreTrainedTokenizerBase

from common.errors import InvalidInput, TooLarge
from worker.ml.tokenizer import ensure_chat_template, load_tokenizer

# A template is a program, and not the operator's: one that runs in circles must not keep the others waiting, and one
# that multiplies texts must not take their memory.
_RENDER_CPU_S = 5.0
_RENDER_BYTES = 1 << 30
_TEXT_CHARS = 16 << 20


class Prompts:
    """The base's tokenizer, and the chat template of each adapter where it has one of its own.

    `rows` are those of the base's embedding, `context` are its tokens; None where they are not known.
    """

    def __init__(self, base: Path, rows: int | None, context: int | None = None):
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(base, rows)
        ensure_chat_template(self.tokenizer)
        # No more can fit, and to count the tokens of megabytes would keep everybody waiting.
        longest = max(map(len, self.tokenizer.get_vocab()))
        self._most_chars = _TEXT_CHARS if context is None else min(_TEXT_CHARS, context * longest)
        self._rows = rows
        self._templates: dict[str | None, str] = {None: str(self.tokenizer.chat_template)}

    def learn(self, name: str, folder: Path) -> None:
        """Take the chat template that lies with an adapter."""
        self._templates[name] = _template(folder) or self._templates[None]

    def forget(self, name: str) -> None:
        """Drop the template of an adapter."""
        self._templates.pop(name, None)

    def encode(self, name: str | None, messages: list[dict[str, str]]) -> list[int]:
        """Return the tokens of a conversation, up to where the answer begins.

        Raises:
            InvalidInput: the template does not take this conversation.
            TooLarge: it makes absurdly much of it.
        """
        template = self._templates[name]
        turns = [_known_role(message, template) for message in messages]
        options: dict[str, Any] = {"chat_template": template, "add_generation_prompt": True, "tokenize": False}
        try:
            with _bounded(_RENDER_CPU_S, _RENDER_BYTES):
                text = str(self.tokenizer.apply_chat_template(turns, **options))
                text.encode()  # raises for a lone surrogate, of which no tokenizer can make anything
        except Exception as error:  # a template raises what it likes
            said = str(error)[:500].encode(errors="replace").decode()
            raise InvalidInput(
                f"messages: the model's chat template refuses this conversation: {said}",
                code="bad_messages",
                param="messages",
                hint="Mind the order of roles, and whether the model knows a system role.",
            ) from error
        if len(text) > self._most_chars:
            raise TooLarge(
                f"messages: the chat template makes {len(text):,} characters of them, far more than its context",
                code="context_length_exceeded",
                param="messages",
                hint="Shorten the messages.",
            )
        # The template writes the special tokens itself.
        found: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        self._check(found)
        return found

    def _check(self, found: list[int]) -> None:
        # Either would end the model over everybody's answers.
        if not found:
            why = "the model's chat template makes nothing of them"
        elif self._rows is not None and max(found) >= self._rows:
            token = self.tokenizer.convert_ids_to_tokens(max(found))
            why = f"they contain {token}, which the tokenizer knows and the model does not"
        else:
            return
        raise InvalidInput(f"messages: {why}", code="bad_messages", param="messages")


def _template(folder: Path) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text()
    try:
        found = json.loads((folder / "tokenizer_config.json").read_text()).get("chat_template")
    except FileNotFoundError:
        return None
    return found if isinstance(found, str) else None


def _known_role(message: Mapping[str, str], template: str) -> dict[str, str]:
    # OpenAI's newer word for the system; few templates know it.
    if message["role"] == "developer" and "developer" not in template:
        return {**message, "role": "system"}
    return dict(message)


@contextmanager
def _bounded(cpu_s: float, num_bytes: int) -> Iterator[None]:
    """Raise TimeoutError in the block after so many seconds of this process's time, MemoryError beyond so many bytes.

    For the main thread.
    """

    def late(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"it takes longer than {cpu_s:.0f} s")

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, cpu_s)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_addresses() + num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _addresses() -> int:
    """Return the size of this process's address space, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
