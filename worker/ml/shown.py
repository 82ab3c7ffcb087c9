"""What each token of a row adds to its text."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

# A token may be part of a character: the text of those before the last part is empty.
_PARTS_MAX = 8
_BEFORE = 4


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """Return a text for each of `ids`; one after the other they are the whole text."""
    texts: list[str] = []
    start = 0
    for end in range(1, len(ids) + 1):
        text = _added(tokenizer, ids, start, end)
        if text.endswith("\ufffd") and end - start < _PARTS_MAX and end < len(ids):
            texts.append("")
            continue
        texts.append(text)
        start = end
    return texts


def _added(tokenizer: PreTrainedTokenizerBase, ids: list[int], start: int, end: int) -> str:
    # With a few tokens before them: some tokenizers leave out the blank that a text would begin with.
    before = ids[max(0, start - _BEFORE) : start]
    known, whole = (_decoded(tokenizer, part) for part in (before, before + ids[start:end]))
    return whole[len(known) :] if whole.startswith(known) else _decoded(tokenizer, ids[start:end])


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
