"""Merged models as a job asks for them: after its training, or later of what it published; loaded by nobody's code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraModel

from tests.stock_libraries import run_stock
from tests.worker.trainer import tiny
from tests.worker.trainer.conftest import Attempt, Go, attempt
from tests.worker.trainer.test_resume import resumed
from tests.worker.trainer.test_vocabulary import NEW, ROWS, altered
from worker.ml.adapters import set_adapter_dtype
from worker.ml.agreement import answers, difference
from worker.trainer import merging, protocol
from worker.trainer.lifeline import Wishes
from worker.trainer.protocol import Note, TrainSpec

ALL = ["adapter", "merged", "merged_dequantized", "merged_4bit"]
ROUNDING = 0.012
VALIDATION = tiny.chat_rows(30)[20:]

# Run by another environment, see `tests.stock_libraries`.
STOCK = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
rows, base, out = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
def logits(model):
    with torch.no_grad():
        return [model.eval()(input_ids=torch.tensor([row])).logits[0].float() for row in rows]
def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
said = {"adapter_on_16_bit": logits(PeftModel.from_pretrained(load(base), out + "/adapter"))}
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                            bnb_4bit_compute_dtype=torch.float32)
four_bit = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=config)
said["adapter_on_4_bit"] = logits(PeftModel.from_pretrained(four_bit.dequantize().float(), out + "/adapter"))
for name in sys.argv[4].split(","):
    said[name] = logits(load(out + "/" + name))
    assert AutoTokenizer.from_pretrained(out + "/" + name)("the quick")["input_ids"]
torch.save(said, out + "/said.pt")
"""


Said = Callable[[list[list[int]], Path, Path, list[str]], dict[str, list[torch.Tensor]]]


@pytest.fixture
def by_stock_libraries(stock_python: Path) -> Said:
    """What stock transformers and peft compute from base and artifacts, in a virtual environment of their own."""

    def ask(rows: list[list[int]], base: Path, out: Path, names: list[str]) -> dict[str, list[torch.Tensor]]:
        run_stock(stock_python, STOCK, json.dumps(rows), str(base), str(out), ",".join(names))
        said: dict[str, list[torch.Tensor]] = torch.load(out / "said.pt")
        (out / "said.pt").unlink()
        return said

    return ask


