"""Attention by blocks: what float64 gives, within the rounding of scores to the tensors' type."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentsd import attention
from agentsd.attention import blockwise_attention, sdpa


def heads(batch: int, count: int, tokens: int, size: int, seed: int = 0) -> Tensor:
    """As a processor makes them: a transposed view."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, count, size, generator=generator, dtype=torch.float64).transpose(1, 2)


def brute_force(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    scores = torch.einsum("bhmd,bhnd->bhmn", q, k) * scale + (0 if mask is None else mask)
    weights = scores.exp()
    return torch.einsum("bhmn,bhnd->bhmd", weights / weights.sum(-1, keepdim=True), v)


@settings(deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 70), st.integers(1, 70), st.integers(1, 9)),
    st.sampled_from([None, "all heads", "each batch element", "each query"]),
    st.sampled_from([None, 0.3]),
    st.tuples(st.integers(1, 5000), st.integers(1, 40)),
)
def test_any_shape_mask_scale_and_block(
    shape: tuple[int, int, int, int, int], masked: str | None, scale: float | None, blocks: tuple[int, int]
) -> None:
    batch, count, m, n, size = shape
    q, k, v = heads(batch, count, m, size), heads(batch, count, n, size, 1), heads(batch, count, n, size, 2)
    mask = heads(1 if masked == "all heads" else batch, 1, 1, n, 3) if masked else None
    mask = heads(batch, count, m, n, 3) if masked == "each query" else mask
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_SCORES_AT_ONCE", blocks[0])
        patch.setattr(attention, "_ROWS_AT_ONCE", blocks[1])
        ours = blockwise_attention(q, k, v, mask, scale=scale)
    expected = brute_force(q, k, v, mask, size**-0.5 if scale is None else scale)
    assert (ours - expected).abs().max() < 1e-12


@pytest.mark.parametrize("masked", [False, True])
def test_half_precision_costs_no_more_than_rounding_the_scores(masked: bool) -> None:
    q, k, v = (heads(2, 8, 600, 40, seed).bfloat16() for seed in range(3))
    mask = heads(2, 1, 1, 600, 3).bfloat16() if masked else None
    exact = brute_force(q.double(), k.double(), v.double(), mask.double() if masked else None, 40**-0.5)

    def error(out: Tensor) -> float:
        return ((out.double() - exact).norm() / exact.norm()).item()

    assert error(blockwise_attention(q, k, v, mask)) < 1e-2
    assert error(sdpa(q, k, v, mask)) < 1e-2


@pytest.mark.parametrize("masked", [False, True])
def test_it_is_an_operation_that_compilers_and_meta_tensors_know(masked: bool) -> None:
    q, k, v = (heads(2, 3, 20, 8, seed) for seed in range(3))
    torch.library.opcheck(blockwise_attention, (q, k, v, heads(2, 1, 1, 20, 3) if masked else None), {"scale": 0.5})


def test_it_is_taken_only_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    q = heads(1, 2, 8, 4)
    taken = []
    monkeypatch.setattr(attention, "blockwise_attention", lambda q, *_, **__: taken.append(q.dtype) or q)
    for faster in (False, True):
        monkeypatch.setattr(attention, "_PRODUCTS_ARE_FASTER", faster)
        for dtype in (torch.float32, torch.bfloat16):
            for grad in (False, True):
                with torch.set_grad_enabled(grad):
                    attention.attention(*[q.to(dtype)] * 3)
    assert taken == [torch.bfloat16]


def test_gradients_take_the_fused_kernel() -> None:
    q, k, v = (heads(1, 2, 8, 4, seed).bfloat16().requires_grad_() for seed in range(3))
    attention.attention(q, k, v).sum().backward()
    assert all(tensor.grad is not None for tensor in (q, v))
