"""The fast path on a card: Triton against torch, gradients against fp32, a whole job within its memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from tests.gpu.running import run
from tests.worker.trainer import eager, families, tiny
from tests.worker.trainer.test_kernels import ATTENTION, lora, see_each_other, shifted
from worker.ml.kernels import torch_ops
from worker.ml.kernels.layer import Recompute
from worker.ml.kernels.packed import Packed
from worker.trainer import protocol

pytestmark = pytest.mark.gpu
LENGTHS = [33, 150, 7, 64]


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())


def test_triton_computes_what_torch_does():
    from worker.ml.kernels import triton_ops

    options = {"device": "cuda", "dtype": torch.bfloat16}
    x, other, weight = (
        torch.randn(517, 4096, **options),
        torch.randn(517, 4096, **options),
        torch.randn(4096, **options),
    )
    a, low = torch.randn(48, 4096, **options), torch.randn(517, 48, **options)
    cos, sin, gate_up = (torch.randn(517, size, **options) for size in (128, 128, 2 * 1408))
    logits, targets = torch.randn(64, 128_256, **options) * 3, torch.randint(0, 128_256, (64,), device="cuda")
    found = []
    for ops in (triton_ops, torch_ops):
        normed, scale = ops.rms_norm(x, weight, 1e-5)
        turned, gradient, chances, added = x.clone(), gate_up.clone(), logits.clone(), x.clone()
        ops.rotate(turned.view(517, 32, 128)[:, :20], cos, sin)
        back = torch.empty(517, 48, 128, **options)
        ops.rotate_back(
            (x.view(517, 32, 128), other[:, :1024].reshape(517, 8, 128), other[:, 1024:2048].reshape(517, 8, 128)),
            back,
            cos,
            sin,
        )
        made = ops.swiglu_grad(other[:, :1408].contiguous(), gradient, wanted=True)
        sums = ops.cross_entropy_grad(chances, targets)
        ops.add_up(added, low, a, 16, 5, 0.1)
        found.append([normed, scale, *ops.add_rms_norm(x, other, weight, 1e-5), ops.apply_norm(x, weight, scale),
                      ops.rms_norm_grad(other, x, weight, scale, x), turned, back, ops.swiglu(gate_up), gradient, made,
                      chances, *sums, added, ops.down(x, a, 16, 5, 0.1),
                      ops.down_grad(low, x, 16, 5, 0.1)])  # fmt: skip
    assert max(distance(ours, theirs) for ours, theirs in zip(*found, strict=True)) < 5e-3


# Whole heads as in Llama and Qwen 3, Phi-3's of no power of two, Phi-4's that turn in part, SmolLM3's that do not turn.
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "turned"),
    [(32, 8, 128, 128), (16, 8, 128, 128), (32, 32, 96, 96), (24, 8, 128, 96), (16, 4, 128, 0), (9, 3, 64, 64)],
)
def test_triton_turns_heads_as_torch_does(heads: int, kv_heads: int, size: int, turned: int):
    from worker.ml.kernels import triton_ops

    options = {"device": "cuda", "dtype": torch.bfloat16}
    cos, sin = (torch.randn(517, turned, **options) for _ in range(2))
    rows, weight = (
        torch.randn(517, heads + 2 * kv_heads, size, **options),
        torch.randn(heads + kv_heads, size, **options),
    )
    grads = tuple(torch.randn(517, count, size, **options) for count in (heads, kv_heads, kv_heads))
    found = []
    for ops in (triton_ops, torch_ops):
        there, back, within = rows.clone(), torch.full_like(rows, float("nan")), rows.clone()
        ops.rotate(there[:, : heads + kv_heads], cos, sin)
        ops.rotate_back(grads, back, cos, sin)
        made = ops.norm_rotate(rows[:, : heads + kv_heads], weight, 1e-6, cos, sin)
        ops.norm_rotate_back(grads, within, weight, 1e-6, cos, sin)
        found.append([there, back, made, within])
    assert max(distance(ours, theirs) for ours, theirs in zip(*found, strict=True)) < 5e-3


@pytest.mark.parametrize("nested", [True, False])
def test_weights_come_out_of_four_bits_as_bitsandbytes_has_them(nested: bool):
    from worker.ml.kernels import triton_ops

    weight = torch.randn(1024, 256, device="cuda", dtype=torch.bfloat16)
    packed, state = quantize_4bit(weight, compress_statistics=nested, quant_type="nf4")
    outer = None
    if nested:
        factors = state.state2.absmax.float()
        outer = state.state2.code, factors, state.offset.float().expand(len(factors)).contiguous()
    ours = triton_ops.dequantize(
        Packed(packed.reshape(-1), state.absmax, state.code, outer, (1024, 256)), torch.bfloat16
    )
    assert torch.equal(ours, dequantize_4bit(packed, state))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("nested", [True, False])
def test_weights_come_out_of_four_bits_in_eight(nested: bool, turned: bool):
    from worker.ml.kernels import triton_ops

    weight = torch.randn(1000, 256, device="cuda", dtype=torch.bfloat16)
    packed, state = quantize_4bit(weight, compress_statistics=nested, quant_type="nf4")
    scales, outer, factor = state.absmax, None, torch.tensor([64.0], device="cuda")
    if nested:
        factors = state.state2.absmax.float()
        outer = state.state2.code, factors, state.offset.float().expand(len(factors)).contiguous()
        # The twin wants whole groups of 256 scales.
        rows = len(scales) // 256 * 256 * 64 // 256
        packed, scales = packed.reshape(-1)[: rows * 128], scales[: rows * 4]
        outer = outer[0], outer[1][: len(scales) // 256], outer[2][: len(scales) // 256]
    shape = (packed.numel() // 128, 256)
    held = Packed(packed.reshape(-1), scales, state.code, outer, shape)
    ours, theirs = (ops.narrow_weights(held, factor, turned=turned).float() for ops in (triton_ops, torch_ops))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("exact", [False, True])
def test_products_in_eight_bit_are_those_of_torch(exact: bool):
    from worker.ml.kernels import triton_ops

    x = (torch.randn(517, 4096, device="cuda") * torch.rand(517, 1, device="cuda") * 50).to(torch.bfloat16)
    matrix = (torch.randn(6144, 4096, device="cuda") * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    scale, bias = torch.full((1, 6144), 2.0**-12, device="cuda"), torch.randn(6144, device="cuda", dtype=torch.bfloat16)
    ours, theirs = (ops.narrow_product(x, matrix, scale, bias, exact=exact) for ops in (triton_ops, torch_ops))
    assert distance(ours, theirs) < 5e-3


@pytest.mark.parametrize("way", list(Recompute))
def test_gradients_in_8_bit_are_near_those_of_eager_layers_in_32(tmp_path: Path, way: Recompute):
    base = tiny.build_base(tmp_path / "base", hidden_size=1024, intermediate_size=2048, num_attention_heads=8)
    model = eager.adapted(base, lora(), four_bit=True, dtype=torch.bfloat16, device="cuda")
    rows = eager.rows(LENGTHS, model.config.vocab_size)
    loss, wanted = eager.eager(eager.reference(model, lora()), rows)
    path = eager.path_of(model, way)
    path.compute_narrow()
    found, ours = eager.fused(path, model, rows)
    # Measured: 0.975.
    assert found == pytest.approx(loss, rel=5e-3) and eager.worst_cosine(ours, wanted) > 0.96
    path.keep_weights()
    assert eager.worst_cosine(eager.fused(path, model, rows)[1], ours) > 0.9999
    for alter in (see_each_other, shifted):
        assert eager.worst_cosine(eager.fused(path, model, rows, alter)[1], wanted) < 0.9


# Sizes of cards: heads of 128, and of 96 for Phi-3.
SIZED = {
    "qwen3": {"head_dim": 128, "num_attention_heads": 16},
    "phi3": {"hidden_size": 768},
    "mistral": {"head_dim": 128},
}


@pytest.mark.parametrize("way", list(Recompute))
@pytest.mark.parametrize("name", families.COVERED)
def test_gradients_in_16_bit_are_those_of_eager_layers_in_32(tmp_path: Path, name: str, way: Recompute):
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8} | SIZED.get(name, {})
    sizes |= {"sliding_window": max(LENGTHS)} if "sliding_window" in families.COVERED[name][1] else {}
    model = families.adapted(
        tmp_path, name, lora("all-linear"), four_bit=True, dtype=torch.bfloat16, device="cuda", **sizes
    )
    rows = eager.rows(LENGTHS, model.config.vocab_size)
    loss, wanted = eager.eager(eager.reference(model, lora("all-linear")), rows)
    path = eager.path_of(model, way)
    found, ours = eager.fused(path, model, rows)
    assert found == pytest.approx(loss, rel=2e-3) and eager.worst_cosine(ours, wanted) > 0.99
    for alter in (see_each_other, shifted):
        assert eager.worst_cosine(eager.fused(path, model, rows, alter)[1], wanted) < 0.9


# The heads of the second are twice as wide together as its hidden state, as in the smallest Qwen 3.
@pytest.mark.parametrize(
    ("name", "sizes", "fp8"),
    [
        ("llama", {}, False),
        ("llama", {}, True),
        ("qwen3", {"head_dim": 128, "num_attention_heads": 16, "num_key_value_heads": 8}, False),
        ("phi3", {}, False),
    ],
)
def test_a_job_stays_within_its_memory_and_follows_the_plain_path(
    tmp_path: Path, name: str, sizes: dict[str, int], fp8: bool
):
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4, "num_attention_heads": 8} | sizes
    sizes |= {"sliding_window": 256} if name == "phi3" else {}
    base = families.build(tmp_path, name, **sizes)
    adapters = {"lora_dropout": 0.0, "target_modules": ["qkv_proj", "o_proj"] if name == "phi3" else ATTENTION}
    options = {"max_steps": 6, "lora": adapters, "gradient_checkpointing": "auto", "optim": "auto"}
    # Small steps: two paths that differ by rounding drift apart with what they learn.
    options["learning_rate"] = 1e-5
    plain = run(tmp_path / "plain", base, kernels="plain", **options)
    made = run(tmp_path / "fused", base, max_memory_gib=0.6, fp8=fp8, **options)
    assert made.code == plain.code == protocol.DONE and made.notes("kernels.fused")
    assert made.result["kernels"]["fp8"] == fp8
    assert made.losses == pytest.approx(plain.losses, abs=0.1 if fp8 else 0.02)
    assert made.result["peak_memory_bytes"] <= 0.6 * 2**30


@pytest.mark.parametrize(
    ("dtype", "heads", "reason"), [("float32", 4, "in torch.float32"), ("bfloat16", 2, "heads of 512 numbers")]
)
def test_what_the_attention_kernel_does_not_take_stays_plain(tmp_path: Path, dtype: str, heads: int, reason: str):
    base = tiny.build_base(tmp_path / "base", hidden_size=1024, num_attention_heads=heads, num_key_value_heads=heads)
    made = run(tmp_path / "run", base, max_steps=1, quantization={"bnb_4bit_compute_dtype": dtype})
    (note,) = made.notes("kernels.plain")
    assert made.code == protocol.DONE and reason in note.message
