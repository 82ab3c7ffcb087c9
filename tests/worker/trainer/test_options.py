"""Every option of a job has the effect that its name promises."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from common.schemas.hyperparameters import Hyperparameters
from tests.worker.trainer import tiny
from tests.worker.trainer.conftest import Attempt, Go
from worker.trainer.protocol import Checkpoint, Progress

FLOAT32 = {"bnb_4bit_compute_dtype": "float32"}


def change(made) -> float:
    """Return how far the adapter's B matrices, which begin at zero, have gone."""
    return max(float(tensor.abs().max()) for name, tensor in made.weights().items() if "lora_B" in name)


def test_the_learning_rate_sets_the_size_of_a_step(go: Go):
    assert change(go(learning_rate=1e-12)) < 1e-10
    assert 0.005 < change(go(learning_rate=1e-2)) < 0.05


def test_gradients_are_clipped(go: Go):
    free = go(max_grad_norm=0.0, quantization=FLOAT32)
    wide = go(max_grad_norm=1000.0, quantization=FLOAT32)
    tight = go(max_grad_norm=1e-9, quantization=FLOAT32)
    assert free.adapter_bytes() == wide.adapter_bytes()
    # Gradients far below Adam's epsilon move the weights by a fraction of the learning rate.
    assert change(tight) < change(free) / 10
    assert all(values["grad_norm"] > 0.1 for values in tight.metrics())


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("linear", 0.0, [1.0, 0.75, 0.5, 0.25]),
        ("constant", 0.0, [1.0, 1.0, 1.0, 1.0]),
        ("linear", 0.5, [0.0, 0.5, 1.0, 0.5]),
        ("constant_with_warmup", 0.5, [0.0, 0.5, 1.0, 1.0]),
        ("cosine", 0.0, [(1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]),
    ],
)
def test_the_learning_rate_follows_schedule_and_warmup(go: Go, schedule: str, warmup: float, expected: list[float]):
    made = go(max_steps=4, learning_rate=1e-3, lr_scheduler_type=schedule, warmup_ratio=warmup)
    rates = [values["learning_rate"] for values in made.metrics()]
    assert rates == pytest.approx([1e-3 * share for share in expected])


def test_warm_up_may_be_given_in_steps(go: Go):
    made = go(max_steps=4, learning_rate=1e-3, lr_scheduler_type="constant_with_warmup", warmup_steps=3)
    rates = [values["learning_rate"] for values in made.metrics()]
    assert rates == pytest.approx([0.0, 1e-3 / 3, 2e-3 / 3, 1e-3])


def test_a_polynomial_takes_any_rate(go: Go):
    made = go(max_steps=2, learning_rate=1e-8, lr_scheduler_type="polynomial")
    assert [m["learning_rate"] for m in made.metrics()] == pytest.approx([1e-8, 5e-9])


def test_the_constants_of_adam_are_honoured(go: Go):
    plain = go()
    # Without a memory of earlier gradients each step goes its own way; a large epsilon makes every step small.
    assert go(adam_beta1=0.0).adapter_bytes() != plain.adapter_bytes()
    assert go(adam_beta2=0.5).adapter_bytes() != plain.adapter_bytes()
    assert change(go(adam_epsilon=1.0)) < change(plain) / 5


def test_neftune_disturbs_training_and_no_evaluation(go: Go):
    options = {"validation": tiny.chat_rows(4), "eval_steps": 1, "learning_rate": 1e-12, "lora": {"lora_dropout": 0.0}}
    plain, noisy, noisier = (go(neftune_noise_alpha=alpha, **options) for alpha in (0.0, 5.0, 50.0))
    assert noisy.losses != plain.losses and noisier.losses != noisy.losses
    evaluated = [[values["loss"] for values in made.metrics("eval")] for made in (plain, noisy)]
    assert evaluated[0] == pytest.approx(evaluated[1], abs=1e-6)


