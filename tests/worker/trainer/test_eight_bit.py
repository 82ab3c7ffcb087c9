"""Products in 8-bit floats: near those in more bits, the gradient of what was computed, and said where they are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.worker.trainer import eager
from tests.worker.trainer.test_kernels import data, lora, run, see_each_other, shifted
from worker.ml.kernels import torch_ops
from worker.ml.kernels.eight_bit import Narrow
from worker.ml.kernels.layer import Recompute
from worker.ml.kernels.operations import operations
from worker.ml.kernels.packed import Packed
from worker.ml.kernels.torch_eight_bit import narrow, narrow_matrix
from worker.trainer import protocol

CPU = torch.device("cpu")


def weights(rows: int = 48, columns: int = 64) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * 0.02


def narrowed(matrix: torch.Tensor) -> Narrow:
    def make(factor: torch.Tensor, turned: bool) -> torch.Tensor:
        return narrow_matrix(matrix, factor, turned=turned)

    return Narrow(operations(CPU), matrix.abs().amax(), tuple(matrix.shape), make)


def test_each_row_has_a_scale_of_its_own():
    x = torch.tensor([[1e-6, -2e-6], [300.0, 7.0], [0.0, 0.0]])
    values, scale = narrow(x)
    assert values[:2].float().abs().amax(1).tolist() == [448.0, 448.0] and values[2].float().tolist() == [0.0, 0.0]
    assert ((values.float() * scale - x).abs() <= x.abs() / 16).all()


def test_a_product_and_its_gradient_see_the_same_weights():
    matrix = weights()
    made = narrowed(matrix)
    # Numbers that 8 bit hold exactly, so that the weights alone are rounded.
    x, grad = torch.eye(64) * 448, torch.eye(48) * 448
    seen, seen_back = made.product(x, None).T / 448, made.product_back(grad) / 448
    assert torch.equal(seen, seen_back)
    assert 0 < float((seen - matrix).norm() / matrix.norm()) < 0.03


@pytest.mark.parametrize("size", [1e-9, 1.0, 3e4])
def test_weights_of_any_size_use_the_range(size: float):
    matrix = weights() * size
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(2))
    made = narrowed(matrix).product(x, torch.ones(48) * size)
    wanted = x @ matrix.T + size
    assert float((made - wanted).norm() / wanted.norm()) < 0.06


def test_what_is_kept_is_what_would_be_made():
    made = narrowed(weights())
    grad = torch.randn(5, 48, generator=torch.Generator().manual_seed(3))
    before = made.product_back(grad)
    made.keep()
    assert torch.equal(made.product_back(grad), before)


@pytest.mark.parametrize("turned", [False, True])
def test_four_bits_become_eight(turned: bool):
    packed = torch.arange(64 * 8, dtype=torch.uint8).view(-1)[: 16 * 64 // 2]
    code, scales = torch.linspace(-1, 1, 16), torch.rand(16, generator=torch.Generator().manual_seed(4)) + 0.5
    held = Packed(packed, scales, code, None, (16, 64))
    whole = torch_ops.dequantize(held, torch.bfloat16)
    made = torch_ops.narrow_weights(held, torch.tensor([2.0]), turned=turned)
    wide = (made.T if turned else made).float() / 2
    assert made.is_contiguous() and ((wide - whole.float()).abs() <= whole.float().abs() / 16 + 2**-10).all()


@pytest.mark.parametrize("way", list(Recompute))
@pytest.mark.parametrize("four_bit", [True, False])
def test_gradients_are_near_those_of_eager_layers(base: Path, four_bit: bool, way: Recompute):
    model = eager.adapted(base, lora(), four_bit=four_bit)
    loss, wanted = eager.eager(model, data(model))
    path = eager.path_of(model, way)
    path.compute_narrow()
    found, ours = eager.fused(path, model, data(model))
    assert found == pytest.approx(loss, rel=1e-3)
    assert eager.worst_cosine(ours, wanted) > 0.98 and eager.worst_error(ours, wanted) > 1e-3
    for alter in (see_each_other, shifted):
        assert eager.worst_cosine(eager.fused(path, model, data(model), alter)[1], wanted) < 0.9
    path.keep_weights()
    assert eager.worst_error(eager.fused(path, model, data(model))[1], ours) == 0


def test_a_job_asks_for_it_and_evaluates_in_the_bases_own_precision(tmp_path: Path, base: Path):
    options: dict[str, Any] = {"lora": {"lora_dropout": 0.0}, "max_steps": 3, "kernels": "fused"}
    wide = run(tmp_path / "wide", base, **options)
    made = run(tmp_path / "made", base, fp8=True, **options)
    assert made.code == wide.code == protocol.DONE
    assert made.result["kernels"]["fp8"] and not wide.result["kernels"]["fp8"] and not made.notes("fp8.off")
    assert made.losses != wide.losses and made.losses == pytest.approx(wide.losses, rel=5e-3)


def test_where_it_is_not_to_be_had_the_job_says_so(tmp_path: Path, base: Path):
    made = run(tmp_path / "run", base, fp8=True, max_steps=1)
    (note,) = made.notes("fp8.off")
    assert made.code == protocol.DONE and note.level == "warning" and "plain path" in note.message
