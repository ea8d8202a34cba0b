"""Products of few rows: packed == fp64 at its edges; other dtypes and numbers of rows are left alone."""

import pytest
import torch

from sps2_engine.layers.linear import Linear
from sps2_kernels.few_rows import LEAST_ROWS, MOST_ROWS, FewRows


@pytest.mark.parametrize("rows", range(MOST_ROWS + 3))
@pytest.mark.parametrize("sizes", [(16, 1), (40, 7), (512, 33)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_layer_equals_fp64(rows: int, sizes: tuple[int, int], *, bias: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, sizes[0], generator=generator)
    added = torch.randn(sizes[1], generator=generator) if bias else None
    layer = Linear(torch.randn(sizes[1], sizes[0], generator=generator), added)
    expected = x.double() @ layer.weight.double().T
    if added is not None:
        expected += added.double()
    layer.pack()
    out = torch.ones(rows, sizes[1])
    with torch.inference_mode():
        y = layer(x)
        layer.add_to(out, x)
    for actual, wanted in ((y, expected), (out, expected + 1)):
        torch.testing.assert_close(actual.double(), wanted, atol=1e-4, rtol=1e-5)


def test_rows_of_zeros_that_fill_up_do_not_touch_the_others() -> None:
    weight = torch.randn(5, 32)
    weight[3] = float("nan")
    packed = FewRows.of(weight)
    assert packed is not None, "the tests' machine has MKL"
    y = packed(torch.ones(3, 32))
    assert y.shape == (3, 5)
    assert y.isnan().nonzero()[:, 1].tolist() == [3, 3, 3]


def test_bf16_and_other_numbers_of_rows_are_torchs() -> None:
    assert FewRows.of(torch.zeros(4, 32, dtype=torch.bfloat16)) is None
    packed = FewRows.of(torch.zeros(4, 32))
    assert packed is not None
    suited = [rows for rows in range(12) if packed.suits(torch.zeros(rows, 32))]
    assert suited == list(range(LEAST_ROWS, MOST_ROWS + 1))
