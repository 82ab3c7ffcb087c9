"""A base that is read from the cache in 4 bit gives the adapter of one that is quantised, byte for byte."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.worker.trainer import tiny
from tests.worker.trainer.conftest import Attempt, attempt
from tests.worker.trainer.test_child import Child
from tests.worker.trainer.test_families import FAMILIES
from tests.worker.trainer.test_vocabulary import NEW, altered
from worker.ml import base as base_of
from worker.ml import quantized
from worker.ml.base import nf4_config
from worker.ml.cache import MANIFEST, Cache
from worker.ml.options import Choice
from worker.ml.precision import Precision
from worker.ml.quantized import Shelf
from worker.trainer import protocol
from worker.trainer.holding import Holder
from worker.trainer.protocol import CacheRef, Message, Note, Result, Stage, TrainSpec

CPU = torch.device("cpu")
ONE: dict[str, Any] = {"max_steps": 1}
MANY = 1 << 40


@pytest.fixture(autouse=True)
def _process_as_before() -> Iterator[None]:
    """A slate puts back what it found when its holder began; nothing of that may reach other tests."""
    kept = warnings.filters[:]
    yield
    warnings.filters[:] = kept  # type: ignore[index]


@pytest.fixture
def shelf(tmp_path: Path) -> CacheRef:
    return CacheRef(str(tmp_path / "quantized"), MANY, 0)


def lay_out(folder: Path, base: Path, cache: CacheRef | None, *, keep: bool = False, **options: Any) -> Path:
    folder.mkdir()
    rows, hyperparameters = options.pop("rows", None), options.pop("hyperparameters", ONE)
    spec = tiny.write_run(folder, base, rows, hyperparameters=hyperparameters, **options)
    replace(spec, keep=keep, cache=cache).write(folder)
    return folder


def work(folder: Path, base: Path, cache: CacheRef | None, **options: Any) -> tuple[Attempt, Choice | None]:
    """Do a run as the process of a trainer does, up to what it writes into the cache."""
    holder = Holder()
    made = attempt(lay_out(folder, base, cache, **options), holder=holder)
    assert made.code == protocol.DONE, made.failure
    made.run = None
    holder.tidy()
    return made, holder.store()


def origin(made: Attempt) -> str:
    return str(made.result["base_load"]["from"])


def same(one: Attempt, other: Attempt) -> bool:
    reports = [json.loads((made.folder / "out/reports/precision.json").read_text()) for made in (one, other)]
    told = [[m for m in made.messages if isinstance(m, Note) and "cache" not in m.name] for made in (one, other)]
    return one.adapter_bytes() == other.adapter_bytes() and reports[0] == reports[1] and told[0] == told[1]


def entries(cache: CacheRef) -> list[Path]:
    return sorted(Path(cache.path).iterdir()) if Path(cache.path).exists() else []


KINDS: dict[str, dict[str, Any]] = {
    "default": {"validation": tiny.chat_rows(3), "lora": {"lora_dropout": 0.3}, "sample_prompts": ["the quick"]},
    "fp4_single_fp32": {
        "quantization": {
            "bnb_4bit_quant_type": "fp4",
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_compute_dtype": "float32",
        }
    },
    "kbit": {"quantization": {"prepare_kbit_training": True}},
    "biases": {"lora": {"bias": "all", "target_modules": "all-linear"}},
    "vocabulary": {"rows": [{"prompt": f"{NEW[0]}boats", "completion": f"sea{NEW[1]}"}] * 4},
    "merged": {"export": ["adapter", "merged", "merged_4bit"], "keep": True},
}


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with biases, whose tokenizer has tokens beyond its embedding."""
    folder = tiny.build_base(tmp_path_factory.mktemp("biased"), attention_bias=True, mlp_bias=True)
    return altered(folder, folder, added=NEW)