def test_weight_decay_shrinks_the_weights(go: Go):
    options = {"method": "lora", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 1e-9}
    plain, decayed = (go(weight_decay=decay, **options).weights() for decay in (0.0, 0.5))
    name = next(name for name in plain if "lora_A" in name)
    assert decayed[name].norm() / plain[name].norm() == pytest.approx(0.95**3, rel=0.01)


def test_epochs_make_the_steps(go: Go):
    made = go(max_steps=-1, num_train_epochs=2.0)
    assert made.result["steps"] == 6 and made.result["tokens_trained"] == 2 * 264
    assert go(max_steps=-1, num_train_epochs=0.5).result["steps"] == 2


def test_accumulated_micro_batches_equal_one_batch(go: Go):
    runs = [
        go(
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=4 // micro,
            quantization=FLOAT32,
            lora={"lora_dropout": 0.0},
        )
        for micro in (4, 2, 1)
    ]
    for made in runs[1:]:
        assert made.losses == pytest.approx(runs[0].losses, abs=1e-5)


def test_the_memory_ladder_keeps_the_effective_batch(go: Go):
    options = {"quantization": FLOAT32, "lora": {"lora_dropout": 0.0}, "gradient_checkpointing": False}
    plain = go(**options)
    halved, checkpointed = go(shrink=1, **options), go(shrink=2, **options)
    assert halved.losses == pytest.approx(plain.losses, abs=1e-5)
    assert checkpointed.losses == pytest.approx(plain.losses, abs=1e-5)
    assert halved.run and (halved.run.options.micro_batch, halved.run.options.accumulation) == (1, 4)
    assert not halved.run.options.checkpointing
    assert checkpointed.run and checkpointed.run.options.checkpointing
    assert "micro-batch 2 → 1, accumulation 2 → 4" in halved.notes("memory.shrunk")[0].message
    assert not plain.notes("memory.shrunk")


def test_rows_of_similar_length_come_together(go: Go):
    grouped, plain = go(group_by_length=True), go(group_by_length=False)
    assert grouped.run and plain.run
    lengths = [len(row) for row in grouped.run.train_rows["input_ids"]]
    assert sorted(order(grouped)) == sorted(order(plain)) == list(range(12))
    found = [lengths[index] for index in order(grouped)]
    # The longest row first, so that a lack of memory shows at once; each step's micro-batches sorted by length.
    assert found[0] == max(lengths)
    assert all(found[start : start + 4] == sorted(found[start : start + 4], reverse=True) for start in (4, 8))
    other = [lengths[index] for index in order(plain)]
    assert any(other[start : start + 4] != sorted(other[start : start + 4], reverse=True) for start in (4, 8))


def test_the_seed_draws_the_adapter_the_order_and_the_noise(go: Go):
    still = {"learning_rate": 1e-12, "group_by_length": False, "neftune_noise_alpha": 20.0}
    # One row has one order, and an adapter whose B is zero changes nothing: what is left to differ is the noise.
    made, same, other = (go(tiny.chat_rows(1), max_steps=1, seed=seed, **still) for seed in (1, 1, 2))
    assert made.losses == same.losses and abs(made.losses[0] - other.losses[0]) > 1e-3
    name = next(name for name in made.weights() if "lora_A" in name)
    assert torch.equal(made.weights()[name], same.weights()[name])
    assert not torch.allclose(made.weights()[name], other.weights()[name])
    first, second = (order(go(max_steps=1, seed=seed, **still)) for seed in (1, 2))
    assert first != second


def order(made: Attempt) -> list[int]:
    """Return the rows of the first epoch as the trainer's loader hands them out."""
    assert made.run
    loader = made.run.trainer.get_train_dataloader()
    loader.set_epoch(0)
    return [index for batch in loader.batch_sampler for index in batch]


def test_packed_rows_do_not_see_each_other(go: Go):
    options = {"gradient_accumulation_steps": 1, "max_steps": 1, "quantization": FLOAT32, "lora": {"lora_dropout": 0.0}}
    rows = go(per_device_train_batch_size=12, max_length=256, **options)
    packed = go(per_device_train_batch_size=2, max_length=256, packing=True, **options)
    assert packed.run and len(packed.run.train_rows) == 2
    assert packed.losses == pytest.approx(rows.losses, abs=1e-5)
    assert packed.result["tokens_trained"] == rows.result["tokens_trained"] == 264


