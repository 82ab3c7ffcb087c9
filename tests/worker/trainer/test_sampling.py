"""Prompts asked at each checkpoint: the answers are the model's own, are kept, and leave no trace in the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.worker.trainer import tiny
from tests.worker.trainer.conftest import Attempt, Go
from tests.worker.trainer.test_check import checked
from tests.worker.trainer.test_endings import stopping
from tests.worker.trainer.test_resume import history, resumed
from worker.trainer import protocol
from worker.trainer.protocol import Checkpoint, Failed

PROMPTS = ["the fox jumps", "birds sing"]
FLOAT32 = {"bnb_4bit_compute_dtype": "float32"}


def taken(made: Attempt) -> list[dict[str, Any]]:
    """Return the lines of the report."""
    return [json.loads(line) for line in (made.folder / "out" / "reports" / "samples.jsonl").read_text().splitlines()]


def stock_answers(base: Path, adapter: Path) -> list[str]:
    """Return what the published adapter answers to the prompts in stock peft, decoded greedily."""
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, str(adapter)).eval()
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "max_new_tokens": 64}
    answers = []
    for prompt in PROMPTS:
        turns = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        output = model.generate(**inputs, **greedy, pad_token_id=tokenizer.pad_token_id)
        answers.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return answers


@pytest.mark.parametrize(
    "options",
    [
        {"lora": {"lora_dropout": 0.3}, "neftune_noise_alpha": 5.0, "gradient_checkpointing": True},
        {"method": "lora", "lora": {"lora_dropout": 0.3}, "packing": True, "optim": "adamw_8bit"},
        {"method": "full", "validation": tiny.chat_rows(3), "eval_steps": 1},
    ],
)
def test_asking_changes_nothing(go: Go, options: dict[str, Any]):
    options = {"max_steps": 5, "save_steps": 1, **options}
    asked, silent = go(**options, sample_prompts=PROMPTS), go(**options)
    assert [entry["step"] for entry in taken(asked)] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert history(asked) == history(silent)
    for step in range(1, 6):
        left, right = (made.folder / "checkpoints" / f"step-{step:08d}" for made in (asked, silent))
        for name in ("rng_state.pth", "optimizer.pt", *(path.name for path in left.glob("*.safetensors"))):
            assert (left / name).read_bytes() == (right / name).read_bytes(), (step, name)
    assert not (silent.folder / "out" / "reports" / "samples.jsonl").exists()


def test_the_answers_are_those_of_the_adapter(go: Go, base: Path):
    options = {"max_steps": 40, "learning_rate": 0.05, "save_steps": 20, "num_train_epochs": 20.0, "method": "lora"}
    made = go(**options, quantization={"load_in_4bit": False} | FLOAT32, sample_prompts=PROMPTS)
    lines = taken(made)
    assert [(line["step"], line["prompt"]) for line in lines] == [(step, text) for step in (20, 40) for text in PROMPTS]
    assert [line["answer"] for line in lines[2:]] == stock_answers(base, made.folder / "out" / "adapter")
    notes = made.notes("samples.taken")
    assert [note.data["step"] for note in notes] == [20, 40]
    assert notes[1].data["samples"] == [{"prompt": line["prompt"], "answer": line["answer"]} for line in lines[2:]]


def test_validation_rows_are_asked_up_to_their_answer(go: Go):
    rows = tiny.chat_rows(6)
    made = go(validation=rows, sample_prompts="validation", max_steps=1)
    lines = taken(made)
    assert len(lines) == 4
    for line, row in zip(lines, rows, strict=False):
        question, reply = (message["content"] for message in row["messages"])
        assert question in line["prompt"] and reply not in line["prompt"].removeprefix(question)
        assert line["expected"] == reply


def test_texts_are_gone_on_with(go: Go):
    rows = [{"text": tiny.sentence(index, 12)} for index in range(12)]
    made = go(rows, validation=rows[:1], sample_prompts="validation", max_steps=1)
    (line,) = taken(made)
    assert rows[0]["text"].startswith(line["prompt"]) and rows[0]["text"] == line["prompt"] + " " + line["expected"]
    plain = go(rows, sample_prompts=["the fox"], max_steps=1)
    assert plain.run and plain.run.prompts[0].ids == plain.run.tokenizer("the fox").input_ids
    chat = go(sample_prompts=["the fox"], max_steps=1)
    assert chat.run and chat.run.tokenizer.decode(chat.run.prompts[0].ids).endswith("<|im_start|>assistant\n")


def test_a_resumed_run_keeps_the_answers_before_it(go: Go, base: Path, tmp_path: Path):
    whole = go(max_steps=4, save_steps=1, sample_prompts=PROMPTS, lora={"lora_dropout": 0.2})
    again = resumed(whole, 2, base, tmp_path)
    assert taken(again) == taken(whole) and again.adapter_bytes() == whole.adapter_bytes()


def test_who_has_to_leave_asks_nothing(tmp_path: Path, base: Path):
    made = stopping(tmp_path / "run", base, {"do": "stop"}, save_steps=1, job={"sample_prompts": PROMPTS})
    assert made.code == protocol.DRAINED
    assert [message.step for message in made.messages if isinstance(message, Checkpoint)] == [1, 2, 3]
    assert [note.data["step"] for note in made.notes("samples.taken")] == [1]


def test_a_prompt_without_room_for_an_answer_is_refused_before(tmp_path: Path, base: Path):
    code, failed = checked(tmp_path, base, sample_prompts=["a", "the fox " * 200])
    assert code == protocol.BAD_INPUT and isinstance(failed, Failed)
    assert failed.param == "sample_prompts.1" and "leaves no room for an answer" in failed.message and failed.hint


def test_a_prompt_that_the_template_refuses_is_named(tmp_path: Path, base: Path):
    template = "{% if messages|length == 1 %}{{ raise_exception('one is too few') }}{% endif %}" + tiny.CHATML
    rows = [{"messages": [{"role": "system", "content": "x"}, *row["messages"]]} for row in tiny.chat_rows(4)]
    code, failed = checked(tmp_path, base, rows, sample_prompts=["a"], chat_template=template)
    assert code == protocol.BAD_INPUT and isinstance(failed, Failed)
    assert failed.param == "sample_prompts.0" and "one is too few" in failed.message
