"""What to do to which layers, and when: `AgentSDConfig`, its phases, presets and YAML."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml

# Fewer tokens are attended to in less time than it takes to match them: measured with agentsd-bench --latent 16 32.
MIN_TOKENS = 1024
ATTENTIONS = ("agent", "merge", "kv", "stock")
AGENTS = ("merge", "pool")
SPACINGS = ("uniform", "quadratic")
_NOT_OF_A_LEVEL = (
    "until",
    "levels",
    "reuse_interval",
    "reuse_depth",
    "reuse_layers",
    "reuse_spacing",
    "reuse_span",
    "extrapolate",
)


class AgentSDWarning(UserWarning):
    """What was asked for is done, but not as well as it might be expected to be."""


def _number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; it must be a number from {low:g} to {high:g}")


def _choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")


def _whole(name: str, value: object, allowed: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be {allowed}")


def _boolean(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; it must be true or false")


@dataclass(frozen=True)
class Phase:
    """What happens in one part of the noise schedule.

    Args:
        until: progress at which the phase ends, `progress = 1 − t / num_train_timesteps`; it is in force while
            progress < until.
        attention: `agent` is AgentSD's agent attention on merged tokens, `merge` is ToMe for SD, `kv` is attention of
            every query to size-weighted groups of keys and
            values, `stock` leaves the attention alone.
        ratio: share of the tokens that are merged away, at most 1 − 1/(sx·sy); None is the configuration's. Plays no
            part in the attention of `kv`.
        stride: cells in which one token is a destination, one number or (sx, sy) along width and height.
        max_agents: where there would be more cells, the stride grows by a whole factor until there are not. The cost of
            `agent` and `kv` then grows linearly with the number of tokens. None sets no limit.
        agent_ratio: share of the tokens folded to make agents (`agents="merge"`); 0.95 folds all sources.
        kv_ratio: share of the tokens folded to make the agents of `kv`, the most similar ones; 1 folds all sources.
        agents: agents are `merge`d tokens or `pool`ed queries, one per cell.
        proportional: weigh merged keys by the number of tokens they stand for (`agent`: in the aggregation; `merge`).
        k_scale2: scale of the second product of `agent` is d^(-0.5·k_scale2).
        k_shortcut: share of the values added to the output of `agent`.
        merge_attn: merge the tokens of the self-attention (`agent`, `merge`).
        merge_crossattn: merge the queries of the block's cross-attention too, whatever `attention` is.
        merge_mlp: merge the tokens of the block's feed-forward part too, whatever `attention` is.
        min_tokens: grids with fewer tokens are left alone, because there it does not pay; None is `MIN_TOKENS`.
        kmeans_steps: steps of k-means by which the groups of similar tokens are improved. One brings `kv` about a tenth
            nearer to stock, for a second matching.
        match_interval: every so many steps a layer matches its tokens; in between it keeps the groups it has.
        reuse_interval: every so many calls the UNet is computed whole; in between only its outermost part is, and the
            features below come from the last whole calls (DeepCache). 1 computes every call whole.
        reuse_depth: number of levels, from the outermost, that are computed in between.
        reuse_layers: a finer cut than `reuse_depth`: the number of layers, from the outermost, on the up side that are
            computed in between, and as many skip connections: DeepCache's branch b is b + 1. None: see `reuse_depth`.
        reuse_spacing: whole calls are `uniform`, or densest in the middle of the phase (`quadratic`).
        reuse_span: largest share of the noise schedule that may lie between a call and the last whole one; one that is
            farther from it is whole itself, so that runs of few steps reuse less. None sets no limit.
        extrapolate: share of the first-order extrapolation, from the last two whole calls, in the features that are
            reused; 0 holds those of the last.
        levels: resolutions covered: 1 is the latent grid, 2 half of it …; 0 is the finest at which the model has
            self-attention, −1 half of that …; None is 0. A mapping gives each level the fields in which it differs:
            `{0: {}, -1: {"stride": 2}}`.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    until: float = 1.0
    attention: Literal["agent", "merge", "kv", "stock"] = "agent"
    ratio: float | None = None
    stride: int | tuple[int, int] = 4
    max_agents: int | None = None
    agent_ratio: float = 0.95
    kv_ratio: float = 1.0
    agents: Literal["merge", "pool"] = "merge"
    proportional: bool = False
    k_scale2: float = 0.3
    k_shortcut: float = 0.075
    merge_attn: bool = True
    merge_crossattn: bool = False
    merge_mlp: bool = False
    min_tokens: int | None = None
    kmeans_steps: int = 0
    match_interval: int = 1
    reuse_interval: int = 1
    reuse_depth: int = 1
    reuse_layers: int | None = None
    reuse_spacing: Literal["uniform", "quadratic"] = "uniform"
    reuse_span: float | None = None
    extrapolate: float = 0.0
    levels: tuple[int, ...] | Mapping[int, Mapping[str, Any]] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        for name in ("stride", "levels"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        _number("until", self.until, 0, 1)
        _choice("attention", self.attention, ATTENTIONS)
        _choice("agents", self.agents, AGENTS)
        pair = self.stride if isinstance(self.stride, tuple) else (self.stride, self.stride)
        if (
            len(pair) != 2
            or any(isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in pair)
            or pair == (1, 1)
        ):
            raise ValueError(
                f"stride is {self.stride!r}; it must be a whole number from 2, or a pair (sx, sy) other than (1, 1)"
            )
        for name in ("max_agents", "min_tokens", "reuse_layers"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), "null or a whole number from 1")
        if isinstance(self.kmeans_steps, bool) or not isinstance(self.kmeans_steps, int) or self.kmeans_steps < 0:
            raise ValueError(f"kmeans_steps is {self.kmeans_steps!r}; it must be a whole number from 0")
        for name in ("match_interval", "reuse_interval", "reuse_depth"):
            _whole(name, getattr(self, name), "a whole number from 1")
        _choice("reuse_spacing", self.reuse_spacing, SPACINGS)
        if self.reuse_span is not None:
            _number("reuse_span", self.reuse_span, 0, 1)
        _number("extrapolate", self.extrapolate, 0, 2)
        if self.ratio is not None:
            self.check_ratio(self.ratio)
        _number("agent_ratio", self.agent_ratio, 0, 1)
        _number("kv_ratio", self.kv_ratio, 0, 1)
        for name in ("proportional", "merge_attn", "merge_crossattn", "merge_mlp"):
            _boolean(name, getattr(self, name))
        _number("k_scale2", self.k_scale2, 0, 10)
        _number("k_shortcut", self.k_shortcut, 0, 10)
        levels = self.levels
        if levels is not None and (
            not isinstance(levels, tuple | Mapping)
            or not levels
            or any(isinstance(level, bool) or not isinstance(level, int) for level in levels)
        ):
            raise ValueError(
                f"levels is {levels!r}; it must be null, a list of whole numbers, or a mapping of such to fields"
            )
        if isinstance(levels, Mapping):
            for level, differing in levels.items():
                if not isinstance(differing, Mapping) or differing.keys() & set(_NOT_OF_A_LEVEL):
                    raise ValueError(
                        f"level {level} is {differing!r}; it must be a mapping without {', '.join(_NOT_OF_A_LEVEL)}"
                    )
                _known(f"level {level}", differing, Phase)
                self.on(level)

    def on(self, level: int) -> "Phase":
        """The phase as it is at one of its `levels`."""
        return replace(self, levels=None, **self.levels[level]) if isinstance(self.levels, Mapping) else self

    @property
    def parts(self) -> list["Phase"]:
        """The phase as it is at each of its levels."""
        return [self.on(level) for level in self.levels] if isinstance(self.levels, Mapping) else [self]

    @property
    def cell(self) -> tuple[int, int]:
        """Height and width of a cell that `max_agents` does not enlarge, (sy, sx)."""
        sx, sy = self.stride if isinstance(self.stride, tuple) else (self.stride, self.stride)
        return sy, sx

    def cell_on(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Height and width of a cell on a token grid, (sy, sx)."""
        sy, sx = self.cell
        factor = 1
        while self.max_agents and (grid[0] // (factor * sy)) * (grid[1] // (factor * sx)) > self.max_agents:
            factor += 1
        return factor * sy, factor * sx

    def pays_on(self, grid: tuple[int, int]) -> bool:
        """Whether a token grid has the tokens that it takes."""
        return grid[0] * grid[1] >= (MIN_TOKENS if self.min_tokens is None else self.min_tokens)

    @property
    def merges(self) -> bool:
        """Whether `ratio` plays a part."""
        return any(
            (part.attention in ("agent", "merge") and part.merge_attn) or part.merge_crossattn or part.merge_mlp
            for part in self.parts
        )

    @property
    def acts(self) -> bool:
        """Whether anything is other than stock."""
        return self.merges or any(part.attention != "stock" for part in self.parts)

    def check_ratio(self, ratio: float) -> None:
        """Raise ValueError if so many tokens cannot be merged away at this stride."""
        sy, sx = self.cell
        limit = 1 - 1 / (sy * sx)
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio <= limit:
            raise ValueError(f"ratio is {ratio!r}; with stride {self.stride} it must be a number from 0 to {limit:.6g}")


PAPER = (
    Phase(until=0.4, attention="agent", stride=4, agent_ratio=0.95, k_scale2=0.3, k_shortcut=0.075),
    Phase(until=1.0, attention="merge", stride=2),
)


@dataclass(frozen=True)
class AgentSDConfig:
    """The whole configuration; the default is AgentSD as published, preset `paper`.

    Args:
        ratio: default share of merged tokens for every phase that sets none.
        phases: in order of `until`; the last one ends at 1.
        use_rand: random place of the destination in its cell; otherwise its top-left corner.
        seed: decides the random places, together with the timestep alone.
        controlnet: accelerate the pipeline's ControlNets too.
        cross_reuse_from: progress from which on the outputs of the cross-attentions are held (T-GATE); None computes
            them in every step.
        refine: a safetensors file with a refinement of the UNet's agent attention, as `scripts/distill_bias.py` writes
            it; None leaves AgentSD as it is.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    ratio: float = 0.4
    phases: tuple[Phase, ...] = field(default=PAPER)
    use_rand: bool = True
    seed: int = 0
    controlnet: bool = True
    cross_reuse_from: float | None = None
    refine: str | Path | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "phases", tuple(self.phases))
        _number("ratio", self.ratio, 0, 1)
        if not self.phases or not all(isinstance(phase, Phase) for phase in self.phases):
            raise ValueError(f"phases is {self.phases!r}; it must be a list of at least one Phase")
        ends = [phase.until for phase in self.phases]
        if sorted(set(ends)) != ends or ends[-1] != 1:
            raise ValueError(f"phases end at {ends}; until must rise from phase to phase and be 1 in the last")
        for part in (part for phase in self.phases for part in phase.parts):
            if part.merges:
                part.check_ratio(self.ratio_of(part))
        _boolean("use_rand", self.use_rand)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed!r}; it must be a whole number from 0 to 2**64 - 1")
        _boolean("controlnet", self.controlnet)
        if self.cross_reuse_from is not None:
            _number("cross_reuse_from", self.cross_reuse_from, 0, 1)
            if any(part.merge_crossattn for phase in self.phases for part in phase.parts):
                raise ValueError(
                    f"cross_reuse_from is {self.cross_reuse_from!r}; it must be null where merge_crossattn is true"
                )
        if isinstance(self.refine, Path):
            object.__setattr__(self, "refine", str(self.refine))
        if self.refine is not None and (not isinstance(self.refine, str) or not self.refine):
            raise ValueError(f"refine is {self.refine!r}; it must be null or the path of a safetensors file")
        if self.refine and not any(part.attention == "agent" for phase in self.phases for part in phase.parts):
            raise ValueError(f"refine is {self.refine!r}; it refines attention 'agent', which no phase has")

    @property
    def reuses(self) -> bool:
        """Whether anything is kept from one call to the next."""
        phases = (part for phase in self.phases for part in (phase, *phase.parts))
        return self.cross_reuse_from is not None or any(p.reuse_interval > 1 or p.match_interval > 1 for p in phases)

    @property
    def uses_ratio(self) -> bool:
        """Whether `ratio` plays a part."""
        return any(part.merges and part.ratio is None for phase in self.phases for part in phase.parts)

    def ratio_of(self, phase: Phase) -> float:
        """The share of tokens that `phase` merges away."""
        return self.ratio if phase.ratio is None else phase.ratio

    def replace(self, **overrides: Any) -> "AgentSDConfig":
        """A copy with some fields replaced."""
        _known("configuration", overrides, AgentSDConfig)
        return replace(self, **overrides)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dictionaries."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: plain(item) for key, item in value.items()}
            return [plain(item) for item in value] if isinstance(value, tuple | list) else value

        return dict(plain(asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "AgentSDConfig":
        """The inverse of `to_dict`; fields left out keep their defaults."""
        if not isinstance(values, Mapping):
            raise ValueError(f"the configuration is {values!r}; it must be a mapping of field names to values")
        _known("configuration", values, cls)
        values = dict(values)
        if "phases" in values:
            if not isinstance(values["phases"], list | tuple) or not all(
                isinstance(p, Mapping) for p in values["phases"]
            ):
                raise ValueError(f"phases is {values['phases']!r}; it must be a list of mappings")
            for phase in values["phases"]:
                _known("phase", phase, Phase)
            values["phases"] = tuple(Phase(**_levels_as_numbers(phase)) for phase in values["phases"])
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | Path) -> "AgentSDConfig":
        """Read YAML as `to_file` writes it and the presets are written.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is not YAML, has an unknown key or a value that is not allowed; the message names the file.
        """
        try:
            return cls.from_dict(yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {})
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_file(self, path: str | Path) -> None:
        """Write YAML that `from_file` reads back to an equal configuration."""
        target = Path(path)
        partial = target.with_name(target.name + ".part")
        partial.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")
        partial.replace(target)

    @classmethod
    def presets(cls) -> tuple[str, ...]:
        """Names of the presets that come with the package."""
        folder = files("agentsd") / "configs"
        return tuple(
            sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))
        )

    @classmethod
    def from_preset(cls, name: str) -> "AgentSDConfig":
        """The preset of that name.

        Raises:
            ValueError: there is none; the message lists those there are.
        """
        if name not in cls.presets():
            raise ValueError(f"preset is {name!r}; it must be one of {', '.join(cls.presets())}")
        text = (files("agentsd") / "configs" / f"{name}.yaml").read_text(encoding="utf-8")
        return cls.from_dict(yaml.safe_load(text))


def _levels_as_numbers(phase: Mapping[str, Any]) -> dict[str, Any]:
    """JSON, which image files carry, has no numbers for keys."""
    levels = phase.get("levels")
    if not isinstance(levels, Mapping):
        return dict(phase)
    numbers = {int(k) if isinstance(k, str) and k.lstrip("-").isdigit() else k: fields for k, fields in levels.items()}
    return {**phase, "levels": numbers}


def _known(what: str, values: Mapping[str, Any], kind: type) -> None:
    allowed = [item.name for item in fields(kind)]
    if unknown := [key for key in values if key not in allowed]:
        raise ValueError(f"{what} has no field {unknown[0]!r}; its fields are {', '.join(allowed)}")