def test_wrapped_rows_are_one_thread_that_is_cut(go: Go):
    options = {"gradient_accumulation_steps": 1, "max_steps": 1, "quantization": FLOAT32, "lora": {"lora_dropout": 0.0}}
    wrapped = go(packing="wrapped", max_length=48, **options)
    assert wrapped.run
    lengths = [len(row) for row in wrapped.run.train_rows["input_ids"]]
    # 264 tokens, none of them lost, though rows are longer than that: the last sequence is what is left.
    assert lengths == [48] * 5 + [24] and wrapped.result["data"]["rows_cut"] == 0
    assert wrapped.result["data"]["max_length"] == 48
    assert go(packing="wrapped", max_length=8, **options).result["data"]["rows_dropped"] == 0
    # In an order drawn from the seed, so that neighbours in the file are none in the thread.
    other = go(packing="wrapped", max_length=48, seed=7, **options)
    assert other.run and other.run.train_rows["input_ids"][0] != wrapped.run.train_rows["input_ids"][0]


def test_wrapped_rows_see_each_other(go: Go):
    options = {"gradient_accumulation_steps": 1, "max_steps": 1, "quantization": FLOAT32, "lora": {"lora_dropout": 0.0}}
    apart = go(packing="bfd", max_length=256, per_device_train_batch_size=2, **options)
    joined = go(packing="wrapped", max_length=256, per_device_train_batch_size=2, **options)
    assert apart.result["tokens_trained"] == joined.result["tokens_trained"] == 264
    assert abs(apart.losses[0] - joined.losses[0]) > 1e-3
    same = go(packing=True, max_length=256, per_device_train_batch_size=2, **options)
    assert same.adapter_bytes() == apart.adapter_bytes()


def test_max_length_cuts_and_says_so(go: Go):
    made = go(max_length=24)
    assert made.run and max(len(row) for row in made.run.train_rows["input_ids"]) == 24
    note = made.notes("rows.truncated")[0]
    assert note.level == "warning" and "longer than max_length 24" in note.message
    assert note.data["rows_cut"] == made.result["data"]["rows_cut"] > 0


def test_saves_logs_and_evaluations_come_at_their_steps(go: Go):
    made = go(max_steps=7, save_steps=3, eval_steps=2, logging_steps=3, validation=tiny.chat_rows(4))
    assert [m.step for m in made.messages if isinstance(m, Checkpoint)] == [3, 6, 7]
    assert made.run
    steps = {kind: [entry["step"] for entry in made.run.metrics if entry["kind"] == kind] for kind in ("train", "eval")}
    assert steps == {"train": [1, 3, 6, 7], "eval": [2, 4, 6, 7]}
    report = made.result
    assert report["eval_loss"] == made.metrics("eval")[-1]["loss"]
    assert report["eval_perplexity"] == pytest.approx(math.exp(report["eval_loss"]))
    progress = [m for m in made.messages if isinstance(m, Progress)]
    assert (progress[0].step, progress[-1].step, progress[-1].max_steps) == (0, 7, 7)


def test_training_lowers_the_loss(go: Go):
    losses = go(max_steps=30, learning_rate=2e-2, num_train_epochs=10.0).losses
    assert losses[-1] < losses[0] - 0.5


