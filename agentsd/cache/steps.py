"""The step cache: deep features of the U kept from full steps, and extrapolated, for the cached steps in between.

DeepCache (Ma et al., CVPR 2024) computes only the outermost layers of the U in most steps and takes the features that
enter them from the last full step; here they can be extrapolated from the last two.
"""

import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

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
    return [i for i in range(steps) if not i or (i + 1 - _needed(cache)) % cache.interval == 0]


def _cut(entry: StepCache) -> int:
    """The number of layers that a cached step computes; 0 where every step is full."""
    return entry.layers if entry.interval > 1 else 0


def _needed(entry: StepCache) -> int:
    """From how many full steps a cached step's features are made."""
    return 2 if entry.extrapolate else 1


@dataclass
class History:
    """What is kept for one of the calls of each step: guidance may make two, each with features of its own.

    Attributes:
        text: the prompt's embedding, the same object in every step of an image. Another one may be another prompt, and
            to compare them would wait for the device.
        key: the schedule; shape, dtype and device of the sample.
        position: that of the last call in the schedule.
        cache: the entry of the configuration in force in the last call.
        features: of the last full steps, at most two, each after its number among the calls.
        calls: number of calls so far.
        at: progress of the last full step.
    """

    text: "weakref.ref[Any]"
    key: tuple[Any, ...]
    position: float
    cache: StepCache
    features: tuple[tuple[int, Tensor], ...] = ()
    calls: int = -1
    at: float = 0


class StepCacheState:
    """The step cache on one UNet: what it keeps from call to call, and which modules the call in progress skips.

    Skip connections are counted from the outermost, which is the output of the first convolution; so are the layers of
    the up side, which take one each. A call that computes n layers computes the modules that n of them need.

    Attributes:
        full: whether the call in progress is a full step; None outside of calls.
        layers: layers that the call in progress computes; 0 is all of them.
        keep: the cut at which the call in progress keeps its features; 0 is none.
        cached: the features that enter the layers that are computed.
        fresh: the features that the call in progress has kept.
        bytes: the most that was kept since the model was accelerated.

    Raises:
        ValueError: the UNet has other blocks than Stable Diffusion's, or fewer layers than are to be computed.
    """

    def __init__(self, model: Any, entries: Sequence[StepCache]) -> None:
        self.entries = tuple(entries)
        self.bytes = 0
        self.warned = False
        self.histories: list[History] = []
        self.reset()
        kind = type(model).__name__
        if others := sorted({type(block).__name__ for block in (*model.down_blocks, *model.up_blocks)} - _KNOWN):
            raise ValueError(
                f"steps is set; it must be empty for {kind}, whose blocks {', '.join(others)} are not supported"
            )
        most = sum(len(block.resnets) for block in model.up_blocks) - 1
        layers = max(map(_cut, self.entries))
        if layers > most:
            raise ValueError(f"layers of steps is {layers}; for this {kind} it must be at most {most}")
        self.modules = list(_skippable(self, model))

    def attach(self) -> None:
        for module in self.modules:
            module.attach()

    def detach(self) -> None:
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
        self.histories.clear()
        self.turn, self.position, self.last = 0, 0.0, False
        self._after()

    def before_call(self, call: Call) -> None:
        """Decide whether the call is a full or a cached step."""
        self._after()
        self.full = True
        now = progress(call.timestep, call.num_train_timesteps)
        entry = in_force(self.entries, now)
        assert entry is not None
        self._warn_of_few_steps(entry, call)
        history = self.history = self._enter(call, entry)
        if history is None:
            return
        history.calls += 1
        cut = _cut(entry)
        if cut != _cut(history.cache):
            history.features = ()
        history.cache = entry
        if not cut:
            return
        due = bool(history.features) and history.calls - history.features[-1][0] >= entry.interval
        far = entry.max_gap is not None and now - history.at > entry.max_gap + 1e-9
        self.full = due or far or len(history.features) < _needed(entry)
        if self.full:
            self.keep, history.at = cut, now
        else:
            self.layers, self.cached = cut, history.features[-1][1]
            if entry.extrapolate:
                (before, F0), (after, F1) = history.features
                self.cached = torch.lerp(F1, F0, -entry.extrapolate * (history.calls - after) / (after - before))

    def after_call(self, *_: Any) -> None:
        """Keep the features of a full step; after the last step of a run, nothing."""
        if history := self.history:
            if self.fresh is not None:
                # CUDA graphs write into their outputs again.
                fresh = self.fresh.detach().clone() if self.fresh.is_cuda else self.fresh.detach()
                history.features = (*history.features, (history.calls, fresh))[-_needed(history.cache) :]
            self.bytes = max(self.bytes, sum(f.nbytes for each in self.histories for _, f in each.features))
            if self.last:
                history.features = ()
        self._after()

    def _enter(self, call: Call, entry: StepCache) -> History | None:
        """The history of a call, empty again where the call does not go on from the history's last one."""
        clock = call.clock
        key = (clock.run, call.sample.shape, call.sample.dtype, call.sample.device)
        text = self if call.text is None else call.text
        again = self.histories and self.histories[0].key[0] is clock.run and clock.position == self.position
        self.turn, self.position = self.turn + 1 if again else 0, clock.position
        self.last = bool(clock.schedule) and clock.position == len(clock.schedule) - 1
        if self.turn >= _MOST_HISTORIES:
            return None
        if self.turn < len(self.histories):
            history = self.histories[self.turn]
            if history.text() is text and history.key == key and clock.position > history.position:
                history.position = clock.position
                return history
            del self.histories[self.turn :]
        self.histories.append(History(weakref.ref(text), key, clock.position, entry))
        return self.histories[-1]

    def _warn_of_few_steps(self, entry: StepCache, call: Call) -> None:
        """Warn, once, where a run has so few steps that full steps are far apart."""
        schedule = call.clock.schedule
        if self.warned or not _cut(entry) or entry.max_gap is not None or len(schedule) < 2:
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
        return self.position, self.turn, [replace(history) for history in self.histories]

    def restore(self, kept: Any) -> None:
        """Keep what was kept when `snapshot` was called, as often as need be."""
        self.position, self.turn, histories = kept
        self.histories = [replace(history) for history in histories]

    def describe(self) -> Iterator[str]:
        start = 0.0
        for entry in self.entries:
            if _cut(entry):
                gap = entry.max_gap
                far = "" if gap is None else f", and any over {gap:g} of the schedule after the last full one"
                layers = f"{entry.layers} layers" if entry.layers > 1 else "layer"
                yield (
                    f"{start:g}–{entry.until:g}: one step in {entry.interval} is full{far}; cached steps compute the "
                    f"outermost {layers} of each side"
                )
            start = entry.until
        yield f"kept between steps: at most {self.bytes / 2**20:.2g} MiB so far"


