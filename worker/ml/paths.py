"""Writes conversations in a chat template without running it for each one, where the text is provably the same.

A template is run once with placeholders for the contents. A placeholder can be written out, joined and trimmed. If the
template asks something of it ("does it contain </think>?"), the real content answers, and question and answer are
noted; any other use ends the attempt. What was written then holds for every conversation with the same roles whose
contents give the same answers to the noted questions, since the template takes the same branches for it.
"""

from __future__ import annotations

import operator
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Environment, nodes
from transformers import PreTrainedTokenizerBase

# A file may have a new shape in each row: what is kept of them, and tried for one, has an end.
_SHAPES = 1 << 10
_PATHS = 8
_TRIES = 16
_KEPT_CHARS = 1 << 24
_QUESTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "startswith": lambda text, part: text.startswith(part),
    "endswith": lambda text, part: text.endswith(part),
    "contains": operator.contains,
    "equals": operator.eq,
    "filled": lambda text, _: bool(text),
    "now": lambda _, form: datetime.now().strftime(form),  # as transformers gives it
}
_TRIMS: dict[str, Callable[[str], str]] = {"": str, "strip": str.strip, "lstrip": str.lstrip, "rstrip": str.rstrip}
# Their results are strings, which would carry a content past its seal.
_CATCHING = (
    nodes.Macro, nodes.AssignBlock, nodes.FilterBlock, nodes.Block, nodes.EvalContextModifier,
    nodes.Include, nodes.Import, nodes.FromImport,
)  # fmt: skip

Roles = tuple[str, ...]
_Hole = tuple[int, str]  # which content, and how it is trimmed


class _Unsealed(Exception):
    """The template did with a content what cannot be followed."""


@dataclass(frozen=True)
class _Question:
    hole: _Hole
    name: str
    operand: Any
    answer: Any

    def holds(self, contents: list[str]) -> bool:
        index, trim = self.hole
        text = _TRIMS[trim](contents[index]) if index >= 0 else ""
        return bool(_QUESTIONS[self.name](text, self.operand) == self.answer)


@dataclass(frozen=True)
class _Path:
    """One way through the template: what must hold of the contents, and the text with its holes."""

    questions: tuple[_Question, ...]
    pieces: tuple[str, ...]
    holes: tuple[tuple[int, int, str], ...]  # index of the piece, index of the content, trim

    @property
    def num_chars(self) -> int:
        return sum(map(len, self.pieces))

    def write(self, contents: list[str]) -> str:
        pieces = list(self.pieces)
        for place, index, trim in self.holes:
            pieces[place] = _TRIMS[trim](contents[index]) if trim else contents[index]
        return "".join(pieces)


@dataclass
class _Trace:
    # One run with sealed contents.
    contents: list[str]
    nonce: str
    questions: dict[tuple[_Hole, str, Any], _Question] = field(default_factory=dict)
    broken: bool = False

    def fail(self) -> NoReturn:
        # Kept besides being raised: some of Jinja's tests take any error for a no.
        self.broken = True
        raise _Unsealed

    def ask(self, hole: _Hole, name: str, operand: Any) -> Any:
        index, trim = hole
        text = _TRIMS[trim](self.contents[index]) if index >= 0 else ""
        answer = _QUESTIONS[name](text, operand)
        self.questions[hole, name, operand] = _Question(hole, name, operand, answer)
        return answer

    def mark(self, hole: _Hole) -> str:
        return f"{self.nonce}{hole[0]}:{hole[1]}{self.nonce}"


class _Sealed:
    """A content, or a text made of some. It is no string: what wants one fails, or comes by here."""

    __slots__ = ("_parts", "_trace")

    def __init__(self, trace: _Trace, parts: tuple[str | _Hole, ...]):
        self._trace = trace
        self._parts = parts

    def _write(self) -> str:
        return "".join(part if isinstance(part, str) else self._trace.mark(part) for part in self._parts)

    def _hole(self) -> _Hole:
        only = self._parts[0]
        return self._trace.fail() if len(self._parts) > 1 or isinstance(only, str) else only

    def _ask(self, name: str, operand: Any = None) -> Any:
        if operand is not None and type(operand) is not str:
            self._trace.fail()
        return self._trace.ask(self._hole(), name, operand)

    def _trimmed(self, how: str, *characters: Any) -> _Sealed:
        index, trim = self._hole()
        if characters not in ((), (None,)) or trim not in ("", how):
            self._trace.fail()
        return _Sealed(self._trace, ((index, how),))

    def _join(self, left: Any, right: Any) -> _Sealed:
        parts = [item._parts if isinstance(item, _Sealed) else (item,) for item in (left, right)]
        if any(type(part) not in (str, tuple) for side in parts for part in side):
            self._trace.fail()
        return _Sealed(self._trace, (*parts[0], *parts[1]))

    def __add__(self, other: Any) -> _Sealed:
        return self._join(self, other)

    def __radd__(self, other: Any) -> _Sealed:
        return self._join(other, self)

    def strip(self, *characters: Any) -> _Sealed:
        return self._trimmed("strip", *characters)

    def lstrip(self, *characters: Any) -> _Sealed:
        return self._trimmed("lstrip", *characters)

    def rstrip(self, *characters: Any) -> _Sealed:
        return self._trimmed("rstrip", *characters)

    def startswith(self, part: Any) -> bool:
        return bool(self._ask("startswith", part))

    def endswith(self, part: Any) -> bool:
        return bool(self._ask("endswith", part))

    def __contains__(self, part: Any) -> bool:
        return bool(self._ask("contains", part))

    def __eq__(self, other: object) -> bool:
        return bool(self._ask("equals", other)) if type(other) is str else self._trace.fail()

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __bool__(self) -> bool:
        return bool(self._ask("filled"))

    def _refuse(self, *_: Any) -> NoReturn:
        self._trace.fail()

    __str__ = __repr__ = __format__ = __getattr__ = __getitem__ = __len__ = __iter__ = __hash__ = _refuse
    __int__ = __float__ = __index__ = _refuse


