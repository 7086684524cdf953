"""What to do to which layers, and when: one dataclass for each technique, presets, YAML."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from agentsd import checks

Stride = int | tuple[int, int]


class AgentSDWarning(UserWarning):
    """What was asked for is done, but not as well as might be expected."""


def cell(stride: Stride) -> tuple[int, int]:
    """Height and width of a cell, (sy, sx)."""
    sx, sy = stride if isinstance(stride, tuple) else (stride, stride)
    return sy, sx


def _check_stride(technique: "Agent | Merge | KV") -> None:
    stride: Any = technique.stride
    if isinstance(stride, list):
        object.__setattr__(technique, "stride", stride := tuple(stride))
    pair = stride if isinstance(stride, tuple) else (stride, stride)
    if len(pair) != 2 or any(type(side) is not int or side < 1 for side in pair) or pair == (1, 1):
        raise ValueError(f"stride is {stride!r}; it must be an integer of at least 2, or a pair (sx, sy) but (1, 1)")


def _check_ratio(technique: "Agent | Merge") -> None:
    sy, sx = cell(technique.stride)
    limit = 1 - 1 / (sy * sx)
    ratio = technique.ratio
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio <= limit:
        raise ValueError(
            f"ratio is {ratio!r}; with stride {technique.stride} it must be a number from 0 to {limit:.6g}"
        )


@dataclass(frozen=True)
class Agent:
    """AgentSD's agent attention on merged tokens (Agent Attention, ECCV 2024).

    Args:
        ratio: share of the tokens that are merged away, at most 1 − 1/(sx·sy).
        stride: cells in which one token is a destination, one number or (sx, sy) along width and height.
        agent_ratio: share of the tokens merged away to make the agents; at stride 4, 0.95 merges all sources.
        k_scale2: scale of the broadcast is d^(-0.5·k_scale2).
        k_shortcut: share of the values added to the output.
    """

    ratio: float = 0.4
    stride: Stride = 4
    agent_ratio: float = 0.95
    k_scale2: float = 0.3
    k_shortcut: float = 0.075

    def __post_init__(self) -> None:
        _check_stride(self)
        _check_ratio(self)
        checks.number("agent_ratio", self.agent_ratio, 0, 1)
        checks.number("k_scale2", self.k_scale2, 0, 10)
        checks.number("k_shortcut", self.k_shortcut, 0, 10)


@dataclass(frozen=True)
class Merge:
    """Token merging (ToMe for SD): similar tokens are averaged, computed as one, and receive the same result.

    Args:
        ratio: share of the tokens that are merged away, at most 1 − 1/(sx·sy).
        stride: cells in which one token is a destination, one number or (sx, sy) along width and height.
        proportional: weigh merged keys by the number of tokens they stand for (ToMe for ViTs).
        parts: of the transformer block, which compute merged tokens: `attn`, `crossattn`, `mlp`.
    """

    ratio: float = 0.4
    stride: Stride = 2
    proportional: bool = False
    parts: tuple[str, ...] = ("attn",)

    def __post_init__(self) -> None:
        _check_stride(self)
        _check_ratio(self)
        checks.flag("proportional", self.proportional)
        given: Any = self.parts
        parts = (given,) if isinstance(given, str) else tuple(given)
        object.__setattr__(self, "parts", parts)
        if not parts or len(set(parts)) != len(parts) or not set(parts) <= {"attn", "crossattn", "mlp"}:
            raise ValueError(f"parts is {list(parts)}; it must be a list of attn, crossattn, mlp, each at most once")


@dataclass(frozen=True)
class KV:
    """Attention of every query to size-weighted groups of keys and values.

    Args:
        stride: cells with one group each, one number or (sx, sy) along width and height.
        kv_ratio: share of the tokens merged into the groups, the most similar ones first; the others keep keys and
            values of their own. 1 merges all sources.
        max_agents: where there would be more cells, the stride grows by an integer factor until there are not, so that
            the cost grows linearly with the number of tokens. None sets no limit.
    """

    stride: Stride = 4
    kv_ratio: float = 1.0
    max_agents: int | None = None

    def __post_init__(self) -> None:
        _check_stride(self)
        checks.number("kv_ratio", self.kv_ratio, 0, 1)
        checks.whole("max_agents", self.max_agents, 1, optional=True)


ATTENTIONS: dict[str, type[Agent] | type[Merge] | type[KV]] = {"agent": Agent, "merge": Merge, "kv": KV}
_NAMES = {kind: name for name, kind in ATTENTIONS.items()}


@dataclass(frozen=True)
class Phase:
    """What happens at some resolutions in one part of the noise schedule.

    Args:
        until: progress at which the phase ends, `progress = 1 − t / num_train_timesteps`.
        attention: the technique; None leaves the self-attention unmodified.
        levels: resolutions covered: 1 is the latent grid, 2 half of it …; 0 is the finest at which the model has
            self-attention, −1 half of that ….
        min_tokens: grids with fewer tokens are unmodified, because matching takes longer there than attention; None is
            1,024.
    """

    until: float = 1.0
    attention: Agent | Merge | KV | None = Agent()
    levels: tuple[int, ...] = (0,)
    min_tokens: int | None = None

    def __post_init__(self) -> None:
        checks.number("until", self.until, 0, 1)
        if not isinstance(self.attention, Agent | Merge | KV | None):
            raise ValueError(f"attention is {self.attention!r}; it must be an Agent, a Merge, a KV or None")
        given: Any = self.levels
        levels = tuple(given) if isinstance(given, list | tuple) else (given,)
        object.__setattr__(self, "levels", levels)
        if not levels or any(type(level) is not int for level in levels) or len(set(levels)) != len(levels):
            raise ValueError(f"levels is {list(levels)}; it must be a list of integers, each at most once")
        checks.whole("min_tokens", self.min_tokens, 1, optional=True)

    def to_dict(self) -> dict[str, Any]:
        """The fields of the phase and of its attention side by side."""
        technique = asdict(self.attention) if self.attention else {}
        name = _NAMES[type(self.attention)] if self.attention else None
        own = {"until": self.until, "levels": list(self.levels), "min_tokens": self.min_tokens, "attention": name}
        return own | {key: list(value) if isinstance(value, tuple) else value for key, value in technique.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Phase":
        """The inverse of `to_dict`; fields left out keep their defaults."""
        rest = dict(values)
        name = rest.pop("attention", "agent")
        checks.choice("attention", name, ATTENTIONS, optional=True)
        general = {key: rest.pop(key) for key in ("until", "levels", "min_tokens") if key in rest}
        checks.known_fields(f"a phase with attention {name or 'null'}", rest, _fields(name))
        return cls(attention=ATTENTIONS[name](**rest) if name else None, **general)


@dataclass(frozen=True)
class StepCache:
    """Deep features kept from one step to the next (DeepCache), in one part of the noise schedule.

    Args:
        until: progress at which this entry ends.
        interval: every so many calls the UNet is computed in full; in between only its outermost layers are, and the
            features below come from the last full steps. 1 computes every call in full.
        layers: on each side of the U that a cached step computes, from the outermost; DeepCache's branch b is b + 1.
        max_gap: largest share of the noise schedule between a call and the last full step; a call farther from it is
            full too, so that runs of few steps cache less. None sets no limit.
        extrapolate: share of the first-order extrapolation from the last two full steps; 0 keeps the last features.
    """

    until: float = 1.0
    interval: int = 3
    layers: int = 1
    max_gap: float | None = None
    extrapolate: float = 0.0

    def __post_init__(self) -> None:
        checks.number("until", self.until, 0, 1)
        checks.whole("interval", self.interval, 1)
        checks.whole("layers", self.layers, 1)
        checks.number("max_gap", self.max_gap, 0, 1, optional=True)
        checks.number("extrapolate", self.extrapolate, 0, 2)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "StepCache":
        """The inverse of `dataclasses.asdict`."""
        checks.known_fields("an entry of steps", values, cls)
        return cls(**values)


def _fields(attention: str | None) -> list[str]:
    """Fields of a phase with an attention of that name."""
    kinds = [Phase, ATTENTIONS[attention]] if attention else [Phase]
    return [item.name for kind in kinds for item in fields(kind)]


PAPER = (Phase(until=0.4, attention=Agent()), Phase(until=1.0, attention=Merge()))


@dataclass(frozen=True)
class AgentSDConfig:
    """The whole configuration; the default is AgentSD as published, preset `paper`.

    Args:
        phases: for each level, the first one that covers it and has not ended is in force; `until` rises among the
            phases of a level. A level that none covers is unmodified.
        steps: the step cache, one entry or several in order of `until`, the last until 1; empty computes all in full.
        seed: decides, with the timestep alone, at which place of its cell a destination is; None: the top-left corner.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    phases: tuple[Phase, ...] = PAPER
    steps: tuple[StepCache, ...] = ()
    seed: int | None = 0

    def __post_init__(self) -> None:
        for name, kind in (("phases", Phase), ("steps", StepCache)):
            given: Any = getattr(self, name)
            entries = tuple(given or ()) if isinstance(given, list | tuple | None) else (given,)
            if not all(isinstance(entry, kind) for entry in entries):
                raise ValueError(f"{name} is {given!r}; it must be a list of {kind.__name__}")
            object.__setattr__(self, name, entries)
        if not self.phases:
            raise ValueError("phases is empty; it must have at least one Phase")
        for level in sorted({level for phase in self.phases for level in phase.levels}):
            ends = [phase.until for phase in self.phases if level in phase.levels]
            if sorted(set(ends)) != ends:
                raise ValueError(f"phases of level {level} end at {ends}; until must rise from phase to phase")
        ends = [entry.until for entry in self.steps]
        if sorted(set(ends)) != ends or ends[-1:] not in ([], [1]):
            raise ValueError(f"steps end at {ends}; until must rise from entry to entry and be 1 in the last")
        checks.whole("seed", self.seed, 0, 2**64 - 1, optional=True)

    @property
    def caches(self) -> bool:
        """Whether features are kept from one step to the next."""
        return any(entry.interval > 1 for entry in self.steps)

    @property
    def ends(self) -> tuple[float, ...]:
        """Where what is done changes: every `until` of the phases, and 1."""
        return tuple(sorted({*(phase.until for phase in self.phases), 1.0}))

    def has(self, field: str) -> bool:
        """Whether a phase has a field of that name."""
        return any(field in phase.to_dict() for phase in self.phases)

    def replace(self, **overrides: Any) -> "AgentSDConfig":
        """A copy with fields of the configuration, or of every phase that has them, replaced."""
        mine = {key: overrides.pop(key) for key in ("phases", "steps", "seed") if key in overrides}
        return replace(self, **mine).assign(overrides)

    def assign(self, values: Mapping[str, Any]) -> "AgentSDConfig":
        """A copy with fields replaced.

        Args:
            values: a key is a field of the configuration (`seed`), a field of every phase that has it (`stride`), of
                one phase (`0/stride`), of every entry of the step cache, of which there will be one (`steps/interval`),
                or of one of them (`steps/0/interval`). Another `attention` keeps the fields that it has too.

        Raises:
            ValueError: a key names no field, or none that has an effect; a value is not allowed.
        """
        plain = self.to_dict()
        # Attentions first: a field that the attention does not have is an error, whatever the order.
        for key, value in sorted(values.items(), key=lambda item: not item[0].endswith("attention")):
            path = key.split("/")
            if key in plain:
                plain[key] = value
            elif path[0] == "steps":
                plain["steps"] = plain["steps"] or [{}]
                for entry in _chosen(key, plain["steps"], path[1:-1]):
                    entry[path[-1]] = value
            else:
                for phase in _chosen(key, plain["phases"], path[:-1]) if path[1:] else _having(key, value, plain):
                    phase[path[-1]] = value
                    if path[-1] == "attention" and value in (*ATTENTIONS, None):
                        fresh = Phase.from_dict({"attention": value}).to_dict()
                        for other in phase.keys() - fresh.keys():
                            del phase[other]
                        phase.update(fresh | phase)
        return self.from_dict(plain)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dictionaries."""
        return {
            "phases": [phase.to_dict() for phase in self.phases],
            "steps": [asdict(entry) for entry in self.steps],
            "seed": self.seed,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "AgentSDConfig":
        """The inverse of `to_dict`; fields left out keep their defaults."""
        if not isinstance(values, Mapping):
            raise ValueError(f"the configuration is {values!r}; it must be a mapping of field names to values")
        checks.known_fields("the configuration", values, cls)
        values = dict(values)
        for name, kind in (("phases", Phase), ("steps", StepCache)):
            if isinstance(values.get(name), list | tuple | Mapping):
                entries = [values[name]] if isinstance(values[name], Mapping) else values[name]
                values[name] = [kind.from_dict(e) if isinstance(e, Mapping) else e for e in entries]
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
        from agentsd.results import write_text

        write_text(Path(path), self.to_yaml())

    def to_yaml(self) -> str:
        """What `to_file` writes."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @classmethod
    def presets(cls) -> tuple[str, ...]:
        """Names of the presets that come with the package."""
        names = [file.name for file in (files("agentsd") / "configs").iterdir()]
        return tuple(sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml")))

    @classmethod
    def from_preset(cls, name: str) -> "AgentSDConfig":
        """The preset of that name.

        Raises:
            ValueError: there is none; the message lists those there are.
        """
        checks.choice("preset", name, cls.presets())
        text = (files("agentsd") / "configs" / f"{name}.yaml").read_text(encoding="utf-8")
        return cls.from_dict(yaml.safe_load(text))


def _chosen(key: str, entries: list[dict[str, Any]], number: list[str]) -> list[dict[str, Any]]:
    if not number:
        return entries
    if len(number) > 1 or not number[0].isdigit() or int(number[0]) >= len(entries):
        raise ValueError(f"{key} names no entry; there are 0 to {len(entries) - 1}")
    return [entries[int(number[0])]]


def _having(key: str, value: object, plain: dict[str, Any]) -> list[dict[str, Any]]:
    """The phases that have a field."""
    chosen = [phase for phase in plain["phases"] if key in phase]
    owners = [name for name in ATTENTIONS if key in _fields(name)]
    if not chosen and owners:
        found = ", ".join(dict.fromkeys(str(phase["attention"]).lower() for phase in plain["phases"]))
        raise ValueError(
            f"{key}={value!r} has no effect: it is for attention {' or '.join(owners)}, the phases have {found}"
        )
    if not chosen:
        known = [*plain, *dict.fromkeys(name for attention in ATTENTIONS for name in _fields(attention))]
        raise ValueError(f"the configuration has no field {key!r}; its fields are {', '.join(known)}")
    return chosen
