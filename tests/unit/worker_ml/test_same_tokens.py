"""What is derived is what the library says: texts from paths, tokens from words, over many templates and tokenizers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.unit.worker_ml import templates
from tests.worker.trainer.tiny import sentence
from worker.data.rows import Message, Row
from worker.data.source import Problems, Source
from worker.ml import encode, paths
from worker.ml.plan import Asked
from worker.ml.render import Example, Renderer
from worker.ml.tokenizer import ensure_chat_template
from worker.ml.words import as_bytes, library_words, word_tokenizer

SOURCE = Source(Path("rows.jsonl"))
SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Whatever a text may hold that a pattern, a template or a cut could trip over.
BITS = [
    "the fox", " ", "  ", "\n", "\n\n", "\t", "\r\n", "don't", "I'LL", "1", " 2026", "12345", "!", "...", "<|im_end|>",
    "<|im_start|>", "<|", "|>", "</think>", "<think>\n", "[INST]", "naïve", "Straße", "“so” — ", "東京", "дом", "é",
    "e\u0301", "\u00a0", "\u2028", "🦊", "\u200d", "'\u017fa", "\u0378", "K", "²½", "\u3000", "العربية", "_a-b",
    "{{ x }}", "</s>",
]  # fmt: skip


def bpe(*, pre: Any, normalizer: Any = None, before: bool = False, **added: bool) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre, decoders.ByteLevel()
    if normalizer:
        backend.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIALS,
        show_progress=False,
    )
    backend.train_from_iterator(
        [sentence(seed, 12) for seed in range(50)] + ["system user assistant ''s \n\n"], trainer
    )
    if before:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<|pad|>")
    if added:
        from tokenizers import AddedToken

        made.add_tokens([AddedToken("<|odd|>", special=True, **added)])
    return made


def split(pattern: str, **options: Any) -> Any:
    pieces = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return {
        "gpt2": bpe(pre=level),
        "llama3": bpe(pre=split(LLAMA3), before=True),
        "qwen": bpe(pre=split(LLAMA3.replace("{1,3}", "")), normalizer=normalizers.NFC()),
        "smollm": bpe(pre=pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level])),
    }


def others() -> dict[str, PreTrainedTokenizerFast]:
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return {
        "prefix space": bpe(pre=pre_tokenizers.ByteLevel(add_prefix_space=True)),
        "stripping": bpe(pre=level, rstrip=True),
        "lower case": bpe(pre=level, normalizer=normalizers.Lowercase()),
        "own pattern": bpe(pre=split(r"\w+|\W+")),
        "metaspace": bpe(pre=pre_tokenizers.Metaspace()),
        "normalised added": bpe(pre=level, normalized=True),
    }


def odd_text(source: random.Random) -> str:
    return "".join(source.choices(BITS, k=source.randint(1, 9))) + source.choice(("", "x"))


def odd_rows(source: random.Random, count: int) -> list[Row]:
    rows = []
    for number in range(1, count + 1):
        roles = ["system"] * source.randint(0, 1) + ["user", "assistant"] * source.randint(1, 3)
        messages = tuple(Message(role, odd_text(source), trained=source.random() < 0.9) for role in roles)
        kind = source.randrange(5)
        if kind == 0:
            rows.append(Row(number, "completion", prompt=odd_text(source), completion=odd_text(source)))
        elif kind == 1:
            rows.append(Row(number, "text", text=odd_text(source)))
        elif kind == 2:
            rows.append(Row(number, "completion", messages=messages, num_prompt=len(messages) - 1))
        else:
            rows.append(Row(number, "chat", messages=messages))
    return rows


def rendered(tokenizer: Any, rows: list[Row], loss: Asked, max_length: int) -> tuple[list[Example], list[str]]:
    problems = Problems(kept=len(rows))
    examples = list(Renderer(tokenizer, max_length, loss).render(SOURCE, rows, problems))
    return examples, problems.lines


@pytest.mark.parametrize("template", list(templates.ALL))
@pytest.mark.parametrize("kind", ["gpt2", "llama3", "qwen", "smollm"])
def test_examples_are_those_of_the_library(template: str, kind: str, monkeypatch: pytest.MonkeyPatch):
    tokenizer = tokenizers()[kind]
    tokenizer.chat_template = templates.ALL[template]
    ensure_chat_template(tokenizer)
    source = random.Random(f"{template} {kind}")
    rows = odd_rows(source, 60)
    asked: tuple[Asked, ...] = ("auto", "all", "completion", "assistant")
    derived = [rendered(tokenizer, rows, loss, length) for loss, length in zip(asked, (400, 40, 400, 25), strict=True)]
    monkeypatch.setattr(paths, "_environment", lambda _: None)
    monkeypatch.setattr(encode, "word_tokenizer", lambda _: None)
    said = [rendered(tokenizer, rows, loss, length) for loss, length in zip(asked, (400, 40, 400, 25), strict=True)]
    assert derived == said
    assert any(examples for examples, _ in said)


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "qwen", "smollm"])
def test_words_make_the_tokens_of_the_text(kind: str):
    tokenizer = tokenizers()[kind]
    words = word_tokenizer(tokenizer)
    assert words is not None and words.before == ([0] if kind == "llama3" else [])
    source = random.Random(kind)
    for _ in range(1500):
        text = odd_text(source)
        found = words.encode(text, words.before)
        assert found.ids == tokenizer(text)["input_ids"], text
        cut = source.randint(0, len(text))
        alone = tokenizer(text[:cut])["input_ids"] if cut else []
        common = next((i for i, (a, b) in enumerate(zip(alone, found.ids, strict=False)) if a != b), len(alone))
        assert words.count(found, cut) == min(common, len(found.ids)), (text, cut)


@pytest.mark.parametrize("kind", list(others()))
def test_other_tokenizers_are_asked_themselves(kind: str):
    assert word_tokenizer(others()[kind]) is None


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "qwen", "smollm"])
def test_texts_are_cut_where_the_library_cuts_them(kind: str):
    # Compared by words, not by tokens: a small vocabulary joins too little to show each cut.
    tokenizer = tokenizers()[kind]
    words = word_tokenizer(tokenizer)
    assert words is not None
    settled = [chr(code) for code in range(0x10000) if not 0xD800 <= code < 0xE000 and words.settled(chr(code))]
    assert len(settled) > 40_000
    source = random.Random(kind)
    texts = [text for text in (odd_text(source) for _ in range(3000)) if words.settled(text)]
    for char in settled if kind != "smollm" else settled[:3000]:
        texts.append(f"a{char}b {char}1{char}{char} '{char} \n{char}  {char}")
    for text in texts:
        assert list(map(as_bytes, words.split(text))) == library_words(tokenizer.backend_tokenizer, text), ascii(text)


def test_a_path_is_taken_without_running_the_template(monkeypatch: pytest.MonkeyPatch):
    tokenizer = tokenizers()["gpt2"]
    for name in templates.FOLLOWED:
        tokenizer.chat_template = templates.ALL[name]
        writer = paths.ChatWriter(tokenizer)
        turns = [{"role": "user", "content": " a "}, {"role": "assistant", "content": "b\n"}]
        writer.write(turns, None)
        expected = tokenizer.apply_chat_template([{**turn, "content": "\nnew "} for turn in turns], tokenize=False)
        with monkeypatch.context() as patch:
            patch.delattr(paths.ChatWriter, "_ask")
            assert writer.write([{**turn, "content": "\nnew "} for turn in turns], None) == expected


@pytest.mark.parametrize("template", list(templates.UNFOLLOWED))
def test_what_a_template_does_with_contents_otherwise_is_not_guessed(template: str):
    tokenizer = tokenizers()["gpt2"]
    tokenizer.chat_template = templates.UNFOLLOWED[template]
    writer = paths.ChatWriter(tokenizer)
    for content in ("a", "12", "", "A longer <b> text", "append", "7", "é\n"):
        turns = [{"role": "user", "content": content}]
        assert writer.write(turns, None) == tokenizer.apply_chat_template(turns, tokenize=False)
    assert not writer._paths


def test_the_day_is_that_of_the_row(monkeypatch: pytest.MonkeyPatch):
    tokenizer = tokenizers()["gpt2"]
    tokenizer.chat_template = templates.ALL["dated"]
    writer = paths.ChatWriter(tokenizer)
    turns = [{"role": "user", "content": "a"}]
    assert writer.write(turns, None) == writer.write(turns, None)
    (path,) = writer._paths[False, ("user",)]
    monkeypatch.setitem(paths._QUESTIONS, "now", lambda *_: "tomorrow")
    assert not all(question.holds(["a"]) for question in path.questions)


def test_what_is_kept_of_shapes_is_bounded(monkeypatch: pytest.MonkeyPatch):
    tokenizer = tokenizers()["gpt2"]
    tokenizer.chat_template = templates.ALL["chatml"]
    monkeypatch.setattr(paths, "_SHAPES", 5)
    writer = paths.ChatWriter(tokenizer)
    for count in range(1, 12):
        turns = [{"role": "user", "content": "a"}] * count
        assert writer.write(turns, None) == tokenizer.apply_chat_template(turns, tokenize=False)
    assert len(writer._paths) == len(writer._tries) == 5
