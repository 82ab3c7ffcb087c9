"""Token ids of a text from its words, which repeat, where that is provably what the tokenizer itself would say.

A byte-level BPE tokenizer cuts a text at its added tokens, then into words by a published pattern, and makes tokens of
each word by itself. Added tokens and pattern are matched here by `re`, ten times faster than the library does; what a
word becomes is asked of the library once and kept. Everything that this does not cover is left to the library: other
kinds of tokenizers, other patterns, and characters whose class has changed since Unicode 3.2.
"""

from __future__ import annotations

import json
import re
import unicodedata
from bisect import bisect_right
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

_WORDS_KEPT = 1 << 17
_WORD_CHARS = 48
_PIECES_KEPT = 1 << 10
_PIECE_CHARS = 1 << 12

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_MODERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# GPT-2 and those that name no pattern; Llama 3 and its kin; Qwen 2 and 3.
_PATTERNS = {_GPT2, _MODERN.format("{1,3}"), _MODERN.format("")}
_PROBES = (
    "The quick brown fox's 12 jumps, I'LL see:\n\n  it   \t done!  ",
    " x\r\n\r\ny 1234567 ... ''d 'Tis 'S a_b-c\n \n  z",
    "sch\u00f6n \u2014 \u201cso\u201d \u00bd\u00b2 \u6771\u4eac \u0434\u043e\u043c\u00a0x \u0627\u0644 a\u0301",
    "",
)


@dataclass(frozen=True, slots=True)
class Tokens:
    """The ids of a text. After `chars[i]` characters an added token ends, and with it the first `counts[i]` ids."""

    text: str
    ids: list[int]
    chars: list[int]
    counts: list[int]


@dataclass(frozen=True)
class _Layout:
    # What there is to know about a tokenizer: how it cuts at added tokens, and into words.
    added: re.Pattern[str]
    steps: tuple[re.Pattern[str], ...]
    plain: re.Pattern[str]
    composed: bool


class WordTokenizer:
    """Tokenises texts as `tokenizer` does; made by `word_tokenizer`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, layout: _Layout):
        self._backend: Any = tokenizer.backend_tokenizer
        self._model = self._backend.model
        self._layout = layout
        self._added_ids = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
        self._words: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[str, tuple[int, ...]] = {}
        self.before = self._before()

    def _before(self) -> list[int] | None:
        # What the tokenizer puts before a text if it is asked to add its special tokens; None: it adds something else.
        texts = [self._backend.encode(text, add_special_tokens=True).ids for text in ("", "a", "b c")]
        begin: list[int] = texts[0]
        fits = (ids == begin + self.encode(text).ids for text, ids in zip(("a", "b c"), texts[1:], strict=True))
        return begin if all(fits) else None

    def encode(self, text: str, before: list[int] | None = None) -> Tokens:
        """Return the tokens of `text`, after the ids `before`."""
        ids = list(before or ())
        chars, counts, position = [0], [len(ids)], 0
        for index, piece in enumerate(self._layout.added.split(text)):
            position += len(piece)
            if index % 2:
                ids.append(self._added_ids[piece])
                chars.append(position)
                counts.append(len(ids))
            elif piece:
                ids += self._pieces.get(piece) or self._piece(piece)
        return Tokens(text, ids, chars, counts)

    def count(self, tokens: Tokens, cut: int) -> int:
        """Return how many ids the first `cut` characters by themselves and the whole text begin with in common.

        Up to the last added token before `cut` they are the same: it is found from left to right, and ends its word.
        """
        if cut >= len(tokens.text):
            return len(tokens.ids)
        last = bisect_right(tokens.chars, cut) - 1
        begin = tokens.counts[last]
        if tokens.chars[last] == cut:
            return begin if cut else 0
        part = self.encode(tokens.text[tokens.chars[last] : cut]).ids
        return begin + common_prefix(part, tokens.ids[begin : begin + len(part)])

    def _piece(self, piece: str) -> tuple[int, ...]:
        # The ids of a text without added tokens.
        if not self.settled(piece):
            ids = tuple(self._backend.encode(piece, add_special_tokens=False).ids)
        else:
            found: list[int] = []
            known = self._words
            for word in self.split(piece):
                found += known.get(word) or self._word(word)
            ids = tuple(found)
        if len(piece) <= _PIECE_CHARS:
            _keep(self._pieces, piece, ids, _PIECES_KEPT)
        return ids

    def settled(self, piece: str) -> bool:
        """Return whether every character of `piece` is of a class that all agree on."""
        composed = not self._layout.composed or unicodedata.is_normalized("NFC", piece)
        return composed and self._layout.plain.fullmatch(piece) is not None

    def split(self, piece: str) -> list[str]:
        """Return the words of a settled text without added tokens."""
        words = [piece]
        for step in self._layout.steps:
            words = [word for text in words for word in step.findall(text)]
        return words

    def _word(self, word: str) -> tuple[int, ...]:
        ids = tuple(token.id for token in self._model.tokenize(as_bytes(word)))
        if len(word) <= _WORD_CHARS:
            _keep(self._words, word, ids, _WORDS_KEPT)
        return ids


def _keep(kept: dict[str, tuple[int, ...]], key: str, ids: tuple[int, ...], most: int) -> None:
    # What is frequent comes back at once; to know what is would cost more.
    if len(kept) >= most:
        kept.clear()
    kept[key] = ids


def common_prefix(prefix: list[int], whole: list[int]) -> int:
    """Return how many tokens the two begin with in common.

    Less than the prefix where tokens merge across its end; the merged token is then part of what follows.
    """
    if whole[: len(prefix)] == prefix:
        return len(prefix)
    pairs = enumerate(zip(prefix, whole, strict=False))
    return next((index for index, (left, right) in pairs if left != right), min(len(prefix), len(whole)))


def word_tokenizer(tokenizer: PreTrainedTokenizerBase) -> WordTokenizer | None:
    """Return the fast way to tokenise as `tokenizer` does, or None if it is not known to be the same."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    layout = _layout(tokenizer, backend) if backend is not None else None
    if layout is None:
        return None
    made = WordTokenizer(tokenizer, layout)
    specials = [token.content for token in tokenizer.added_tokens_decoder.values()][:8]
    probes = [*_PROBES, *(special.join(_PROBES) for special in specials)]
    same = all(made.encode(text).ids == backend.encode(text, add_special_tokens=False).ids for text in probes)
    alike = all(library_words(backend, text) == list(map(as_bytes, made.split(text))) for text in _PROBES)
    return made if same and alike else None