class ChatWriter:
    """Writes conversations as `tokenizer.apply_chat_template` does."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._nonce = f"\0{secrets.token_hex(8)}\0"
        self._environment = _environment(tokenizer)
        self._template: Any = None
        self._paths: dict[tuple[bool, Roles], list[_Path]] = {}
        self._tries: dict[tuple[bool, Roles], int] = {}
        self._kept_chars = 0

    def write(self, turns: list[dict[str, Any]], tools: list[Any] | None, *, prompt: bool = False) -> str:
        """Return the text of `turns`; `prompt`: with the beginning of an answer. Raises whatever the template does."""
        if self._environment is None or tools or any(len(turn) != 2 for turn in turns):
            return self._ask(turns, tools, prompt)
        shape = (prompt, tuple([turn["role"] for turn in turns]))
        contents = [turn["content"] for turn in turns]
        paths = self._paths.get(shape)
        for path in paths or ():
            if all(question.holds(contents) for question in path.questions):
                return path.write(contents)
        text = self._ask(turns, tools, prompt)
        tries = self._tries.get(shape, 0)
        if tries < _TRIES and len(paths or ()) < _PATHS and len(self._tries) < _SHAPES:
            self._tries[shape] = tries + 1
            found = self._trace(shape, contents) if self._kept_chars < _KEPT_CHARS else None
            if found is not None and found.write(contents) == text:
                self._paths.setdefault(shape, []).append(found)
                self._kept_chars += found.num_chars
        return text

    def _ask(self, turns: list[dict[str, Any]], tools: list[Any] | None, prompt: bool) -> str:
        return str(
            self._tokenizer.apply_chat_template(turns, tools=tools, tokenize=False, add_generation_prompt=prompt)
        )

    def _trace(self, shape: tuple[bool, Roles], contents: list[str]) -> _Path | None:
        environment = self._environment
        assert environment is not None
        trace = _Trace(contents, self._nonce)
        try:
            if self._template is None:
                self._template = environment.from_string(str(self._tokenizer.chat_template))
            turns = [{"role": role, "content": _Sealed(trace, ((index, ""),))} for index, role in enumerate(shape[1])]
            text = self._template.render(
                messages=turns, tools=None, documents=None, add_generation_prompt=shape[0],
                strftime_now=lambda form: trace.ask((-1, ""), "now", form), **self._tokenizer.special_tokens_map,
            )  # fmt: skip
        except Exception:  # a template is a program of its author
            return None
        return None if trace.broken else _path(text, trace)


def _path(text: str, trace: _Trace) -> _Path:
    # Every second part between marks is a hole.
    pieces, holes = text.split(trace.nonce), []
    for place in range(1, len(pieces), 2):
        index, _, trim = pieces[place].partition(":")
        holes.append((place, int(index), trim))
    return _Path(tuple(trace.questions.values()), tuple(pieces), tuple(holes))


def _environment(tokenizer: PreTrainedTokenizerBase) -> Environment | None:
    # transformers' own, with what templates may do to a sealed content; None where that would not be enough.
    template = tokenizer.chat_template
    if not isinstance(template, str):
        return None
    try:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        theirs: Environment = _compile_jinja_template(template).environment
        tree = theirs.parse(template)
    except Exception:  # another version of the library, or a template that is none
        return None
    if not _followed(tree):
        return None
    ours = theirs.overlay(finalize=lambda value: value._write() if isinstance(value, _Sealed) else value)
    tests: dict[str, Any] = dict(theirs.tests)
    ours.tests = tests | {name: _or_sealed(tests[name]) for name in ("string", "iterable", "sequence")}
    trim: Any = theirs.filters["trim"]
    ours.filters = theirs.filters | {"trim": lambda value, *options: _trim(trim, value, *options)}
    return ours


def _or_sealed(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, _Sealed) or test(value)


def _trim(trim: Callable[..., str], value: Any, *options: Any) -> Any:
    return value.strip(*options) if isinstance(value, _Sealed) else trim(value, *options)


def _followed(tree: nodes.Template) -> bool:
    calls = (node.call.node for node in tree.find_all(nodes.CallBlock))
    return not (
        any(tree.find_all(_CATCHING))
        or any(not isinstance(called, nodes.ExtensionAttribute) for called in calls)  # all but {% generation %}
        or any(loop.recursive for loop in tree.find_all(nodes.For))
        or any(test.name == "sameas" for test in tree.find_all(nodes.Test))
        or any(found.name == "random" for found in tree.find_all(nodes.Filter))
        or any(name.name in ("lipsum", "self") for name in tree.find_all(nodes.Name))
    )
