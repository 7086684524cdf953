"""The step cache: deep features of the U kept from full steps, and extrapolated, for the cached steps in between.

DeepCache (Ma et al., CVPR 2024) computes only the outermost layers of the U in most steps and takes the features that
enter them from the last full step; here they can be extrapolated from the last two.
"""

import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from agentsd.cache.technique import Call
from agentsd.config import AgentSDWarning, StepCache
from agentsd.schedule import in_force, progress

_EVERY_LAYER = 1 << 30
_MOST_HISTORIES = 64
# Share of the noise schedule from one full step to the next above which images change visibly: preset turbo's without
# max_gap are 30 dB from stock at 0.15, 28 at 0.19 and 23 at 0.25 (docs/step-cache.md, "Few steps").
_FAR = 1 / 6
_KNOWN = {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"}


def full_steps(steps: int, cache: StepCache) -> list[int]:
    """Which of so many steps are full, `max_gap` aside; extrapolation has to begin with two."""
    return [i for i in range(steps) if not i or (i - (1 if cache.extrapolate else 0)) % cache.interval == 0]


@dataclass
class History:
    """What is kept for one of the calls of each step: guidance may make two, each with features of its own.

    Attributes:
        text: the prompt's embedding, the same object in every step of an image. Another one may be another prompt, and
            to compare them would wait for the device.
        key: shape, dtype and device of the sample.
        run: the schedule.
        position: that of the last call in the schedule.
        cache: the entry of the configuration in force in the last call.
        features: of the last two full steps, and their numbers among the calls.
        calls: number of calls so far.
        at: progress of the last full step.
    """

    text: "weakref.ref[Tensor] | None"
    key: tuple[Any, ...]
    run: object
    position: float
    cache: StepCache | None = None
    features: list[tuple[int, Tensor]] = field(default_factory=list)
    calls: int = -1
    at: float = 0

    def extrapolated(self, share: float) -> Tensor:
        """The features now, from those of the last full steps."""
        if not share:
            return self.features[-1][1]
        (before, F0), (after, F1) = self.features[-2:]
        return torch.lerp(F1, F0, -share * (self.calls - after) / (after - before))


class StepCacheState:
    """The step cache on one UNet: what it keeps from call to call, and which modules the call in progress skips.

    Skip connections are counted from the outermost, which is the output of the first convolution; so are the layers of
    the up side, which take one each. A call that computes n layers computes the modules that n of them need.

    Attributes:
        cuts: the number of layers that a cached step computes, for each entry with an interval above 1.
        full: whether the call in progress is a full step; None outside of calls.
        layers: layers that the call in progress computes; 0 is all of them.
        keep: the cut at which the call in progress keeps its features; 0 is none.
        cached: the features that enter the layers that are computed.
        fresh: the features that the call in progress has kept.
        bytes: the most that was kept since the model was accelerated.

    Raises:
        ValueError: the UNet has other blocks than Stable Diffusion's, or fewer layers than are to be computed.
    """

    def __init__(self, model: nn.Module, entries: Sequence[StepCache]) -> None:
        self.entries = tuple(entries)
        self.histories: list[History] = []
        self.turn = 0
        self.position: float = 0
        self.last = False
        self.bytes = 0
        self.warned = False
        self.forced: Tensor | None = None
        self.modules: list[Skippable] = []
        self._after()
        kind = type(model).__name__
        self.cuts = {entry: entry.layers for entry in self.entries if entry.interval > 1}
        blocks: list[Any] = [*model.down_blocks, *model.up_blocks]  # type: ignore[misc]
        if others := sorted({type(block).__name__ for block in blocks} - _KNOWN):
            raise ValueError(
                f"steps is set; it must be empty for {kind}, whose blocks {', '.join(others)} are not supported"
            )
        most = sum(len(block.resnets) for block in model.up_blocks) - 1  # type: ignore[misc, union-attr]
        for layers in self.cuts.values():
            if layers > most:
                raise ValueError(f"layers of steps is {layers}; for this {kind} it must be at most {most}")
        self._find(model)

    def _find(self, model: Any) -> None:
        """Every module that may be skipped."""
        number = 1
        for block in model.down_blocks:
            self.modules.append(DownBlock(self, block, number + 1))
            attentions = getattr(block, "attentions", [None] * len(block.resnets))
            for resnet, attention in zip(block.resnets, attentions, strict=True):
                number += 1
                self.modules.append(Resnet(self, resnet, number))
                if attention is not None:
                    self.modules.append(Attention(self, attention, number))
            for downsampler in block.downsamplers or ():
                number += 1
                self.modules.append(Downsampler(self, downsampler, number))
        if model.mid_block is not None:
            self.modules.append(Skippable(self, model.mid_block, _EVERY_LAYER))
        number = 0
        for block in reversed(model.up_blocks):
            self.modules.append(UpBlock(self, block, number + 1, edge=True))
            attentions = getattr(block, "attentions", [None] * len(block.resnets))
            for resnet, attention in reversed(list(zip(block.resnets, attentions, strict=True))):
                number += 1
                self.modules.append(Resnet(self, resnet, number, edge=attention is None))
                if attention is not None:
                    self.modules.append(Attention(self, attention, number, edge=True))

    def attach(self) -> None:
        """Let each module that may be skipped ask before it computes."""
        for module in self.modules:
            module.attach()

    def detach(self) -> None:
        """Give every module its own forward back."""
        self.reset()
        for module in self.modules:
            module.detach()

    def _after(self) -> None:
        self.layers = self.keep = 0
        self.full: bool | None = None
        self.cached: Tensor | None = None
        self.fresh: Tensor | None = None
        self.history: History | None = None

    def reset(self) -> None:
        """Let the next call be stock, and keep nothing."""
        self.histories.clear()
        self._after()

    def before_call(self, call: Call) -> None:
        """Decide whether the call is a full or a cached step."""
        self._after()
        now = progress(call.timestep, call.num_train_timesteps)
        entry = in_force(self.entries, now)
        cut = self.cuts.get(entry) if entry else None
        self.full = True
        if self.forced is not None:
            if cut:
                self.full, self.layers, self.cached = False, cut, self.forced
            return
        history = self.history = self._enter(call)
        if history is None or entry is None:
            return
        history.calls += 1
        if history.cache is not entry:
            if history.cache is None or self.cuts.get(history.cache) != cut:
                history.features.clear()
            history.cache = entry
            self._warn_of_few_steps(entry, call)
        if cut is None:
            return
        enough = len(history.features) >= (2 if entry.extrapolate else 1)
        due = bool(history.features) and history.calls - history.features[-1][0] >= entry.interval
        far = entry.max_gap is not None and now - history.at > entry.max_gap + 1e-9
        self.full = due or far or not enough
        if self.full:
            self.keep, history.at = cut, now
        else:
            self.layers, self.cached = cut, history.extrapolated(entry.extrapolate)

    def after_call(self, *_: Any) -> None:
        """Keep the features of a full step; after the last step of a run, nothing."""
        history = self.history
        if history is not None:
            if self.fresh is not None:
                # CUDA graphs write into their outputs again.
                fresh = self.fresh.detach().clone() if self.fresh.is_cuda else self.fresh.detach()
                two = history.cache is not None and history.cache.extrapolate > 0
                history.features = [*history.features, (history.calls, fresh)][-2 if two else -1 :]
            self.bytes = max(self.bytes, sum(f.nbytes for each in self.histories for _, f in each.features))
            if self.last:
                history.features.clear()
        self._after()

    def _enter(self, call: Call) -> History | None:
        """The history of a call, empty again where the call does not go on from the history's last one."""
        clock = call.clock
        if any(history.text is not None and history.text() is None for history in self.histories):
            self.histories.clear()
        if self.histories and self.histories[0].run is clock.run and clock.position == self.position:
            self.turn += 1
        else:
            self.turn = 0
        self.position = clock.position
        self.last = bool(clock.schedule) and clock.position == len(clock.schedule) - 1
        key = (call.sample.shape, call.sample.dtype, call.sample.device)
        if self.turn >= _MOST_HISTORIES:
            return None
        if self.turn < len(self.histories):
            history = self.histories[self.turn]
            same = (history.text() if history.text else None) is call.text
            if same and history.key == key and history.run is clock.run and clock.position > history.position:
                history.position = clock.position
                return history
            del self.histories[self.turn :]
        text = None if call.text is None else weakref.ref(call.text)
        self.histories.append(History(text, key, clock.run, clock.position))
        return self.histories[-1]

    def _warn_of_few_steps(self, entry: StepCache, call: Call) -> None:
        """Warn, once, where a run has so few steps that full steps are far apart."""
        schedule = call.clock.schedule
        if self.warned or entry not in self.cuts or entry.max_gap is not None or len(schedule) < 2:
            return
        step = abs(schedule[0] - schedule[-1]) / (len(schedule) - 1) / call.num_train_timesteps
        if step * entry.interval > _FAR:
            self.warned = True
            warnings.warn(
                f"interval of steps is {entry.interval}: in a run of {len(schedule)} steps, {step * entry.interval:.0%}"
                f" of the noise schedule are between two full steps, and images change visibly beyond {_FAR:.0%}; take "
                "more steps, or set max_gap",
                AgentSDWarning,
                stacklevel=2,
            )

    def snapshot(self) -> Any:
        """What is kept between calls now, for `restore`."""
        return self.position, self.turn, self._copies(self.histories)

    def restore(self, kept: Any) -> None:
        """Keep what was kept when `snapshot` was called, as often as need be."""
        self.position, self.turn, histories = kept
        self.histories = self._copies(histories)

    @staticmethod
    def _copies(histories: Sequence[History]) -> list[History]:
        return [replace(history, features=[*history.features]) for history in histories]

    def cut_module(self, layers: int) -> nn.Module:
        """The module whose output is kept where cached steps compute so many layers."""
        return next(module.module for module in self.modules if module.edge and module.number == layers + 1)

    @contextmanager
    def force(self, features: Tensor) -> Iterator[None]:
        """Context in which every call is a cached step with these features."""
        self.forced = features
        try:
            yield
        finally:
            self.forced = None

    def describe(self) -> Iterator[str]:
        """Sentences on what is kept."""
        start = 0.0
        for entry in self.entries:
            if entry in self.cuts:
                gap = entry.max_gap
                far = "" if gap is None else f", and any over {gap:g} of the schedule after the last full one"
                layers = f"{entry.layers} layers" if entry.layers > 1 else "layer"
                yield (
                    f"{start:g}–{entry.until:g}: one step in {entry.interval} is full{far}; cached steps compute the "
                    f"outermost {layers} of each side"
                )
            start = entry.until
        yield f"kept between steps: at most {self.bytes / 2**20:.2g} MiB so far"


def _like(x: Tensor, channels: int = 1, size: tuple[int, ...] | None = None) -> Tensor:
    """Something of the right shape that nobody reads; one channel, where it may broadcast."""
    return x.new_empty(len(x), channels, *(size or x.shape[-2:]))


class Skippable:
    """In the place of a module's forward: calls it, or skips it.

    Args:
        state: what decides.
        module: the module.
        number: the layer that it belongs to: it is computed where at least so many are.
        edge: whether its output enters the next layer out.
    """

    def __init__(self, state: StepCacheState, module: nn.Module, number: int, edge: bool = False) -> None:
        self.state = state
        self.module = module
        self.number = number
        self.edge = edge
        self.inner: Callable[..., Any] = module.forward
        # Hooks of accelerate and diffusers stand in the place of a module's forward as well.
        self.previous: Callable[..., Any] | None = None

    def attach(self) -> None:
        """Stand in the place of the module's forward."""
        self.previous = vars(self.module).get("forward")
        self.module.forward = self  # type: ignore[assignment]

    def detach(self) -> None:
        """Put back what stood there."""
        if vars(self.module).get("forward") is self:
            del self.module.forward
            if self.previous is not None:
                self.module.forward = self.previous  # type: ignore[assignment]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the module, or what stands in for it."""
        state = self.state
        if 0 < state.layers < self.number:
            return self.instead(args[0] if args else kwargs["hidden_states"])
        out = self.inner(*args, **kwargs)
        if self.edge and 0 < state.keep == self.number - 1:
            state.fresh = out[0] if isinstance(out, tuple) else out
        return out

    def features(self, x: Tensor) -> Tensor:
        """The cached features, if this is where they enter; else something that nobody reads."""
        cached = self.state.cached
        assert cached is not None
        return cached if self.edge and self.state.layers == self.number - 1 else _like(x, size=cached.shape[-2:])

    def instead(self, x: Tensor) -> Any:
        """What stands in for the output."""
        return x


class DownBlock(Skippable):
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


class Resnet(Skippable):
    """A residual block."""

    def instead(self, x: Tensor) -> Any:
        """The features, if this is where they enter."""
        return self.features(x) if self.edge else _like(x)


class Attention(Skippable):
    """A spatial transformer."""

    def instead(self, x: Tensor) -> Any:
        """A tuple, as with `return_dict=False`."""
        return (self.features(x) if self.edge else x,)


class Downsampler(Skippable):
    """The end of a block of the down side."""

    def instead(self, x: Tensor) -> Any:
        """T2I-Adapters add to it in place, so that it has all channels."""
        module: Any = self.module
        return _like(x, module.out_channels, (-(-x.shape[-2] // 2), -(-x.shape[-1] // 2)))


class UpBlock(Skippable):
    """A block of the up side none of whose layers is computed."""

    def instead(self, x: Tensor) -> Any:
        """The features that enter the next block."""
        return self.features(x)
