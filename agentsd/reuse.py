"""Reuse across steps: the inner part of the U, and the cross-attentions, from earlier calls.

DeepCache (Ma et al., CVPR 2024) computes only the outermost layers of the U in most calls and takes the features that
enter them from the last whole call; here they can be extrapolated from the last two. T-GATE (Zhang et al., 2024) holds
the outputs of the cross-attentions once the layout is decided.
"""

import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from agentsd.config import AgentSDConfig, AgentSDWarning, Phase
from agentsd.merging import Match
from agentsd.processor import Block
from agentsd.schedule import Clock, phase_at, progress

EVERYTHING = 1 << 30
_LANES = 64
# Share of the noise schedule from one whole call to the next above which images change visibly: preset turbo's without
# a span lie 30 dB from stock at 0.15, 28 at 0.19 and 23 at 0.25 (docs/reuse.md, "Few steps").
_FAR = 1 / 6


def whole_calls(steps: int, interval: int, spacing: str) -> frozenset[int]:
    """Which of a phase's steps are computed whole.

    Args:
        steps: number of steps of the phase.
        interval: mean distance of whole calls.
        spacing: `uniform`: 0, k, 2k …; `quadratic`: as many, growing with the square of the distance from the middle
            (DeepCache, section 3.4), no two the same.
    """
    if spacing == "uniform":
        return frozenset(range(0, steps, interval))
    number = -(-steps // interval)
    last, chosen = -1, []
    for i in range(number):
        from_middle = 2 * i / number - 1
        place = int(steps * (1 + from_middle * abs(from_middle)) / 2)
        last = min(max(last + 1, place), steps - number + i)
        chosen.append(last)
    return frozenset(chosen)


@dataclass
class Lane:
    """One of the calls of each step: guidance may make two, each with features of its own.

    Attributes:
        text: the prompt's embedding, the same object in every step of an image. Another one may be another prompt, and
            to compare them would wait for the device.
        key: shape, dtype and device of the sample.
        run: the schedule.
        position: that of the last call in the schedule.
        phase: the phase of the last call.
        step: steps of that phase so far.
        whole: those of them that are to be whole; None where the schedule is not known beforehand.
        features: of the last two whole calls, and their places among the calls.
        calls: number of calls so far.
        at: progress of the last whole call.
        crossed: whether the cross-attentions hold outputs from after the gate.
        matches: per block, the call in which it matched its tokens, and the result.
        cross: what the cross-attentions hold.
    """

    text: "weakref.ref[Tensor] | None"
    key: tuple[Any, ...]
    run: object
    position: float
    phase: Phase | None = None
    step: int = 0
    whole: frozenset[int] | None = None
    features: list[tuple[int, Tensor]] = field(default_factory=list)
    calls: int = -1
    at: float = 0
    crossed: bool = False
    matches: dict[str, tuple[int, Match]] = field(default_factory=dict)
    cross: dict[str, Tensor] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Size of the tensors held."""
        matches = (tensor for _, match in self.matches.values() for tensor in (match.best, match.score))
        return sum(tensor.nbytes for tensor in (*(f for _, f in self.features), *self.cross.values(), *matches))

    def copy(self) -> "Lane":
        """One that goes on by itself."""
        return replace(self, features=[*self.features], matches={**self.matches}, cross={**self.cross})

    def clear(self) -> None:
        """Hold nothing."""
        self.features.clear()
        self.matches.clear()
        self.cross.clear()


class Reuse:
    """What one UNet keeps from call to call, and which of its modules the call in progress skips.

    Skip connections are counted from the outermost, which is the output of the first convolution; so are the layers of
    the up side, which take one each. A call that computes n layers computes the modules that n of them need.

    Attributes:
        layers: layers that the call in progress computes; 0 is all of them.
        keep: the cut at which the call in progress keeps its features; 0 is none.
        held: the features that enter the layers that are computed.
        fresh: the features that the call in progress has kept.
        cross: whether the cross-attentions `run`, `keep` their outputs or are `held`.
        bytes: the most that was held since the model was accelerated.
    """

    def __init__(
        self,
        model: nn.Module,
        levels: dict[str, int],
        config: AgentSDConfig,
        parts: dict[Phase, dict[int, Phase]],
        blocks: dict[str, Block],
    ) -> None:
        self.config = config
        self.parts = parts
        self.blocks = blocks
        self.lanes: list[Lane] = []
        self.lane: Lane | None = None
        self.turn = 0
        self.position: float = 0
        self.last = False
        self.bytes = 0
        self.warned = False
        self.spots: list[Spot] = []
        self.cuts: dict[Phase, int] = {}
        self.rest()
        # A ControlNet has no up side: it is computed whole, and may keep groups.
        unet = hasattr(model, "up_blocks")
        if unet and any(phase.reuse_interval > 1 for phase in config.phases):
            self.place(model, levels)
        if unet and config.cross_reuse_from is not None:
            for name, module in model.named_modules():
                if name.endswith(".attn2"):
                    self.spots.append(Cross(self, module, 0, name))

    def place(self, model: nn.Module, levels: dict[str, int]) -> None:
        """Put a spot on every module that may be skipped."""
        kind = type(model).__name__
        blocks = [*model.down_blocks, *model.up_blocks]  # type: ignore[misc]
        known = {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"}
        if strange := sorted({type(block).__name__ for block in blocks} - known):
            raise ValueError(
                f"reuse_interval is {max(phase.reuse_interval for phase in self.config.phases)}; it must be 1 for "
                f"{kind}, whose blocks {', '.join(strange)} are not known here"
            )
        outermost = [len(block.resnets) for block in reversed(model.up_blocks)]  # type: ignore[operator, arg-type]
        depths = [levels[f"up_blocks.{index}"] for index in reversed(range(len(outermost)))]
        total, deepest = sum(outermost) - 1, max(depths) - 1
        for phase in (phase for phase in self.config.phases if phase.reuse_interval > 1):
            if phase.reuse_layers is not None and phase.reuse_layers > total:
                raise ValueError(f"reuse_layers is {phase.reuse_layers}; for this {kind} it must be at most {total}")
            if phase.reuse_layers is None and phase.reuse_depth > deepest:
                raise ValueError(f"reuse_depth is {phase.reuse_depth}; for this {kind} it must be at most {deepest}")
            whole_levels = sum(n for n, level in zip(outermost, depths, strict=True) if level <= phase.reuse_depth)
            self.cuts[phase] = phase.reuse_layers or whole_levels
        number = 1
        for block in model.down_blocks:  # type: ignore[union-attr]
            self.spots.append(DownBlock(self, block, number + 1))
            attentions = getattr(block, "attentions", [None] * len(block.resnets))  # type: ignore[arg-type]
            for resnet, attention in zip(block.resnets, attentions, strict=True):  # type: ignore[arg-type]
                number += 1
                self.spots.append(Layer(self, resnet, number))
                if attention is not None:
                    self.spots.append(LayerAttention(self, attention, number))
            for downsampler in block.downsamplers or ():
                number += 1
                self.spots.append(Downsampler(self, downsampler, number))
        if model.mid_block is not None:
            self.spots.append(Spot(self, model.mid_block, EVERYTHING))  # type: ignore[arg-type]
        number = 0
        for block in reversed(model.up_blocks):  # type: ignore[arg-type, operator]
            self.spots.append(UpBlock(self, block, number + 1))
            attentions = getattr(block, "attentions", [None] * len(block.resnets))
            for resnet, attention in reversed(list(zip(block.resnets, attentions, strict=True))):
                number += 1
                self.spots.append(Layer(self, resnet, number, edge=attention is None))
                if attention is not None:
                    self.spots.append(LayerAttention(self, attention, number, edge=True))

    def install(self) -> None:
        """Let each spot decide about the calls of its module."""
        for spot in self.spots:
            spot.own = vars(spot.module).get("forward")
            spot.module.forward = spot

    def remove(self) -> None:
        """Give every module its own forward back."""
        self.forget()
        for spot in self.spots:
            if vars(spot.module).get("forward") is spot:
                del spot.module.forward
                if spot.own is not None:
                    spot.module.forward = spot.own

    def rest(self) -> None:
        """Let the next call be stock."""
        self.layers = self.keep = 0
        self.cross = "run"
        self.held: Tensor | None = None
        self.fresh: Tensor | None = None
        self.lane = None
        for block in self.blocks.values():
            block.kept = block.made = None

    def forget(self) -> None:
        """Let the next call be stock, and hold nothing."""
        self.lanes.clear()
        self.rest()

    def begin(
        self, phase: Phase, timestep: float, steps: int, clock: Clock, sample: Tensor, text: Tensor | None
    ) -> None:
        """Before a call: decide what it computes.

        Args:
            phase: the phase in force.
            timestep: the call's.
            steps: number of training timesteps.
            clock: which has read the timestep.
            sample: the UNet's input.
            text: the prompt's embedding.
        """
        self.rest()
        lane = self.enter(clock, sample, text)
        if lane is None:
            return
        self.lane = lane
        lane.calls += 1
        if lane.phase is not phase:
            if lane.phase is None or self.cuts.get(lane.phase) != self.cuts.get(phase):
                lane.features.clear()
            lane.matches.clear()
            lane.phase, lane.step = phase, 0
            lane.whole = self.planned(phase, clock, steps)
            self.warn_of_few_steps(phase, clock.schedule, steps)
        else:
            lane.step += 1
        whole = True
        if phase in self.cuts:
            self.keep = self.cuts[phase]
            enough = len(lane.features) >= (2 if phase.extrapolate else 1)
            since = lane.calls - lane.features[-1][0] if lane.features else 0
            due = lane.step in lane.whole if lane.whole is not None else since >= phase.reuse_interval
            now = progress(timestep, steps)
            far = phase.reuse_span is not None and now - lane.at > phase.reuse_span + 1e-9
            whole = due or far or not enough
            if not whole:
                self.layers, self.keep = self.keep, 0
                self.held = self.guess(lane, phase.extrapolate)
            else:
                lane.at = now
        for name, (call, match) in lane.matches.items():
            block = self.blocks[name]
            if lane.calls - call < self.parts[phase][block.level].match_interval:
                block.kept = match
        gate = self.config.cross_reuse_from
        if gate is not None and progress(timestep, steps) >= gate:
            self.cross = "held" if lane.crossed else "keep"
            lane.crossed = lane.crossed or whole

    def enter(self, clock: Clock, sample: Tensor, text: Tensor | None) -> Lane | None:
        """The lane of a call, empty again where the call does not go on from the lane's last one."""
        if any(lane.text is not None and lane.text() is None for lane in self.lanes):
            self.lanes.clear()
        if self.lanes and self.lanes[0].run is clock.run and clock.position == self.position:
            self.turn += 1
        else:
            self.turn = 0
        self.position = clock.position
        self.last = bool(clock.schedule) and clock.position == len(clock.schedule) - 1
        key = (sample.shape, sample.dtype, sample.device)
        if self.turn >= _LANES:
            return None
        if self.turn < len(self.lanes):
            lane = self.lanes[self.turn]
            same = (lane.text() if lane.text else None) is text
            if same and lane.key == key and lane.run is clock.run and clock.position > lane.position:
                lane.position = clock.position
                return lane
            del self.lanes[self.turn :]
        self.lanes.append(Lane(None if text is None else weakref.ref(text), key, clock.run, clock.position))
        return self.lanes[-1]

    def planned(self, phase: Phase, clock: Clock, steps: int) -> frozenset[int] | None:
        """Which steps of a phase are to be whole; None: decided by the distance to the last one."""
        if phase.reuse_spacing == "uniform" or not clock.schedule:
            return None
        rest = clock.schedule[int(clock.position) :]
        mine = [t for t in rest if phase_at(self.config.phases, progress(t, steps)) is phase]
        return whole_calls(len(mine), phase.reuse_interval, phase.reuse_spacing)

    def warn_of_few_steps(self, phase: Phase, schedule: list[float], steps: int) -> None:
        """Warn, once, where a run has so few steps that whole calls lie far apart."""
        if self.warned or phase not in self.cuts or phase.reuse_span is not None or len(schedule) < 2:
            return
        apart = abs(schedule[0] - schedule[-1]) / (len(schedule) - 1) / steps * phase.reuse_interval
        if apart > _FAR:
            self.warned = True
            warnings.warn(
                f"reuse_interval is {phase.reuse_interval}: in a run of {len(schedule)} steps, {apart:.0%} of the noise"
                f" schedule lie between two whole calls, and images change visibly beyond {_FAR:.0%}; take more steps, "
                "or set reuse_span",
                AgentSDWarning,
                stacklevel=2,
            )

    def guess(self, lane: Lane, share: float) -> Tensor:
        """The features now, from those of the last whole calls."""
        if not share:
            return lane.features[-1][1]
        (before, F0), (after, F1) = lane.features[-2:]
        return torch.lerp(F1, F0, -share * (lane.calls - after) / (after - before))

    def end(self, *_: Any) -> None:
        """After a call: keep what it leaves."""
        if self.lane is None:
            return
        lane = self.lane
        if self.fresh is not None:
            share = lane.phase.extrapolate if lane.phase else 0
            lane.features = [*lane.features, (lane.calls, _own(self.fresh))][-2 if share else -1 :]
        if self.cross == "keep":
            lane.cross = {name: _own(tensor) for name, tensor in lane.cross.items()}
        for name, block in self.blocks.items():
            if block.made is not None:
                made = Match(_own(block.made.best), _own(block.made.score), block.made.destinations)
                lane.matches[name] = lane.calls, made
        self.bytes = max(self.bytes, sum(lane.bytes for lane in self.lanes))
        if self.last:
            lane.clear()
        self.rest()


def _own(tensor: Tensor) -> Tensor:
    """A tensor that outlives the call: CUDA graphs write into theirs again."""
    return tensor.detach().clone() if tensor.is_cuda else tensor.detach()


def _like(x: Tensor, channels: int = 1, size: tuple[int, ...] | None = None) -> Tensor:
    """Something of the right shape that nobody reads; one channel, where it may broadcast."""
    return x.new_empty(len(x), channels, *(size or x.shape[-2:]))


class Spot:
    """In the place of a module's forward: calls it, or skips it.

    Args:
        reuse: what decides.
        module: the module.
        number: the layer that it belongs to: it is computed where at least so many are.
        edge: whether its output enters the next layer out.
    """

    def __init__(self, reuse: Reuse, module: nn.Module, number: int, edge: bool = False) -> None:
        self.reuse = reuse
        self.module = module
        self.number = number
        self.edge = edge
        self.inner: Callable[..., Any] = module.forward
        # Hooks of accelerate and diffusers stand in the place of a module's forward as well.
        self.own: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the module, or what stands in for it."""
        reuse = self.reuse
        if 0 < reuse.layers < self.number:
            return self.instead(args[0] if args else kwargs["hidden_states"])
        out = self.inner(*args, **kwargs)
        if self.edge and 0 < reuse.keep == self.number - 1:
            reuse.fresh = out[0] if isinstance(out, tuple) else out
        return out

    def features(self, x: Tensor) -> Tensor:
        """The features held, if this is where they enter."""
        held = self.reuse.held
        assert held is not None
        return held if self.edge and self.reuse.layers == self.number - 1 else _like(x, size=held.shape[-2:])

    def instead(self, x: Tensor) -> Any:
        """What stands in for the output."""
        return x


class DownBlock(Spot):
    """A block of the down side none of whose outputs is needed."""

    def instead(self, x: Tensor) -> Any:
        """Its output and the skip connections."""
        block: Any = self.module
        skips = [_like(x) for _ in block.resnets]
        size = tuple(x.shape[-2:])
        for _ in block.downsamplers or ():
            size = (-(-size[0] // 2), -(-size[1] // 2))
            skips.append(_like(x, size=size))
        return _like(x, block.resnets[-1].out_channels, size), tuple(skips)


class Layer(Spot):
    """A residual block."""

    def instead(self, x: Tensor) -> Any:
        """The features, if this is where they enter; else something that nobody reads."""
        return self.features(x) if self.edge else _like(x)


class LayerAttention(Spot):
    """A spatial transformer."""

    def instead(self, x: Tensor) -> Any:
        """A tuple, as with `return_dict=False`."""
        return (self.features(x) if self.edge else x,)


class Downsampler(Spot):
    """The end of a block of the down side."""

    def instead(self, x: Tensor) -> Any:
        """T2I-Adapters add to it in place, so that it has all channels."""
        module: Any = self.module
        return _like(x, module.out_channels, (-(-x.shape[-2] // 2), -(-x.shape[-1] // 2)))


class UpBlock(Spot):
    """A block of the up side none of whose layers is computed."""

    def __init__(self, reuse: Reuse, module: nn.Module, number: int) -> None:
        super().__init__(reuse, module, number, edge=True)

    def instead(self, x: Tensor) -> Any:
        """The features that enter the next block, or something that the next block does not look at."""
        return self.features(x)


class Cross(Spot):
    """A cross-attention."""

    def __init__(self, reuse: Reuse, module: nn.Module, number: int, name: str) -> None:
        super().__init__(reuse, module, number)
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Its output, of this call or of the one that was kept."""
        lane = self.reuse.lane
        if self.reuse.cross == "run" or lane is None:
            return self.inner(*args, **kwargs)
        if self.reuse.cross == "held":
            return lane.cross[self.name]
        lane.cross[self.name] = out = self.inner(*args, **kwargs)
        return out