@pytest.mark.parametrize("kind", KINDS)
def test_a_job_is_the_same_uncached_cold_and_cached(tmp_path: Path, biased: Path, shelf: CacheRef, kind: str):
    options = KINDS[kind]
    alone, nothing = work(tmp_path / "alone", biased, None, **options)
    cold, written = work(tmp_path / "cold", biased, shelf, **options)
    cached, again = work(tmp_path / "cached", biased, shelf, **options)
    assert [origin(made) for made in (alone, cold, cached)] == ["files", "files", "cache"]
    assert nothing is None and written and written.name == "base.cached" and again is None
    assert same(alone, cold) and same(alone, cached)
    assert cached.notes("base.from_cache") and not cold.notes("base.from_cache")
    if kind == "merged":
        one, other = (made.folder / "out/merged/model.safetensors" for made in (alone, cached))
        assert one.read_bytes() == other.read_bytes() and cached.result["merged"]["merged"]["made"]


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "llava"])
def test_every_family_survives_the_disk(tmp_path: Path, shelf: CacheRef, model_type: str):
    if model_type == "llava":
        base = tiny.build_vision(tmp_path / "base", "llava")
    else:
        base = tiny.build_family(tmp_path / "base", model_type, **FAMILIES[model_type])
    options = {"lora": {"target_modules": "all-linear"}}
    cold, written = work(tmp_path / "cold", base, shelf, **options)
    cached, _ = work(tmp_path / "cached", base, shelf, **options)
    assert written and written.name == "base.cached", written
    assert origin(cached) == "cache" and same(cold, cached)


def test_the_entry_is_smaller_and_safetensors_only(tmp_path: Path, shelf: CacheRef):
    base = tiny.build_base(tmp_path / "base", hidden_size=256, intermediate_size=512)
    _, written = work(tmp_path / "cold", base, shelf)
    (entry,) = entries(shelf)
    assert {path.name for path in entry.iterdir()} == {MANIFEST, "model.safetensors", "generation_config.json"}
    assert written and written.data["bytes"] == sum(path.stat().st_size for path in entry.iterdir())
    assert (entry / "model.safetensors").stat().st_size < 0.5 * (base / "model.safetensors").stat().st_size


@pytest.mark.parametrize("options", [{"method": "lora"}, {"method": "full", "lora": None}], ids=["lora", "full"])
def test_a_base_in_16_bit_has_no_entry(tmp_path: Path, base: Path, shelf: CacheRef, options: dict[str, Any]):
    made, written = work(tmp_path / "run", base, shelf, quantization=None, **options)
    assert written is None and not entries(shelf) and origin(made) == "files"


def test_a_base_that_is_stored_in_4_bit_has_no_entry(tmp_path: Path, base: Path, shelf: CacheRef):
    from worker.ml.base import load_weights

    stored = tmp_path / "stored"
    config = nf4_config(None, Precision(torch.bfloat16, torch.bfloat16, torch.bfloat16))
    load_weights(base, "auto", CPU, config).save_pretrained(stored)
    for path in [*base.glob("tokenizer*"), *base.glob("chat_template*")]:
        shutil.copy(path, stored)
    _, written = work(tmp_path / "run", stored, shelf)
    assert written is None and not entries(shelf)


def test_merging_after_training_leaves_no_base_in_memory_to_write_unless_the_process_stays(
    tmp_path: Path, base: Path, shelf: CacheRef
):
    _, written = work(tmp_path / "run", base, shelf, export=["adapter", "merged"])
    assert written is None and not entries(shelf)


def test_a_base_whose_layers_wait_in_host_memory_has_no_entry(
    tmp_path: Path, base: Path, shelf: CacheRef, monkeypatch: pytest.MonkeyPatch
):
    deep = tiny.build_base(tmp_path / "deep", num_hidden_layers=4)
    monkeypatch.setattr(base_of, "room_for_weights", lambda device: 160_000)
    options = {"quantization": {"device_map": "auto"}, "hyperparameters": ONE | {"gradient_checkpointing": True}}
    made, written = work(tmp_path / "run", deep, shelf, **options)
    assert made.notes("base.offloaded") and written is None and not entries(shelf)


