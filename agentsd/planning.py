"""What each level of a model does in a call, as final numbers: the only planner, for every host."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from agentsd.config import KV, Agent, AgentSDConfig, Merge, Phase, cell
from agentsd.ops.merging import destinations, step_key
from agentsd.schedule import in_force, progress

# Matching fewer tokens takes longer than attention to them: measured with agentsd-bench --latent 16 32.
MIN_TOKENS = 1024


@dataclass(frozen=True)
class LayerPlan:
    """What the layers of one level do in one call of the model.

    Attributes:
        attention: `agent`, `merge` or `kv`; None leaves it unmodified.
        grid: height and width of the token grid.
        cell: height and width of a cell, (sy, sx), each with one destination.
        merged: how many tokens are merged away before the attention, or before other `parts` of the block.
        keys: how many keys the queries, or in aggregation the agents, attend to.
        agents: how many agents there are; 0 but in `agent`.
        parts: of the transformer block, which compute merged tokens.
        proportional: whether keys are weighted by the sizes of their groups.
        k_scale2, k_shortcut: of `Agent`.
        note: why the level is unmodified although a phase covers it.
        destinations: token indices, int64; None where nothing is matched.
    """

    attention: str | None
    grid: tuple[int, int]
    cell: tuple[int, int] = (1, 1)
    merged: int = 0
    keys: int = 0
    agents: int = 0
    parts: tuple[str, ...] = ()
    proportional: bool = False
    k_scale2: float = 1.0
    k_shortcut: float = 0.0
    note: str = ""
    destinations: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens of the grid."""
        return self.grid[0] * self.grid[1]

    @property
    def queries(self) -> int:
        """Number of queries."""
        return self.tokens - self.merged if self.attention in ("agent", "merge") else self.tokens

    @property
    def multiply_adds(self) -> int:
        """Of both matrix products of the attention, per channel."""
        return 4 * self.agents * self.queries if self.agents else 2 * self.queries * self.keys


def level_grid(sample: tuple[int, int], level: int) -> tuple[int, int]:
    """Height and width of the token grid of a level: each downsampler halves, rounding up."""
    scale = 1 << (level - 1)
    return -(-sample[0] // scale), -(-sample[1] // scale)


def layer_plan(phase: Phase | None, grid: tuple[int, int]) -> LayerPlan:
    """The numbers of a phase on a token grid, without destinations."""
    tokens = grid[0] * grid[1]
    unmodified = LayerPlan(None, grid, keys=tokens)
    if phase is None or phase.attention is None:
        return unmodified
    if tokens < (MIN_TOKENS if phase.min_tokens is None else phase.min_tokens):
        return replace(unmodified, note="below min_tokens")
    technique = phase.attention
    sy, sx = cell(technique.stride)
    factor, limit = 1, technique.max_agents if isinstance(technique, KV) else None
    while limit and (grid[0] // (factor * sy)) * (grid[1] // (factor * sx)) > limit:
        factor += 1
    sy, sx = factor * sy, factor * sx
    groups = (grid[0] // sy) * (grid[1] // sx)
    if not groups:
        return replace(unmodified, note="smaller than a cell")

    def merged(share: float) -> int:
        return min(int(tokens * share), tokens - groups)

    if isinstance(technique, KV):
        return LayerPlan("kv", grid, (sy, sx), keys=tokens - merged(technique.kv_ratio))
    away = merged(technique.ratio)
    if isinstance(technique, Agent):
        agents = tokens - merged(technique.agent_ratio)
        if 2 * agents < tokens - away:
            constants = technique.k_scale2, technique.k_shortcut
            return LayerPlan("agent", grid, (sy, sx), away, tokens - away, agents, ("attn",), False, *constants)
    if not away:
        return unmodified
    parts = technique.parts if isinstance(technique, Merge) else ("attn",)
    attention = "merge" if "attn" in parts else None
    proportional = isinstance(technique, Merge) and technique.proportional
    return LayerPlan(attention, grid, (sy, sx), away, tokens - away if attention else tokens, 0, parts, proportional)


class Planner:
    """What the levels of a model do at each timestep.

    Args:
        config: the configuration.
        levels: at which the model has self-attention.
        model: its name, for messages.

    Attributes:
        covered: the levels at which something is other than stock in some phase.

    Raises:
        ValueError: the configuration covers none of the levels.
    """

    def __init__(self, config: AgentSDConfig, levels: Iterable[int], model: str = "the model") -> None:
        self.config = config
        self.levels = tuple(sorted(set(levels)))
        self.phases: dict[int, tuple[Phase, ...]] = {}
        for level in self.levels:
            names = {level, self.levels[0] - level}
            self.phases[level] = tuple(phase for phase in config.phases if names & set(phase.levels))
        self.covered = frozenset(n for n, phases in self.phases.items() if any(phase.attention for phase in phases))
        asked = [list(phase.levels) for phase in config.phases if phase.attention]
        if asked and not self.covered:
            raise ValueError(f"levels is {asked}; {model} has self-attention at levels {list(self.levels)}")
        # Functions of their arguments alone: the layers of a step, conditional or not, ask for the same few.
        self._numbers = lru_cache(maxsize=256)(layer_plan)
        self._destinations = lru_cache(maxsize=16)(destinations)

    def parts(self, level: int) -> frozenset[str]:
        """The parts of a transformer block of a level that compute merged tokens in some phase."""
        merges = (phase.attention for phase in self.phases[level] if isinstance(phase.attention, Merge))
        return frozenset(part for merge in merges for part in merge.parts)

    def plan(
        self, level: int, grid: tuple[int, int], timestep: float, num_train_timesteps: int, device: torch.device | str
    ) -> LayerPlan | None:
        """What the layers of a level do at a timestep; None leaves them unmodified."""
        phase = in_force(self.phases.get(level, ()), progress(timestep, num_train_timesteps))
        numbers = self._numbers(phase, grid)
        if numbers.attention is None and not numbers.merged:
            return None
        key = None if self.config.seed is None else step_key(self.config.seed, timestep)
        return replace(numbers, destinations=self._destinations(grid, numbers.cell, key, device))

    def plans(
        self, sample: tuple[int, int], timestep: float, num_train_timesteps: int, device: torch.device | str
    ) -> dict[int, LayerPlan]:
        """The plan of every level that is not unmodified, for a sample of this height and width."""
        found = {n: self.plan(n, level_grid(sample, n), timestep, num_train_timesteps, device) for n in self.covered}
        return {level: plan for level, plan in found.items() if plan}

    @property
    def needs_timestep(self) -> bool:
        """Whether two timesteps can differ in what is done."""
        return self.config.seed is not None or any(len(phases) > 1 for phases in self.phases.values())