@pytest.fixture(scope="module")
def published(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Attempt:
    """A job that made everything."""
    folder = tmp_path_factory.mktemp("published")
    tiny.write_run(folder, base, validation=VALIDATION, export=ALL)
    return attempt(folder)


def exact(made: Attempt) -> Any:
    """Return the trainer's model without the 16-bit autocast that accelerate put around its forward."""
    assert made.run
    model = made.run.trainer.accelerator.unwrap_model(made.run.model, keep_fp32_wrapper=False)
    set_adapter_dtype(model, torch.float32)
    return model


def apart(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    return difference(first, second).relative


def test_stock_libraries_give_the_logits_of_the_trainer(
    go: Go, base: Path, published: Attempt, by_stock_libraries: Said
):
    plain = go(validation=VALIDATION)
    assert plain.run and published.code == protocol.DONE
    rows = [list(row["input_ids"]) for row in plain.run.eval_rows][:4]
    trainer = answers(exact(plain), rows)
    assert published.adapter_bytes() == plain.adapter_bytes(), "merging changes nothing about the adapter"
    said = by_stock_libraries(rows, base, published.folder / "out", ALL[1:])
    changed = apart(trainer, answers(exact(plain).unload(), rows))
    assert changed > 0.1
    assert apart(trainer, said["adapter_on_4_bit"]) < 1e-4
    assert apart(trainer, said["merged_dequantized"]) < ROUNDING
    assert apart(said["adapter_on_16_bit"], said["merged"]) < ROUNDING
    quantized = apart(trainer, said["merged_4bit"])
    assert ROUNDING < quantized < changed
    stated = published.result["merged"]["merged_4bit"]["from_adapter_on_4_bit_base"]["relative"]
    assert quantized == pytest.approx(stated, rel=0.5)


def test_a_16_bit_job_is_merged_into_what_it_was_trained_on(go: Go, base: Path, by_stock_libraries: Said):
    sixteen = {"method": "lora", "quantization": {"load_in_4bit": False}}
    plain, merged = go(**sixteen), go(**sixteen, export=["merged", "merged_4bit"])
    assert plain.run
    rows = [list(row["input_ids"]) for row in plain.run.train_rows][:4]
    said = by_stock_libraries(rows, base, merged.folder / "out", ["merged"])
    assert apart(answers(exact(plain), rows), said["merged"]) < ROUNDING
    assert not (merged.folder / "out" / "merged_dequantized").exists()
    assert "from_adapter_on_4_bit_base" not in merged.result["merged"]["merged_4bit"]


def test_the_report_says_how_far_and_from_what(published: Attempt):
    report = published.result["merged"]["merged"]
    assert report["made"] and report["rows"] == merging.NUM_ROWS and report["device"] == "cpu"
    assert published.run
    lengths = [len(row["input_ids"]) for row in published.run.eval_rows]
    assert report["tokens"] == sum(lengths[: merging.NUM_ROWS]), "the rows are those of the validation file"
    gap = report["from_adapter_on_16_bit_base"]
    assert 0 < gap["relative"] < report["tolerance"] < report["adapter_changes"]["relative"]
    written = json.loads((published.folder / "out" / "reports" / "report.json").read_text())
    assert written["merged"]["merged"] == report
    assert [note.level for note in published.notes("merge.done")] == ["info"] * 3


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_merged_model_names_the_public_base_and_no_path(base: Path, published: Attempt):
    for name in ALL:
        for file, content in files(published.folder / "out" / name).items():
            assert str(base).encode() not in content and str(published.folder).encode() not in content, (name, file)
    merged = files(published.folder / "out" / "merged")
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "README.md"} <= set(merged)
    assert b"base_model: tiny/llama" in merged["README.md"] and b"0123abc" in merged["README.md"]


def break_the_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = LoraModel.merge_and_unload

    def broken(model: LoraModel) -> Any:
        merged = honest(model)
        merged.model.layers[0].self_attn.v_proj.weight.data *= 1.1
        return merged

    monkeypatch.setattr(LoraModel, "merge_and_unload", broken)


def test_a_merge_that_is_refused_does_not_cost_the_adapter(go: Go, monkeypatch: pytest.MonkeyPatch):
    whole = go()
    break_the_merge(monkeypatch)
    made = go(export=["adapter", "merged"])
    assert made.code == protocol.DONE and made.adapter_bytes() == whole.adapter_bytes()
    assert not (made.folder / "out" / "merged").exists()
    report = made.result["merged"]["merged"]
    assert report["made"] is False and report["error"]["code"] == "merge_differs"
    (note,) = made.notes("merge.failed")
    assert note.level == "error" and note.data["code"] == "merge_differs"


def no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "free_bytes", lambda device: 1000)


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("worker.ml.merge.Merger._save", write)


@pytest.mark.parametrize(("breaks", "code"), [(no_room, "no_room_to_merge"), (full_disk, "disk_full")])
def test_nor_does_a_worker_that_is_too_small(
    go: Go, monkeypatch: pytest.MonkeyPatch, breaks: Callable[[pytest.MonkeyPatch], None], code: str
):
    breaks(monkeypatch)
    made = go(export=["merged"])
    assert made.code == protocol.DONE and made.adapter_bytes()
    assert made.result["merged"]["merged"]["error"]["code"] == code
    assert not (made.folder / "out" / "merged").exists()


def test_a_base_in_4_bit_has_no_16_bit_merge(go: Go, base: Path, tmp_path: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    stored = tmp_path / "stored"
    AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.bfloat16).save_pretrained(stored)
    AutoTokenizer.from_pretrained(base).save_pretrained(stored)
    made = go(base=stored, export=["merged", "merged_dequantized"])
    assert made.code == protocol.DONE
    assert made.result["merged"]["merged"]["error"]["code"] == "bad_export"


# ---- of a finished job -----------------------------------------------------------------------------------------------


def later(made: Attempt, folder: Path, forms: list[str], wishes: Wishes | None = None, **changes: Any) -> Attempt:
    """Export what `made` published, as the supervisor lays it out for a job of its own."""
    shutil.copytree(made.folder / "out" / "adapter", folder / "adapter")
    if changes.get("train_file") != "":
        shutil.copytree(made.folder / "dataset", folder / "dataset")
    spec = TrainSpec.read(made.folder)
    replace(spec, job=spec.job | {"export": forms}, adapter="adapter", **changes).write(folder)
    return attempt(folder, wishes, stopping(wishes) if wishes else None)