@dataclass(eq=False, repr=False)
class Skippable:
    """In the place of a module's forward: calls it, or skips it.

    Attributes:
        state: what decides.
        kind: what the module is, which says what its output looks like.
        number: the layer that it belongs to: it is computed where at least so many are.
        edge: whether its output enters the next layer out.
    """

    state: StepCacheState
    kind: str
    module: Any
    number: int
    edge: bool = False

    def attach(self) -> None:
        # Hooks of accelerate and diffusers stand in the place of a module's forward as well.
        self.previous = vars(self.module).get("forward")
        self.inner: Callable[..., Any] = self.module.forward
        self.module.forward = self

    def detach(self) -> None:
        if vars(self.module).get("forward") is self:
            del self.module.forward
            if self.previous is not None:
                self.module.forward = self.previous

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        state = self.state
        if 0 < state.layers < self.number:
            return self.instead(args[0] if args else kwargs["hidden_states"])
        out = self.inner(*args, **kwargs)
        if self.edge and 0 < state.keep == self.number - 1:
            state.fresh = out[0] if isinstance(out, tuple) else out
        return out

    def instead(self, x: Tensor) -> Any:
        """What stands in for the output: the cached features, if this is where they enter; else what nobody reads.

        The latter has one channel, where it may broadcast; T2I-Adapters add in place to what leaves a block.
        """
        module, cached = self.module, self.state.cached

        def unread(size: Sequence[int], channels: int = 1) -> Tensor:
            return x.new_empty(len(x), channels, *size)

        size, half = x.shape[-2:], [-(-side // 2) for side in x.shape[-2:]]
        if self.kind == "downsampler":
            return unread(half, module.out_channels)
        if self.kind == "down block":
            sizes = [size] * len(module.resnets) + [half] * bool(module.downsamplers)
            return unread(sizes[-1], module.resnets[-1].out_channels), tuple(map(unread, sizes))
        out = unread(size)
        if self.edge:
            assert cached is not None
            out = cached if self.state.layers == self.number - 1 else unread(cached.shape[-2:])
        return (out,) if self.kind == "attention" else out


def _skippable(state: StepCacheState, model: Any) -> Iterator[Skippable]:
    """Every module that may be skipped."""

    def layers(block: Any) -> list[tuple[Any, Any]]:
        none = [None] * len(block.resnets)
        return list(zip(block.resnets, getattr(block, "attentions", none), strict=True))

    number = 1
    for block in model.down_blocks:
        yield Skippable(state, "down block", block, number + 1)
        for resnet, attention in layers(block):
            number += 1
            yield Skippable(state, "resnet", resnet, number)
            if attention is not None:
                yield Skippable(state, "attention", attention, number)
        for downsampler in block.downsamplers or ():
            number += 1
            yield Skippable(state, "downsampler", downsampler, number)
    if model.mid_block is not None:
        yield Skippable(state, "mid block", model.mid_block, _EVERY_LAYER)
    number = 0
    for block in reversed(model.up_blocks):
        yield Skippable(state, "up block", block, number + 1, edge=True)
        for resnet, attention in reversed(layers(block)):
            number += 1
            yield Skippable(state, "resnet", resnet, number, edge=attention is None)
            if attention is not None:
                yield Skippable(state, "attention", attention, number, edge=True)
