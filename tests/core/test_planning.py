"""The numbers of every level's plan against counts by hand; levels, phases, destinations."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st

import agentsd
from agentsd import KV, Agent, AgentSDConfig, Merge, Phase
from agentsd.ops.merging import destinations, step_key
from agentsd.planning import LayerPlan, Planner, layer_plan, level_grid
from strategies import attentions

EARLY, LATE = 901.0, 301.0  # on both sides of progress 0.4
SD15, SDXL = (1, 2, 3, 4), (2, 3)  # levels with self-attention


def numbers(plan: LayerPlan) -> tuple[Any, ...]:
    return plan.attention, plan.queries, plan.keys, plan.agents, plan.multiply_adds


STOCK_64, STOCK_32, STOCK_16, STOCK_8 = ((None, n, n, 0, 2 * n * n) for n in (4096, 1024, 256, 64))
# 4,096 tokens: 40 % are 1,638, so that 2,458 stay; cells of 4×4 are 256, cells of 2×2 are 1,024, cells of 8×8 are 64.
AGENTS = ("agent", 2458, 2458, 256, 4 * 256 * 2458)
MERGED = ("merge", 2458, 2458, 0, 2 * 2458 * 2458)
BY_HAND = {
    # preset, pixels: by level, what is done early and late.
    ("paper", 512): ((AGENTS, MERGED), (STOCK_32,) * 2, (STOCK_16,) * 2, (STOCK_8,) * 2),
    ("faithful", 512): (
        (("kv", 4096, 1024, 0, 2 * 4096 * 1024),) * 2,
        (STOCK_32,) * 2,
        (STOCK_16,) * 2,
        (STOCK_8,) * 2,
    ),
    ("fast", 512): (
        (("kv", 4096, 64, 0, 2 * 4096 * 64),) * 2,
        (("kv", 1024, 512, 0, 2 * 1024 * 512),) * 2,
        (("kv", 256, 64, 0, 2 * 256 * 64),) * 2,
        (STOCK_8,) * 2,
    ),
    ("hires", 512): (
        (("kv", 4096, 64, 0, 2 * 4096 * 64),) * 2,
        (("kv", 1024, 512, 0, 2 * 1024 * 512),) * 2,
        (STOCK_16,) * 2,
        (STOCK_8,) * 2,
    ),
    ("hires", 1024): (
        (("kv", 16384, 256, 0, 2 * 16384 * 256),) * 2,
        (("kv", 4096, 2048, 0, 2 * 4096 * 2048),) * 2,
        (("kv", 1024, 512, 0, 2 * 1024 * 512),) * 2,
        (STOCK_16,) * 2,
    ),
    # 512×512 tokens: 4,096 cells of 8×8 would be more than 1,024, so that cells are 16×16.
    ("hires", 4096): (
        (("kv", 262144, 1024, 0, 2 * 262144 * 1024),) * 2,
        (("kv", 65536, 32768, 0, 2 * 65536 * 32768),) * 2,
        (("kv", 16384, 8192, 0, 2 * 16384 * 8192),) * 2,
        (STOCK_64,) * 2,
    ),
}


@pytest.mark.usefixtures("shipped_min_tokens")
@pytest.mark.parametrize(("preset", "pixels"), BY_HAND)
def test_the_numbers_of_stable_diffusion_15_are_those_counted_by_hand(preset: str, pixels: int) -> None:
    planner = Planner(AgentSDConfig.from_preset(preset), SD15)
    for level, expected in zip(SD15, BY_HAND[preset, pixels], strict=True):
        grid = level_grid((pixels // 8, pixels // 8), level)
        for timestep, row in zip((EARLY, LATE), expected, strict=True):
            plan = planner.plan(level, grid, timestep, 1000, "meta")
            assert (plan is None) == (row[0] is None)
            assert plan is None or numbers(plan) == row


@pytest.mark.usefixtures("shipped_min_tokens")
@pytest.mark.parametrize("preset", ["paper", "faithful", "fast", "hires"])
def test_describe_shows_them_at_every_layer(preset: str) -> None:
    """On the real network, without memory for its weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    report = agentsd.describe(agentsd.apply(unet, preset))
    expected = BY_HAND[preset, 512]
    assert [sum(row.level == level for row in report.layers) for level in SD15] == [5, 5, 5, 1]
    for row in report.layers:
        early, late = expected[row.level - 1]
        assert [numbers(plan) for plan in row.plans] == ([early, late] if len(row.plans) == 2 else [early])
    notes = {row.level: {plan.note for plan in row.plans} for row in report.layers}
    assert notes[3] == ({"below min_tokens"} if preset == "hires" else {""})


@pytest.mark.usefixtures("shipped_min_tokens")
def test_a_grid_of_1024_tokens_is_the_smallest_that_is_accelerated_by_default() -> None:
    for technique in (Agent(), Merge(), KV()):
        assert layer_plan(Phase(attention=technique), (31, 33)).note == "below min_tokens"
        assert layer_plan(Phase(attention=technique), (31, 33)).attention is None
        assert layer_plan(Phase(attention=technique), (32, 32)).attention is not None
        assert layer_plan(Phase(attention=technique, min_tokens=1023), (31, 33)).attention is not None
        assert layer_plan(Phase(attention=technique, min_tokens=1025), (32, 32)).attention is None