def damage(entry: Path, how: str) -> None:
    weights = entry / "model.safetensors"
    content = bytearray(weights.read_bytes())
    if how == "bit_rot":
        content[len(content) // 2] ^= 1
    elif how == "swapped_words":
        middle = len(content) // 2 // 8 * 8
        content[middle : middle + 16] = content[middle + 8 : middle + 16] + content[middle : middle + 8]
    elif how == "torn":
        del content[len(content) // 2 :]
    elif how == "no_manifest":
        (entry / MANIFEST).unlink()
    weights.write_bytes(bytes(content))


@pytest.mark.parametrize("how", ["bit_rot", "swapped_words", "torn", "no_manifest"])
def test_a_damaged_entry_is_dropped_and_made_anew(tmp_path: Path, base: Path, shelf: CacheRef, how: str):
    cold, _ = work(tmp_path / "cold", base, shelf)
    damage(entries(shelf)[0], how)
    made, written = work(tmp_path / "damaged", base, shelf)
    (told,) = made.notes("base.cache_dropped")
    assert told.level == "warning" and told.data["reason"] in told.message
    assert origin(made) == "files" and made.adapter_bytes() == cold.adapter_bytes()
    assert written and written.name == "base.cached"
    after, _ = work(tmp_path / "after", base, shelf)
    assert origin(after) == "cache" and after.adapter_bytes() == cold.adapter_bytes()


def test_other_weights_under_true_hashes_are_noticed(tmp_path: Path, base: Path, shelf: CacheRef):
    other = tiny.build_base(tmp_path / "other", seed=5)
    cold, _ = work(tmp_path / "cold", base, shelf)
    (ours,) = entries(shelf)
    work(tmp_path / "others", other, shelf)
    (theirs,) = set(entries(shelf)) - {ours}
    facts = json.loads((theirs / MANIFEST).read_text()) | {"key": ours.name}
    facts["facts"] = json.loads((ours / MANIFEST).read_text())["facts"]
    (theirs / MANIFEST).write_text(json.dumps(facts))
    shutil.rmtree(ours)
    theirs.rename(ours)
    made, _ = work(tmp_path / "made", base, shelf)
    (told,) = made.notes("base.cache_dropped")
    assert "something else than was written" in told.message and made.adapter_bytes() == cold.adapter_bytes()


def test_what_happens_to_the_files_during_a_run_does_not_reach_it(tmp_path: Path, base: Path, shelf: CacheRef):
    cold, _ = work(tmp_path / "cold", base, shelf)
    weights = entries(shelf)[0] / "model.safetensors"

    def overwrite(message: Message) -> None:
        if message == Stage("train"):
            with weights.open("r+b") as file:
                file.write(b"\xff" * weights.stat().st_size)

    made = attempt(lay_out(tmp_path / "made", base, shelf), on_message=overwrite)
    assert weights.read_bytes()[0] == 255
    assert origin(made) == "cache" and made.adapter_bytes() == cold.adapter_bytes()


def test_a_cache_that_is_no_folder_costs_the_entry(tmp_path: Path, base: Path, shelf: CacheRef):
    Path(shelf.path).write_text("")
    made, told = work(tmp_path / "run", base, shelf)
    assert made.code == protocol.DONE and told and told.name == "base.not_cached"


def test_a_cache_without_room_costs_the_entry_and_says_so(tmp_path: Path, base: Path, shelf: CacheRef):
    for name, bounds in {"small": {"most_bytes": 1000}, "full": {"reserve_bytes": MANY}}.items():
        made, told = work(tmp_path / name, base, replace(shelf, **bounds))
        assert made.code == protocol.DONE and told and told.name == "base.not_cached" and told.level == "warning"
        assert not entries(shelf)


def test_a_disk_that_fills_up_costs_the_entry(tmp_path: Path, base: Path, shelf: CacheRef):
    import resource

    holder = Holder()
    attempt(lay_out(tmp_path / "run", base, shelf), holder=holder)
    holder.tidy()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        told = holder.store()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert told and told.name == "base.not_cached" and not entries(shelf)


def test_a_base_that_the_run_altered_is_not_written(tmp_path: Path, base: Path, shelf: CacheRef):
    holder = Holder()
    made = attempt(lay_out(tmp_path / "run", base, shelf), holder=holder)
    assert made.run
    weight = made.run.model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").base_layer.weight
    weight.data[0] ^= 1
    assert not holder.tidy() and holder.store() is None and not entries(shelf)


def test_the_real_child_writes_after_its_result_and_reads_the_next_time(tmp_path: Path, base: Path, shelf: CacheRef):
    said: list[list[Any]] = []
    for name in ("cold", "cached"):
        child = Child(lay_out(tmp_path / name, base, shelf))
        said.append(list(child.messages()))
        assert child.end() == protocol.DONE
    cold = [message.name if isinstance(message, Note) else message.type for message in said[0]]
    assert cold.index("result") < cold.index("base.cached") and "base.cached" not in [
        message.name for message in said[1] if isinstance(message, Note)
    ]
    reports = [message.report for messages in said for message in messages if isinstance(message, Result)]
    assert [report["base_load"]["from"] for report in reports] == ["files", "cache"]
    files = [tmp_path / name / "out/adapter/adapter_model.safetensors" for name in ("cold", "cached")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_process_that_stays_writes_once(tmp_path: Path, base: Path, shelf: CacheRef):
    holder = Holder()
    told = []
    for name in ("first", "second"):
        made = attempt(lay_out(tmp_path / name, base, shelf, keep=True), holder=holder)
        made.run = None
        assert holder.tidy()
        told.append(holder.store())
    assert told[0] and told[1] is None and origin(made) == "memory"


# ---- what an entry is told apart by ----------------------------------------------------------------------------------


def key(config: dict[str, Any] | None = None, dtype: torch.dtype = torch.bfloat16, identity: Any = "a") -> str:
    from transformers import BitsAndBytesConfig

    values = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    return Shelf(Cache(Path(), 0, 0), identity).form(BitsAndBytesConfig(**values | (config or {})), dtype, CPU).key


@pytest.mark.parametrize(
    "config",
    [
        {"bnb_4bit_quant_type": "fp4"},
        {"bnb_4bit_use_double_quant": True},
        {"bnb_4bit_compute_dtype": torch.float32},
        {"bnb_4bit_quant_storage": torch.bfloat16},
        {"llm_int8_skip_modules": ["lm_head", "vision_tower"]},
    ],
    ids=lambda config: next(iter(config)),
)
def test_every_setting_of_the_quantisation_counts(config: dict[str, Any]):
    assert key(config) != key() == key()


def test_the_dtype_the_base_and_the_format_count(monkeypatch: pytest.MonkeyPatch):
    found = {key(), key(dtype=torch.float16), key(identity="b")}
    monkeypatch.setattr(quantized, "_FORMAT", 99)
    assert len(found | {key()}) == 4


def test_the_device_counts(monkeypatch: pytest.MonkeyPatch):
    before = key()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX9")
    assert key() != before


@pytest.mark.parametrize("package", ["torch", "transformers", "bitsandbytes"])
def test_the_versions_of_the_libraries_count(monkeypatch: pytest.MonkeyPatch, package: str):
    before = key()
    monkeypatch.setattr(quantized, "version", lambda name: "0" if name == package else metadata.version(name))
    assert key() != before


def test_names_and_files_of_the_base_count(tmp_path: Path):
    base = tiny.build_base(tmp_path / "base")
    (tmp_path / "run").mkdir()
    spec = tiny.write_run(tmp_path / "run", base)
    found = [spec.base_identity()]
    for changes in ({"id": "tiny/other"}, {"revision": "fedcba9"}, {"revision": None}):
        found.append(replace(spec, base=replace(spec.base, **changes)).base_identity())
    shutil.rmtree(base)
    tiny.build_base(base, seed=5)
    found.append(TrainSpec.read(tmp_path / "run").base_identity())
    assert len({key(identity=identity) for identity in found}) == 5


# ---- the clock -------------------------------------------------------------------------------------------------------


def test_the_report_times_the_start(tmp_path: Path, base: Path, shelf: CacheRef):
    import time

    folder = lay_out(tmp_path / "run", base, shelf, hyperparameters={"max_steps": 4})
    begun = time.monotonic()
    replace(TrainSpec.read(folder), claimed_at=begun - 100).write(folder)
    report = attempt(folder).result
    whole = time.monotonic() - begun
    parts = report["data_preparation_s"] + report["base_load"]["seconds"]
    assert 100 + parts < report["claim_to_first_step_s"] < 100 + whole
    assert report["data_preparation_s"] > 0 and report["base_load"]["seconds"] > 0
    assert "claim_to_first_step_s" not in attempt(lay_out(tmp_path / "other", base, None)).result
