"""Loads the tokenizer of a base from its folder, and gives it what training needs without growing the vocabulary."""

from __future__ import annotations

import re
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from common.errors import InvalidInput

# Tokens that families ship for padding, in order of preference; `<|endoftext|>` where another token ends a text.
_SPARE = ("<|finetune_right_pad_id|>", "<pad>", "<|pad|>", "<|padding|>", "[PAD]", "<|endoftext|>")
# Special tokens that a family keeps for later: no text has them.
_RESERVED = re.compile(r"\W*(reserved|unused|placeholder|dummy|extra|control)", re.IGNORECASE)

# For bases without a chat template. Plain words, so that no vocabulary has to know them.
_PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'] | capitalize + ':\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)


def load_tokenizer(folder: Path, rows: int | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer in `folder`, with a padding token that its vocabulary already has.

    Args:
        rows: of the base's embedding, where known: a token beyond them does not pad.

    Raises:
        InvalidInput: the files are not a tokenizer, or it has no end-of-sequence token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises whatever its parsers raise
        raise InvalidInput(
            f"base model: its tokenizer cannot be loaded: {error}",
            code="bad_base_model",
            param="model",
            hint="use an unaltered copy of the model",
        ) from error
    if tokenizer.eos_token is None:
        raise InvalidInput(
            "base model: its tokenizer has no end-of-sequence token, so a fine-tuned model would never stop",
            code="bad_base_model",
            param="model",
            hint="set eos_token in tokenizer_config.json",
        )
    tokenizer.pad_token = spare_token(tokenizer, rows)
    tokenizer.padding_side = "right"
    return tokenizer


def spare_token(tokenizer: PreTrainedTokenizerBase, rows: int | None = None) -> str:
    """Return a token of the vocabulary to pad with: the declared one, a spare one, the unknown one.

    The end of a sequence is the last resort. It does no harm even so, because labels are explicit and never derived
    from the padding; but others who take this tokenizer for training would mask every end.
    """
    vocabulary = tokenizer.get_vocab()
    reserved = sorted(
        (token for token in tokenizer.all_special_tokens + list(tokenizer.get_added_vocab()) if _RESERVED.match(token)),
        key=lambda token: (vocabulary[token], token),
    )
    for token in (tokenizer.pad_token, *_SPARE, *reserved, tokenizer.unk_token):
        if token in vocabulary and token != tokenizer.eos_token and (rows is None or vocabulary[token] < rows):
            return str(token)
    return str(tokenizer.eos_token)


def ensure_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Give a tokenizer without a chat template a plain one. Returns whether that was needed."""
    if tokenizer.chat_template:
        return False
    starts = tokenizer("").input_ids
    has_start = bool(starts) and starts[0] == tokenizer.bos_token_id
    tokenizer.chat_template = ("{{ bos_token }}" if has_start else "") + _PLAIN_TEMPLATE
    return True