def test_the_adapter_has_the_asked_form(go: Go, tmp_path: Path):
    biased = tiny.build_base(tmp_path / "biased", attention_bias=True)
    lora = {
        "r": 3,
        "lora_alpha": 7.5,
        "lora_dropout": 0.25,
        "bias": "lora_only",
        "target_modules": ["q_proj", "down_proj"],
    }
    made = go(base=biased, lora=lora)
    config = json.loads((made.folder / "out" / "adapter" / "adapter_config.json").read_text())
    assert {name: config[name] for name in lora} == lora | {"target_modules": ["down_proj", "q_proj"]}
    weights = made.weights()
    targets = {name.split(".")[-3] for name in weights if "lora_" in name}
    assert targets == {"q_proj", "down_proj"}
    assert all(3 in tensor.shape for name, tensor in weights.items() if "lora_" in name)
    biases = {name for name in weights if name.endswith(".bias")}
    assert len(biases) == 2 and all("q_proj" in name for name in biases)
    every = go(base=biased, lora=lora | {"bias": "all"}, max_steps=1).weights()
    assert len([name for name in every if name.endswith(".bias")]) == 2 * len("qkvo")


def test_dropout_disturbs_training_on_the_plain_path(go: Go):
    plain, dropped = (go(lora={"lora_dropout": share}, quantization=FLOAT32) for share in (0.0, 0.5))
    # Nothing passes through B before the first step, so there is nothing to drop.
    assert plain.losses[0] == dropped.losses[0] and abs(plain.losses[2] - dropped.losses[2]) > 1e-4


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (r".*layers\.1\..*(gate|up)_proj", {"gate_proj", "up_proj"}),
    ],
)
def test_targets_may_be_a_word_or_a_pattern(go: Go, targets: str, expected: set[str]):
    names = go(max_steps=1, lora={"target_modules": targets}).weights()
    assert {name.split(".")[-3] for name in names} == expected
    assert targets == "all-linear" or all(".layers.1." in name for name in names)


