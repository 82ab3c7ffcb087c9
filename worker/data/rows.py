"""The one form that every dataset row takes before it is tokenised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

ROLES = ("system", "developer", "user", "assistant", "tool")
Kind = Literal["chat", "completion", "text"]


@dataclass(frozen=True)
class Message:
    """One turn. `extra` holds what chat templates read besides: tool_calls, name, tool_call_id, reasoning_content."""

    role: str
    content: str
    extra: tuple[tuple[str, Any], ...] = ()
    trained: bool = True

    def as_dict(self) -> dict[str, Any]:
        """Return the form that chat templates read."""
        return {"role": self.role, "content": self.content, **dict(self.extra)}


@dataclass(frozen=True)
class Row:
    """One example; `number` counts from 1 in its file.

    chat: `messages`; the loss is on the assistant's turns.
    completion: `prompt` and `completion`, or `messages` of which the first `num_prompt` are the prompt.
    text: `text`; the loss is on all of it.
    """

    number: int
    kind: Kind
    messages: tuple[Message, ...] = ()
    num_prompt: int = 0
    prompt: str = ""
    completion: str = ""
    text: str = ""
    tools: tuple[Any, ...] = ()
