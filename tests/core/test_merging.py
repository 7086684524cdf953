"""Token merging against loops: the most similar destination, the token map and its two operations, destinations."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference
from agentsd.ops.merging import destinations, match, step_key

CPU = torch.device("cpu")

examples = settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
more_examples = settings(examples, max_examples=150)
seeds = st.integers(0, 2**31)


def largest(a: Tensor) -> float:
    return a.abs().max().item()


def features(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_reference_merges_the_most_similar_sources() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.1], [0.1, 0.1], [0.0, 5.0], [-1.0, 0.0]])
    assert reference.groups_of(x, [0, 1], 0) == [[0], [1], [2], [3], [4], [5]]
    assert reference.groups_of(x, [0, 1], 1) == [[0], [1, 4], [2], [3], [5]]
    assert reference.groups_of(x, [0, 1], 2) == [[0, 2], [1, 4], [3], [5]]
    assert reference.groups_of(x, [0, 1], 3) == [[0, 2, 3], [1, 4], [5]]
    assert reference.groups_of(x, [0, 1], 9) == [[0, 2, 3], [1, 4, 5]]


# How far below the best similarity a chosen one may be: the rounding of its products and of a number near 1.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}


@given(seed=seeds, dtype=st.sampled_from(list(ROUNDING)), count=st.integers(0, 80))
@examples
def test_low_precision_matching(seed: int, dtype: torch.dtype, count: int) -> None:
    """By exact similarities, but for rounding, no source misses its best destination and no better source is left."""
    x, dst = features(96, 16, seed=seed).to(dtype), list(range(0, 96, 6))
    tokens = x.tolist()
    best = {source: similarity for similarity, source, _ in reference.match(x, dst)}
    index = match(x[None], torch.tensor(dst)).token_map(count).index[0]
    groups = [(index == group).nonzero().flatten().tolist() for group in range(index.max() + 1)]
    reached = {
        source: reference.similarity(tokens[source], tokens[destination])
        for group in groups
        for destination in set(group) & set(dst)
        for source in set(group) - {destination}
    }
    assert len(reached) == count
    assert all(best[source] - reached[source] < ROUNDING[dtype] for source in reached)
    left = [best[source] for source in best.keys() - reached.keys()]
    assert all(max(left, default=-1) - similarity < ROUNDING[dtype] for similarity in reached.values())


# --- the index map


def partition(index: Tensor) -> set[frozenset[int]]:
    groups: dict[int, set[int]] = {}
    for token, group in enumerate(index.tolist()):
        groups.setdefault(group, set()).add(token)
    return {frozenset(group) for group in groups.values()}


@st.composite
def maps(draw: Any) -> tuple[Tensor, Tensor, int]:
    """Features, destinations and a number of sources to merge."""
    batch, n, seed = draw(st.integers(1, 3)), draw(st.integers(2, 30)), draw(seeds)
    dst = draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=n - 1, unique=True).map(sorted))
    return features(batch, n, 4, seed=seed), torch.tensor(dst), draw(st.integers(0, n))


@given(case=maps(), dtype=st.sampled_from([torch.float64, torch.float32]))
@more_examples
def test_map_properties(case: tuple[Tensor, Tensor, int], dtype: torch.dtype) -> None:
    x, dst, count = case
    batch, n, _ = x.shape
    token_map = match(x, dst).token_map(count)
    index, sizes = token_map.index, token_map.sizes
    m = n - min(count, n - len(dst))

    assert index.shape == (batch, n)
    assert sizes.shape == (batch, m)
    assert index.min() >= 0
    assert index.max() == m - 1
    assert all(sizes[b].tolist() == [index[b].tolist().count(g) for g in range(m)] for b in range(batch))
    assert sizes.sum(1).tolist() == [n] * batch

    y = features(batch, n, 5, seed=1).to(dtype)
    merged = token_map.merge(y)
    assert merged.shape == (batch, m, 5)
    assert merged.dtype == dtype
    alone = sizes.gather(1, index) == 1
    assert torch.equal(token_map.unmerge(merged)[alone], y[alone])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    assert largest((merged * sizes[..., None]).sum(1) - y.sum(1)) < tolerance

    o = features(batch, m, 3, seed=2).to(dtype)
    spread = token_map.unmerge(o)
    assert torch.equal(spread, torch.stack([o[b][index[b]] for b in range(batch)]))
    assert largest(token_map.merge(spread) - o) < tolerance


@given(case=maps())
@more_examples
def test_map_equals_the_reference(case: tuple[Tensor, Tensor, int]) -> None:
    x, dst, count = case
    token_map = match(x, dst).token_map(count)
    y = features(*x.shape[:2], 3, seed=1)
    for b in range(len(x)):
        groups = reference.groups_of(x[b], dst.tolist(), count)
        assert partition(token_map.index[b]) == {frozenset(group) for group in groups}
        means = reference.unmerge(reference.merge(y[b], groups), groups)
        assert largest(token_map.unmerge(token_map.merge(y))[b] - means) < 1e-12


@pytest.mark.parametrize("kinds", [1, 2, 6])
@given(data=st.data(), n=st.integers(2, 40))
@more_examples
def test_ties_go_to_the_first_destination_and_the_first_sources(kinds: int, data: st.DataObject, n: int) -> None:
    """Tokens along the axes: every similarity is -1, 0 or 1 without rounding, most of them equal."""
    axes = torch.cat([torch.eye(3, dtype=torch.float64), -torch.eye(3, dtype=torch.float64)])
    x = axes[data.draw(st.lists(st.integers(0, kinds - 1), min_size=n, max_size=n))]
    dst = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=n - 1, unique=True))
    count = data.draw(st.integers(0, n))
    token_map = match(x[None], torch.tensor(dst)).token_map(count)
    assert partition(token_map.index[0]) == {frozenset(group) for group in reference.groups_of(x, dst, count)}


def test_matching_sees_directions_only() -> None:
    x = features(2, 30, 6)
    lengths = torch.rand(2, 30, 1, dtype=torch.float64) + 0.1
    dst = torch.arange(0, 30, 5)
    assert torch.equal(match(x, dst).token_map(12).index, match(x * lengths, dst).token_map(12).index)


# --- destinations


@given(h=st.integers(5, 20), w=st.integers(5, 20), sy=st.integers(1, 5), sx=st.integers(1, 5), key=seeds)
@more_examples
def test_one_destination_in_each_cell(h: int, w: int, sy: int, sx: int, key: int) -> None:
    grid, stride = (h, w), (sy, sx)
    cells = [(i, j) for i in range(h // sy) for j in range(w // sx)]
    dst = destinations(grid, stride, key, CPU)
    assert dst.dtype == torch.long
    assert dst.device == CPU
    # In row-major order of the cells; a token of a left-over row or column would lie in none of them.
    assert [(t // w // sy, t % w // sx) for t in dst.tolist()] == cells
    assert torch.equal(dst, destinations(grid, stride, key, CPU))
    assert destinations(grid, stride, None, CPU).tolist() == [i * sy * w + j * sx for i, j in cells]


def test_destinations_differ_between_keys_and_between_cells() -> None:
    drawn = {tuple(destinations((16, 16), (2, 2), key, CPU).tolist()) for key in range(50)}
    assert len(drawn) == 50
    corners = destinations((16, 16), (2, 2), None, CPU)
    assert len(set((destinations((16, 16), (2, 2), 0, CPU) - corners).tolist())) == 4


def test_destinations_are_uniform_over_the_cell() -> None:
    """Over the cells of one step and over the steps of one cell; within 6 standard deviations."""
    grid, stride, keys = (32, 48), (4, 3), [step_key(0, t) for t in range(1, 1000)]
    corners = destinations(grid, stride, None, CPU)
    offsets = torch.stack([destinations(grid, stride, key, CPU) - corners for key in keys])
    allowed = {r * grid[1] + c for r in range(4) for c in range(3)}

    def uniform(values: Tensor) -> bool:
        counts = Counter(values.flatten().tolist())
        mean = values.numel() / 12
        return set(counts) <= allowed and all(abs(counts[o] - mean) < 6 * math.sqrt(mean) for o in allowed)

    assert uniform(offsets)
    assert all(uniform(offsets[:, cell]) for cell in range(offsets.shape[1]))


def test_destinations_do_not_touch_the_global_generator() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = destinations((16, 16), (4, 4), 3, CPU)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(destinations((16, 16), (4, 4), 3, CPU), one)


def test_step_key() -> None:
    assert step_key(0, 981) == step_key(0, 981.0)
    assert isinstance(step_key(0, 981.0), int)
    assert len({step_key(seed, t) for seed in range(20) for t in range(1000)}) == 20 * 1000
    assert step_key(0, 0.5) != step_key(0, 0.25)