def test_an_export_later_makes_the_same_models(published: Attempt, tmp_path: Path):
    folder = tmp_path / "later"
    folder.mkdir()
    made = later(published, folder, ALL[1:])
    assert made.code == protocol.DONE
    assert {path.name for path in (folder / "out").iterdir()} == {*ALL[1:], "reports"}
    for name in ALL[1:]:
        assert files(folder / "out" / name) == files(published.folder / "out" / name), name
    assert made.result["merged"] == published.result["merged"]
    assert {m.stage for m in made.messages if isinstance(m, protocol.Stage)} == {"export"}
    assert [(m.step, m.max_steps) for m in made.messages if isinstance(m, protocol.Progress)][-1] == (3, 3)


def test_an_export_later_compares_on_the_rows_that_were_split_off(go: Go, tmp_path: Path):
    before = go(rows=tiny.chat_rows(12), validation_split=0.25, export=["merged"])
    folder = tmp_path / "later"
    folder.mkdir()
    made = later(before, folder, ["merged"])
    assert made.code == protocol.DONE
    report = made.result["merged"]["merged"]
    assert report["rows"] == 3 and report == before.result["merged"]["merged"]


def test_an_export_whose_data_is_gone_compares_on_other_texts(published: Attempt, tmp_path: Path):
    folder = tmp_path / "later"
    folder.mkdir()
    made = later(published, folder, ["merged"], train_file="", validation_file=None)
    assert made.code == protocol.DONE
    report, before = made.result["merged"]["merged"], published.result["merged"]["merged"]
    assert report["tokens"] != before["tokens"] and report["from_adapter_on_16_bit_base"]["relative"] > 0
    assert files(folder / "out" / "merged").keys() == files(published.folder / "out" / "merged").keys()
    assert "on texts of Tunery's own" in made.notes("merge.rows")[0].message


def test_an_export_that_differs_fails(published: Attempt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    break_the_merge(monkeypatch)
    folder = tmp_path / "later"
    folder.mkdir()
    made = later(published, folder, ["merged"])
    assert made.code == protocol.BAD_INPUT and made.failure.code == "merge_differs" and made.failure.hint
    assert not (folder / "out" / "merged").exists()


def stopping(wishes: Wishes) -> Callable[[protocol.Message], None]:
    """Ask the run to stop as soon as it begins to merge."""

    def hear(message: protocol.Message) -> None:
        if isinstance(message, Note) and message.name == "merge.started":
            wishes.obey({"do": "stop"})

    return hear


def test_an_export_can_be_broken_off(published: Attempt, tmp_path: Path):
    folder, wishes = tmp_path / "later", Wishes()
    folder.mkdir()
    made = later(published, folder, ["merged"], wishes=wishes)
    assert made.code == protocol.DRAINED and not (folder / "out" / "merged").exists()


def test_training_that_is_stopped_while_it_merges_goes_on_from_its_last_step(
    base: Path, published: Attempt, tmp_path: Path
):
    folder, wishes = tmp_path / "stopped", Wishes()
    folder.mkdir()
    tiny.write_run(folder, base, validation=VALIDATION, export=ALL)
    stopped = attempt(folder, wishes, stopping(wishes))
    assert stopped.code == protocol.DRAINED
    again = resumed(stopped, 3, base, tmp_path)
    assert again.code == protocol.DONE and again.losses == []
    for name in ALL:
        assert files(again.folder / "out" / name) == files(published.folder / "out" / name), name


def test_a_grown_vocabulary_is_merged_and_told(go: Go, tmp_path: Path):
    lacking = altered(tiny.build_base(tmp_path / "lacking"), tmp_path / "lacking", added=NEW)
    made = go(ROWS, base=lacking, export=ALL)
    assert made.code == protocol.DONE and made.result["vocabulary_grown"] == 2
    assert all(report["made"] for report in made.result["merged"].values()), made.result["merged"]
    for name in ALL[1:]:
        assert json.loads((made.folder / "out" / name / "config.json").read_text())["vocab_size"] == 351
    for engine in ("vllm", "sglang", "llama.cpp"):
        assert any("vocabulary" in reason for reason in made.result["servable"][engine]["reasons"])


def test_the_report_says_which_engines_take_the_adapter(published: Attempt):
    written = json.loads((published.folder / "out" / "reports" / "servable.json").read_text())
    assert written == published.result["servable"]
    assert [written[engine]["servable"] for engine in ("vllm", "sglang", "llama.cpp")] == [True] * 3
    assert written["vllm"]["commands"] == ["vllm serve tiny/llama --enable-lora --lora-modules NAME=adapter"]