@pytest.mark.parametrize(
    ("quantization", "kind", "nested"),
    [
        ({}, "nf4", True),
        ({"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}, "fp4", False),
    ],
)
def test_the_base_is_quantised_as_asked(go: Go, quantization: dict, kind: str, nested: bool):
    made = go(max_steps=1, quantization=quantization)
    assert made.run
    states = [p.quant_state for p in made.run.model.parameters() if getattr(p, "quant_state", None) is not None]
    assert len(states) == 14 and {(state.quant_type, state.nested) for state in states} == {(kind, nested)}
    assert not any(
        parameter.requires_grad for name, parameter in made.run.model.named_parameters() if "lora_" not in name
    )


def test_a_lora_base_stays_in_16_bit(go: Go):
    made = go(max_steps=1, method="lora")
    assert made.run and made.result["precision"]["parameters"].keys() == {"bfloat16", "float32"}
    assert made.result["precision"]["parameters"]["float32"] == made.result["trainable_parameters"]


def test_the_compute_dtype_is_honoured(go: Go):
    made = go(max_steps=1, quantization=FLOAT32)
    assert made.result["precision"]["compute_dtype"] == "float32"
    assert {tensor.dtype for tensor in made.weights().values()} == {torch.float32}
    half = go(max_steps=1, quantization={"bnb_4bit_compute_dtype": "float16"})
    assert "the CPU trains no fp16" in half.notes("option.replaced")[0].message


@pytest.mark.parametrize(
    ("asked", "taken", "kind", "bits"),
    [
        ("paged_adamw_8bit", "adamw_torch_fused", "AdamW", None),
        ("paged_adamw_32bit", "adamw_torch_fused", "AdamW", None),
        ("adamw_8bit", "adamw_8bit", "AdamW", 8),
        ("adamw_torch", "adamw_torch", "AdamW", None),
        ("adamw_torch_fused", "adamw_torch_fused", "AdamW", None),
        ("ademamix_8bit", "ademamix_8bit", "AdEMAMix", 8),
        ("lion_8bit", "lion_8bit", "Lion", 8),
        ("lion_32bit", "lion_32bit", "Lion", 32),
        ("paged_lion_8bit", "lion_32bit", "Lion", 32),
    ],
)
def test_the_optimizer_is_the_asked_one_or_named(go: Go, asked: str, taken: str, kind: str, bits: int | None):
    made = go(max_steps=1, optim=asked)
    assert made.run and made.run.trainer.optimizer is not None
    optimizer = made.run.trainer.optimizer.optimizer
    assert type(optimizer).__name__ == kind
    assert (optimizer.args.optim_bits if type(optimizer).__module__.startswith("bitsandbytes") else None) == bits
    assert bool(optimizer.defaults.get("fused")) == (taken == "adamw_torch_fused")
    notes = [note for note in made.notes("option.replaced") if note.message.startswith("optim")]
    assert [note.data for note in notes] == ([{"asked": asked, "taken": taken}] if taken != asked else [])


def test_checkpointing_changes_memory_and_not_the_numbers(go: Go, tmp_path: Path):
    deep = tiny.build_base(tmp_path / "deep", num_hidden_layers=6)
    runs = [go(base=deep, gradient_checkpointing=every) for every in (False, 3, 2, True)]
    assert len({tuple(made.losses) for made in runs}) == 1
    kept = [kept_bytes(made) for made in runs]
    assert kept[0] > kept[1] > kept[2] > kept[3]
    assert [made.result["checkpointed_layers"] for made in runs] == [0, 2, 3, 6]


def kept_bytes(made: Attempt) -> int:
    """Return what one forward in training keeps for its backward."""
    assert made.run
    sizes: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    made.run.model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        made.run.model(input_ids=torch.arange(60)[None], use_cache=False)
    return sum(sizes.values())


def test_the_loss_is_on_what_was_asked(go: Go):
    rows = [
        {"messages": [*first["messages"], *second["messages"]]}
        for first, second in zip(tiny.chat_rows(12), tiny.chat_rows(12)[::-1], strict=True)
    ]
    runs = {loss: go(rows, loss=loss, max_length=128) for loss in ("all", "assistant", "completion", "auto")}
    counts = {loss: made.result["loss_tokens_trained"] for loss, made in runs.items()}
    assert (
        counts["all"] == runs["all"].result["tokens_trained"] - 12
        and counts["completion"] < counts["assistant"] < counts["all"]
    )
    assert runs["auto"].adapter_bytes() == runs["assistant"].adapter_bytes()
    assert len({runs[loss].adapter_bytes() for loss in ("all", "assistant", "completion")}) == 3
    assert "on the whole text" in runs["all"].notes("loss.chosen")[0].message


def test_a_message_of_weight_zero_teaches_nothing(go: Go):
    rows = tiny.chat_rows(12)
    for row in rows:
        row["messages"] += [{"role": "user", "content": "sea"}, {"role": "assistant", "content": "boats"}]
    muted = [{"messages": [*row["messages"][:3], {**row["messages"][3], "weight": 0}]} for row in rows]
    plain, silent = go(rows), go(muted)
    assert silent.result["tokens_trained"] == plain.result["tokens_trained"]
    assert silent.result["loss_tokens_trained"] < plain.result["loss_tokens_trained"]


def test_the_chat_template_of_the_request_is_used_and_saved(go: Go):
    template = tiny.CHATML.replace("'<|im_start|>' + message['role'] + '\n'", "'the ' + message['role'] + ' sings '")
    made, plain = go(chat_template=template), go()
    assert made.run and made.run.tokenizer.decode(made.run.train_rows[0]["input_ids"]).startswith("the user sings ")
    assert made.notes("template.replaced") and not plain.notes("template.replaced")
    saved = AutoTokenizer.from_pretrained(made.folder / "out" / "adapter")
    assert saved.chat_template == template


def test_everything_may_be_auto(go: Go):
    names = list(Hyperparameters.model_fields)
    made = go(**dict.fromkeys(names, "auto"))
    chosen = made.notes("auto.resolved")[0].data
    # What loss "auto" came to depends on the rows, and the kernels with their memory and fp8 on the card: other events
    # say it.
    # The best weights go with early stopping.
    elsewhere = {"loss", "load_best_model_at_end", "kernels", "fp8", "max_memory_gib"}
    assert set(chosen) == set(names) - elsewhere and made.notes("loss.chosen") and made.notes("kernels.plain")
    # Twelve rows are few: three epochs of one step each. The base's context is shorter than 1024.
    assert made.result["steps"] == 3 and chosen["max_length"] == 256
