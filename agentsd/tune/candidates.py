"""What is tried: attentions for each level, step caches, and the configuration of a choice among them."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import groupby, product
from typing import Any, TypeVar

from agentsd.api import applied
from agentsd.config import KV, AgentSDConfig, Phase, StepCache
from agentsd.hosts.diffusers_unet import block_levels, find_layers
from agentsd.planning import layer_plan, level_grid
from agentsd.tune.search import Choice

ENDS = (0.3, 0.7, 1.0)
# Smaller grids take next to no time; fewer agents are too few.
MIN_TOKENS, MIN_AGENTS = 256, 16
ATTENTIONS = {"kv 2, half": KV(2, kv_ratio=0.5), "kv 2": KV(2), "kv 4": KV(4), "kv 8": KV(8)}
INTERVALS, EXTRAPOLATIONS = (2, 3, 4), (0.0, 0.7)

T = TypeVar("T")


@dataclass(frozen=True)
class Candidates:
    """What may be chosen for a model and a schedule.

    Attributes:
        ends: progress at which each part of the schedule ends.
        parts: the UNet calls of each part.
        attentions: the keys of `ATTENTIONS` that fit the grid of each level.
        caches: step caches by name.
    """

    ends: tuple[float, ...]
    parts: tuple[tuple[int, ...], ...]
    attentions: dict[int, list[str]]
    caches: dict[str, StepCache]

    @classmethod
    def of(cls, pipe: Any, progresses: Sequence[float], latent: tuple[int, int]) -> "Candidates":
        """The candidates of a pipeline, from the progress at each UNet call and the size of the latents."""
        ends = [next(end for end in ENDS if at < end or end == 1) for at in progresses]
        present = sorted(set(ends))
        parts = tuple(tuple(i for i, end in enumerate(ends) if end == one) for one in present)
        attentions = {}
        for level in sorted({layer.level for layer in find_layers(pipe.unet)}):
            plans = {n: layer_plan(only(level, n).phases[0], level_grid(latent, level)) for n in ATTENTIONS}
            if fitting := [name for name, plan in plans.items() if plan.attention and plan.keys >= MIN_AGENTS]:
                attentions[level] = fitting
        layers = _cache_layers(pipe) if len(progresses) > 1 else ()
        caches = [StepCache(1.0, i, n, None, share) for n, i, share in product(layers, INTERVALS, EXTRAPOLATIONS)]
        named = {f"interval {c.interval}, layers {c.layers}, extrapolate {c.extrapolate:g}": c for c in caches}
        return cls((*present[:-1], 1.0), parts, attentions, named)

    @property
    def layers(self) -> list[int]:
        return sorted({cache.layers for cache in self.caches.values()})

    @property
    def finest(self) -> int:
        """The level whose attention cached steps compute too."""
        return min(self.attentions, default=1)

    @property
    def options(self) -> dict[Any, list[str]]:
        """The candidates for the attention of each level, and for "steps"."""
        return {**self.attentions, **({"steps": list(self.caches)} if self.caches else {})}

    def changed_calls(self) -> dict[str, AgentSDConfig | None]:
        """The UNet calls that are timed: stock, each attention of each level, and as a cached step with each attention
        of the finest level."""
        attentions = {key(level, name): only(level, name) for level, names in self.attentions.items() for name in names}
        cached = {
            f"{layers} layers: {name}": only(self.finest, name, StepCache(interval=2, layers=layers))
            for layers in self.layers
            for name in (None, *self.attentions.get(self.finest, ()))
        }
        return {"stock": None, **attentions, **cached}

    def config(self, choice: Choice) -> AgentSDConfig:
        chosen = {(part, what): name for part, what, name in choice}
        phases: dict[tuple[float, KV | None], list[int]] = {}
        for level in self.attentions:
            kinds = [ATTENTIONS.get(chosen.get((part, level), "")) for part in range(len(self.ends))]
            for end, kind in self._joined(kinds) if any(kinds) else ():
                phases.setdefault((end, kind), []).append(level)
        rising = sorted(phases.items(), key=lambda item: item[0][0])
        in_order = [Phase(end, kind, tuple(at), MIN_TOKENS if kind else None) for (end, kind), at in rising]
        full = StepCache(interval=1)
        caches = [self.caches.get(chosen.get((part, "steps"), ""), full) for part in range(len(self.ends))]
        steps = tuple(replace(cache, until=end) for end, cache in self._joined(caches)) if {*caches} != {full} else ()
        return AgentSDConfig(tuple(in_order) or (Phase(attention=None),), steps)

    def _joined(self, values: Sequence[T]) -> list[tuple[float, T]]:
        """The value of each part with its end; neighbours with equal values are one."""
        groups = groupby(zip(self.ends, values, strict=True), lambda pair: pair[1])
        return [list(group)[-1] for _, group in groups]


def key(what: int | str, name: str) -> str:
    """The name of a candidate among the measurements."""
    return f"level {what}: {name}" if isinstance(what, int) else name


def only(level: int, attention: str | None = None, cache: StepCache | None = None) -> AgentSDConfig:
    """The configuration in which the attention of one level, or the step cache, or both are other than stock."""
    kv = ATTENTIONS[attention] if attention else None
    return AgentSDConfig((Phase(1.0, kv, (level,), MIN_TOKENS if kv else None),), (cache,) if cache else ())


def _cache_layers(pipe: Any) -> list[int]:
    """How many layers a cached step may compute: the outermost alone, or those of the outermost level."""
    levels, blocks = block_levels(pipe.unet), enumerate(pipe.unet.up_blocks)
    outermost = sum(len(block.resnets) for i, block in blocks if levels[f"up_blocks.{i}"] == 1)
    found = []
    for layers in sorted({1, outermost}):
        # A UNet may have no layers below these, or blocks that the step cache does not support.
        with suppress(ValueError), applied(pipe, only(1, cache=StepCache(layers=layers))):
            found.append(layers)
    return found
