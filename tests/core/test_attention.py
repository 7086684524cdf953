"""The equations of agent attention against loops, and attention by blocks against float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference
from agentsd.ops import kernels
from agentsd.ops.attention import agent_attention, sdpa, size_weighted_attention
from agentsd.ops.kernels import blockwise_attention

examples = settings(deadline=None, max_examples=30)
more_examples = settings(deadline=None, max_examples=150)
seeds = st.integers(0, 2**31)


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
        patch.setattr(kernels, "_SCORES_AT_ONCE", blocks[0])
        patch.setattr(kernels, "_ROWS_AT_ONCE", blocks[1])
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
    for faster in (False, True):
        monkeypatch.setattr(kernels, "plain_products_are_faster", lambda faster=faster: faster)
        assert kernels.choose() is (kernels.attention if faster else sdpa)
    q = heads(1, 2, 8, 4)
    taken = []
    monkeypatch.setattr(kernels, "blockwise_attention", lambda q, *_, **__: taken.append(q.dtype) or q)
    for dtype in (torch.float32, torch.bfloat16):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                kernels.attention(*[q.to(dtype)] * 3)
    assert taken == [torch.bfloat16]


def test_gradients_take_the_fused_kernel() -> None:
    q, k, v = (heads(1, 2, 8, 4, seed).bfloat16().requires_grad_() for seed in range(3))
    kernels.attention(q, k, v).sum().backward()
    assert all(tensor.grad is not None for tensor in (q, v))


# --- agent attention and attention weighted by size


def largest(a: Tensor) -> float:
    return a.abs().max().item()


def peaked(batch: int, count: int, tokens: int, size: int, seed: int = 0) -> Tensor:
    return 2 * heads(batch, count, tokens, size, seed)


qkva = st.builds(
    lambda b, h, n, m, d, seed: (*(peaked(b, h, n, d, seed + i) for i in range(3)), peaked(b, h, m, d, seed + 3)),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 24),
    st.integers(1, 8),
    st.integers(1, 8),
    seeds,
)


@given(tensors=qkva, scale2=st.one_of(st.none(), st.floats(0.05, 2)), shortcut=st.floats(0, 1))
@more_examples
def test_agent_attention_equals_loops(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor], scale2: float | None, shortcut: float
) -> None:
    q, k, v, a = tensors
    ours = agent_attention(q, k, v, a, scale2=scale2, shortcut=shortcut)
    s = q.shape[-1] ** -0.5 if scale2 is None else scale2
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            theirs = reference.agent_attention(q[b, h], k[b, h], v[b, h], a[b, h], s, shortcut)
            assert largest(ours[b, h] - theirs) < 1e-12


@given(tensors=qkva, s=st.floats(0.05, 2))
@more_examples
def test_agent_attention_is_generalised_linear_attention(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor], s: float
) -> None:
    """O = φq(Q) φk(K)ᵀ V, φq(Q) = softmax(Q Aᵀ s), φk(K) = softmax(A Kᵀ d^-0.5)ᵀ, whichever product comes first."""
    q, k, v, a = tensors
    phi_q = torch.exp(q @ a.mT * s)
    phi_q = phi_q / phi_q.sum(-1, keepdim=True)
    phi_k_t = torch.exp(a @ k.mT * q.shape[-1] ** -0.5)
    phi_k_t = phi_k_t / phi_k_t.sum(-1, keepdim=True)
    mixing = phi_q @ phi_k_t
    o = agent_attention(q, k, v, a, scale2=s)
    assert largest(o - phi_q @ (phi_k_t @ v)) < 1e-12
    assert largest(o - mixing @ v) < 1e-12
    # A softmax over the tokens, like the attention that it stands for.
    assert largest(agent_attention(q, k, torch.ones_like(v), a, scale2=s) - 1) < 1e-12


@given(tensors=qkva, data=st.data())
@examples
def test_agent_attention_does_not_know_the_order_of_the_agents(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor], data: st.DataObject
) -> None:
    q, k, v, a = tensors
    shuffled = a[:, :, data.draw(st.permutations(range(a.shape[2])))]
    assert largest(agent_attention(q, k, v, shuffled) - agent_attention(q, k, v, a)) < 1e-12


def test_agent_attention_attends_with_what_it_is_given() -> None:
    shapes = []

    def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        shapes.append((q.shape[2], k.shape[2]))
        return F.scaled_dot_product_attention(q, k, v, **options)

    q, k, v, a = (peaked(1, 2, n, 4, i) for i, n in enumerate((12, 12, 12, 3)))
    o = agent_attention(q, k, v, a, scale2=0.7, shortcut=0.1, attend=attend)
    assert shapes == [(3, 12), (12, 3)]
    assert torch.equal(o, agent_attention(q, k, v, a, scale2=0.7, shortcut=0.1))


@given(tensors=qkva, data=st.data())
@examples
def test_attention_weighted_by_size_is_exact_for_groups_of_equal_tokens(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor], data: st.DataObject
) -> None:
    q, k, v, _ = tensors
    sizes = torch.tensor(data.draw(st.lists(st.integers(1, 5), min_size=k.shape[2], max_size=k.shape[2])))
    every_k, every_v = (tensor.repeat_interleave(sizes, dim=2) for tensor in (k, v))
    ours = size_weighted_attention(q, k, v, sizes.expand(len(q), -1))
    assert largest(ours - brute_force(q, every_k, every_v, None, q.shape[-1] ** -0.5)) < 1e-12