def library_words(backend: Any, text: str) -> list[str]:
    """Return the words that the library itself cuts a text without added tokens into, a letter for each byte."""
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]


def as_bytes(word: str) -> str:
    """Return `word` with a letter for each of its bytes, as byte-level vocabularies write it."""
    return "".join(map(_byte_characters().__getitem__, word.encode()))


def _layout(tokenizer: PreTrainedTokenizerBase, backend: Any) -> _Layout | None:
    normalizer = _state(backend.normalizer)
    added = list(tokenizer.added_tokens_decoder.values())
    steps = _steps(_state(backend.pre_tokenizer))
    if (
        steps is None
        or type(backend.model).__name__ != "BPE"
        or backend.model.dropout
        or normalizer not in (None, {"type": "NFC"})
        or backend.truncation is not None
        or backend.padding is not None
        or backend.encode_special_tokens
        or any(token.lstrip or token.rstrip or token.single_word for token in added)
        # Those that are found in normalised text are looked for after the others.
        or (normalizer and any(token.normalized for token in added))
        or len({token.normalized for token in added}) > 1
    ):
        return None
    # The longest of those that begin at a place; without any the pattern matches nothing.
    words = sorted((token.content for token in added), key=len, reverse=True)
    found = re.compile("(" + ("|".join(map(re.escape, words)) or r"(?!)") + ")")
    return _Layout(found, steps, _classes()[2], normalizer is not None)


def _state(part: Any) -> Any:
    return None if part is None else json.loads(part.__getstate__())


def _steps(state: Any) -> tuple[re.Pattern[str], ...] | None:
    # The patterns of a pre-tokenizer, one after the other, each of which takes in every character.
    parts = state["pretokenizers"] if state and state["type"] == "Sequence" else [state or {"type": ""}]
    *first, last = parts
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    found: list[re.Pattern[str]] = []
    for part in first:
        pattern = part.get("pattern", {}).get("Regex")
        if part["type"] == "Digits" and part["individual_digits"]:
            found.append(_translate(r"\p{N}|[^\p{N}]+"))
        elif part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"] and pattern in _PATTERNS:
            found.append(_translate(pattern))
        else:
            return None
    return (*found, _translate(_GPT2)) if last.get("use_regex", True) else tuple(found)


def _translate(pattern: str) -> re.Pattern[str]:
    # `re` has no \p, and its \s takes in four control characters that Unicode does not call white.
    letters, numbers, _ = _classes()
    inside = re.sub(r"\[[^\]]*\]", lambda found: _named(found.group(), letters, numbers), pattern)
    return re.compile(_named(inside, f"[{letters}]", f"[{numbers}]"))


def _named(text: str, letters: str, numbers: str) -> str:
    return text.replace(r"\p{L}", letters).replace(r"\p{N}", numbers)


@cache
def _classes() -> tuple[str, str, re.Pattern[str]]:
    # The letters, the numbers, and a text of characters whose class is settled: it has been the same since Unicode 3.2,
    # so that the library, this Python and the author of a vocabulary agree. The long s and the Kelvin sign are left
    # out, because they match an s and a k where case is ignored.
    old, now = unicodedata.ucd_3_2_0.category, unicodedata.category
    kinds = [_kind(old(chr(code)), now(chr(code))) for code in range(0x10000)]
    for code in (0x17F, 0x212A):
        kinds[code] = ""
    for code in range(0x20):
        kinds[code] = "other" if chr(code) in "\t\n\r" else ""
    settled = re.compile(f"[{_ranges(kinds, ('L', 'N', 'other'))}]*")
    return _ranges(kinds, ("L",)), _ranges(kinds, ("N",)), settled


def _kind(old: str, now: str) -> str:
    if old != now or old in ("Cn", "Cs", "Co", "Cc"):
        return ""
    return old[0] if old[0] in "LN" else "other"


def _ranges(kinds: list[str], wanted: tuple[str, ...]) -> str:
    # The inside of a character class.
    found = ""
    for chosen, codes in groupby(range(len(kinds)), lambda code: kinds[code] in wanted):
        if chosen:
            held = list(codes)
            found += f"{re.escape(chr(held[0]))}-{re.escape(chr(held[-1]))}"
    return found


@cache
def _byte_characters() -> list[str]:
    # The letter that byte-level vocabularies write each byte as.
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(hidden)) for byte in range(256)]