@pytest.mark.parametrize(
    ("technique", "grid", "cell", "expected"),
    [
        (Agent(), (9, 11), (4, 4), ("agent", 60, 60, 5, 4 * 5 * 60)),  # 2×2 cells, but 0.95 leaves 5 of 99 tokens
        (Agent(stride=2, agent_ratio=0.5), (8, 8), (2, 2), ("merge", 39, 39, 0, 2 * 39**2)),  # too many agents
        (Agent(ratio=0.0), (8, 8), (4, 4), ("agent", 64, 64, 4, 4 * 4 * 64)),
        (Merge(stride=(3, 2)), (9, 11), (2, 3), ("merge", 60, 60, 0, 2 * 60**2)),  # 3 wide, 2 high
        (Merge(ratio=0.75), (9, 11), (2, 2), ("merge", 25, 25, 0, 2 * 25**2)),  # 20 cells; 74 of 99 tokens go
        (Merge(ratio=0.0), (8, 8), (1, 1), (None, 64, 64, 0, 2 * 64**2)),
        (Merge(parts=("mlp",)), (8, 8), (2, 2), (None, 64, 64, 0, 2 * 64**2)),
        (KV(stride=8), (7, 99), (1, 1), (None, 693, 693, 0, 2 * 693**2)),  # lower than a cell
        (KV(stride=2, max_agents=3), (9, 11), (6, 6), ("kv", 99, 1, 0, 2 * 99)),
        (None, (8, 8), (1, 1), (None, 64, 64, 0, 2 * 64**2)),
    ],
)
def test_odd_grids_and_strides_are_counted_by_hand(
    technique: Any, grid: tuple[int, int], cell: tuple[int, int], expected: tuple[Any, ...]
) -> None:
    plan = layer_plan(Phase(attention=technique), grid)
    assert numbers(plan) == expected
    assert plan.cell == cell
    assert plan.note == ("smaller than a cell" if grid[0] == 7 else "")


@settings(deadline=None)
@given(technique=attentions, grid=st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_a_plan_keeps_a_token_for_every_cell_and_never_adds_work(technique: Any, grid: tuple[int, int]) -> None:
    plan = layer_plan(Phase(attention=technique), grid)
    tokens = grid[0] * grid[1]
    cells = (grid[0] // plan.cell[0]) * (grid[1] // plan.cell[1])
    assert plan.tokens == tokens
    assert 0 <= plan.merged <= tokens - (cells if plan.merged else 0)
    assert plan.multiply_adds <= 2 * tokens * tokens
    if plan.attention == "kv":
        assert cells <= plan.keys <= plan.queries == tokens
        assert technique.max_agents is None or cells <= technique.max_agents
    if plan.attention == "agent":
        assert cells <= plan.agents < plan.queries / 2
    if plan.attention is None and not plan.merged:
        assert plan.multiply_adds == 2 * tokens * tokens


# --- levels and phases


def test_levels_count_from_the_finest_grid_with_self_attention() -> None:
    config = AgentSDConfig((Phase(attention=KV(), levels=0), Phase(attention=Merge(), levels=-1)))
    for levels, (fine, coarse) in ((SD15, (1, 2)), (SDXL, (2, 3))):
        planner = Planner(config, levels)
        assert planner.covered == {fine, coarse}
        assert [phase.attention for phase in planner.phases[fine]] == [KV()]
        assert [phase.attention for phase in planner.phases[coarse]] == [Merge()]
    assert Planner(AgentSDConfig((Phase(levels=(1, 2)),)), SDXL).covered == {2}


def test_each_level_has_its_own_phases() -> None:
    config = AgentSDConfig(
        (Phase(0.4, Agent(), 1), Phase(0.6, KV(), (1, 2)), Phase(0.9, None, 2), Phase(1.0, Merge(), 1))
    )
    planner = Planner(config, SD15)
    assert planner.covered == {1, 2}
    done = {
        level: [
            plan and plan.attention
            for at in (0.1, 0.39, 0.4, 0.59, 0.6, 0.89, 0.9, 1.0)
            for plan in [planner.plan(level, (32, 32), 1000 * (1 - at), 1000, "cpu")]
        ]
        for level in (1, 2, 3)
    }
    assert done[1] == ["agent", "agent", "kv", "kv", "merge", "merge", "merge", "merge"]
    assert done[2] == ["kv", "kv", "kv", "kv", None, None, None, None]
    assert done[3] == [None] * 8


@pytest.mark.parametrize(
    ("levels", "model", "message"),
    [
        ((3,), SDXL[:1], r"^levels is \[\[3\]\]; UNet has self-attention at levels \[2\]$"),
        ((1, -3), SDXL, r"^levels is \[\[1, -3\]\]; UNet has self-attention at levels \[2, 3\]$"),
    ],
)
def test_a_configuration_that_covers_no_level_is_an_error(levels: Any, model: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Planner(AgentSDConfig((Phase(levels=levels),)), model, "UNet")
    assert not Planner(AgentSDConfig((Phase(attention=None, levels=levels),)), model, "UNet").covered


def test_destinations_are_those_of_seed_and_step_whatever_was_asked_before() -> None:
    phases = (Phase(attention=KV(stride=2)),)
    planner = Planner(AgentSDConfig(phases, seed=3), SD15)
    for timestep in (EARLY, LATE, EARLY):
        plan = planner.plan(1, (16, 12), timestep, 1000, "cpu")
        assert plan is not None
        assert plan.destinations is not None
        assert torch.equal(plan.destinations, destinations((16, 12), (2, 2), step_key(3, timestep), "cpu"))
    corner = Planner(AgentSDConfig(phases, seed=None), SD15).plan(1, (16, 12), EARLY, 1000, "cpu")
    assert corner is not None
    assert corner.destinations is not None
    assert torch.equal(corner.destinations, destinations((16, 12), (2, 2), None, "cpu"))
