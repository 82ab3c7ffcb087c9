"""`tunery chat`, against a running server and by itself."""

from __future__ import annotations

import builtins
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner, Result

from common.cli import asking, demo
from common.cli.app import app
from common.cli.chat import Talk
from tests.processes import ROOT, wait_until
from tests.worker.serve.conftest import Folder
from tests.worker.serve.server import BASE_ID, Server
from tests.worker.serve.talking import Talk as Engine
from tests.worker.serve.talking import asking as asking_for
from tests.worker.trainer.tiny import sentence

WORDS = "the quick brown fox"
SHORT = ("--max-tokens", "12")
Tunery = Callable[..., Result]
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def tunery(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tunery:
    """Run `tunery` in this process, with the key of the tenant `t`."""
    monkeypatch.chdir(tmp_path)
    server.client("t").close()
    monkeypatch.setenv("TUNERY_API_KEY", server.key("t"))
    return lambda *arguments, text=None: CliRunner().invoke(app, [str(word) for word in arguments], input=text)


def test_a_server_is_asked_by_argument_and_by_standard_input(tunery: Tunery, server: Server, jobs: dict[str, str]):
    for arguments, text in (((jobs["a"], WORDS), None), ((jobs["a"],), f"{WORDS}\n")):
        done = tunery("chat", *arguments, "--url", server.url, *SHORT, text=text)
        assert done.exit_code == 0, done.output
        assert done.output.rstrip("\n") == readable(server.text(jobs["a"])).rstrip("\n")
    done = tunery("-o", "json", "chat", f"{jobs['a']}:0.5", WORDS, "--url", server.url, *SHORT)
    told = json.loads(done.output)
    assert told["answer"] == server.text(f"{jobs['a']}:0.5") and told["usage"]["completion_tokens"] == 12
    assert (told["model"], told["prompt"], told["finish_reason"]) == (f"{jobs['a']}:0.5", WORDS, "length")


def readable(text: str) -> str:
    """Return what of a text is printed: no control characters."""
    return "".join(character if character.isprintable() or character in "\n\t" else " " for character in text)


def test_the_base_alone_and_both_side_by_side(tunery: Tunery, server: Server, jobs: dict[str, str]):
    base, adapter = server.text(BASE_ID), server.text(jobs["a"])
    done = tunery("chat", jobs["a"], WORDS, "--base", "--url", server.url, *SHORT, "-o", "json")
    assert json.loads(done.output)["answer"] == base
    done = tunery("chat", jobs["a"], WORDS, "--compare", "--url", server.url, *SHORT, "-o", "json")
    assert json.loads(done.output) == {"prompt": WORDS, "base": base, "adapter": adapter}


def test_options_reach_the_model(tunery: Tunery, server: Server, jobs: dict[str, str]):
    hot = {"temperature": 1.5, "seed": 7, "top_p": 0.9}
    words = [part for name, value in hot.items() for part in (f"--{name.replace('_', '-')}", value)]
    done = tunery("chat", jobs["a"], WORDS, "--url", server.url, *SHORT, *words, "--system", "be brief", "-o", "json")
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": WORDS}]
    assert json.loads(done.output)["answer"] == server.text(jobs["a"], messages=turns, **hot)


def test_what_goes_wrong_is_said(tunery: Tunery, server: Server, jobs: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    unknown = tunery("chat", jobs["other"], WORDS, "--url", server.url)
    assert unknown.exit_code == 2 and "does not exist" in unknown.output
    assert tunery("chat", jobs["a"], " ", "--url", server.url).exit_code == 2
    away = tunery("chat", jobs["a"], WORDS, "--url", "http://127.0.0.1:9")
    assert away.exit_code == 1 and "does not answer" in away.output
    monkeypatch.setenv("TUNERY_API_KEY", "tnr_wrong")
    stranger = tunery("chat", jobs["a"], WORDS, "--url", server.url)
    assert stranger.exit_code == 2 and "API key" in stranger.output


def test_a_conversation_remembers_what_was_said(
    server: Server, jobs: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    type_in(monkeypatch, WORDS, "", "a lazy dog")
    with server.client() as client:
        Talk(asking.Asker(client, {"max_tokens": 12, "temperature": 0}), [jobs["a"]], None, False).go_on()
    first = server.text(jobs["a"])
    turns = [{"role": "user", "content": WORDS}, {"role": "assistant", "content": first}]
    second = server.text(jobs["a"], messages=[*turns, {"role": "user", "content": "a lazy dog"}])
    assert capsys.readouterr().out == f"{readable(first)}\n{readable(second)}\n\n"
    assert second != server.text(jobs["a"], "a lazy dog")


def test_what_cannot_be_answered_ends_no_conversation(
    server: Server, jobs: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    long, longer = sentence(0, 120), sentence(0, 300)
    type_in(monkeypatch, long, longer, long)
    with server.client() as client:
        Talk(asking.Asker(client, {"max_tokens": 12, "temperature": 0}), [jobs["a"]], None, False).go_on()
    answer = readable(server.text(jobs["a"], long))
    said = capsys.readouterr()
    assert said.out == f"{answer}\n{answer}\n\n"
    assert "it is forgotten" in said.err and "error: messages: the model's context is 256 tokens" in said.err


def type_in(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    typed = iter(lines)

    def type_next(_prompt: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(builtins, "input", type_next)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Start]:
    """Start `tunery` as a process in an empty folder, without a server anywhere."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    variables = kept | {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TUNERY_DEVICE": "cpu"}
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "common.cli", *map(str, arguments)]
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, cwd=tmp_path, env=variables, text=True, **streams))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_an_adapter_in_a_folder_is_asked_without_any_server(alone: Start, base: Path, adapters: Folder):
    process = alone("chat", adapters("a"), "--model", base, "--compare", "-o", "json", *SHORT)
    out, errors = process.communicate(WORDS, timeout=120)
    assert process.returncode == 0, errors
    assert json.loads(out) == {"prompt": WORDS} | as_a_job_is_held(base, adapters("a"), WORDS)


def as_a_job_is_held(base: Path, adapter: Path, words: str) -> dict[str, str]:
    """Return the answers of an engine in this process that holds the base as a trainer would."""
    talk = Engine(base, "bfloat16")
    talk.load("adapter", adapter)
    before, after = talk.ask(asking_for(words), asking_for(words, adapter="adapter"))
    return {"base": before, "adapter": after}


def test_the_demo_compares_them(tmp_path: Path, base: Path, adapters: Folder, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(adapters("a"), tmp_path / "adapter")
    (tmp_path / "prompts.json").write_text(json.dumps([WORDS, "a lazy dog"]))
    demo._compare(base, tmp_path, tmp_path)
    told = json.loads((tmp_path / "answers.json").read_text())
    assert [item["prompt"] for item in told] == [WORDS, "a lazy dog"]
    assert all(item["base"] != item["adapter"] for item in told)
    assert f"prompt:  {WORDS}" in capsys.readouterr().out


def test_nothing_is_left_when_it_is_interrupted(alone: Start, base: Path, adapters: Folder):
    process = alone("chat", adapters("a"), WORDS, "--model", base, "--max-tokens", 200)
    assert process.stderr is not None and "loading" in process.stderr.readline()
    children = wait_for_children(process.pid)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert not psutil.wait_procs(children, timeout=10)[1]


def wait_for_children(pid: int) -> list[psutil.Process]:
    wait_until(lambda: len(psutil.Process(pid).children(recursive=True)) > 1, 60, "the model process")
    return psutil.Process(pid).children(recursive=True)


def test_a_base_that_is_not_there_is_said_with_the_reason(alone: Start, adapters: Folder):
    process = alone("chat", adapters("a"), WORDS, "--model", "no-such-base")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and "no base model 'no-such-base'" in errors and "Traceback" not in errors
