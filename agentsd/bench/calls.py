"""What a method's UNet calls are: a few kinds, each with its share of a 50-step schedule."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from agentsd.api import apply
from agentsd.bench.architectures import Setting, caller
from agentsd.cache.steps import StepCacheState
from agentsd.hosts.diffusers_unet import AgentSDProcessor, Patch, find_layers, patch_of
from agentsd.methods import PEERS, Method, floor_levels, method, missing, put
from agentsd.ops.attention import sdpa
from agentsd.planning import Planner
from agentsd.schedule import in_force, progress

STEPS = 50
TIMESTEPS = tuple(999 - 1000 * step // STEPS for step in range(STEPS))


@dataclass(frozen=True)
class Kind:
    """One kind of UNet call of a method, and its share of the schedule."""

    name: str
    share: float
    call: Callable[[], Any]


def methods_of(texts: Sequence[str]) -> list[Method]:
    """Look methods up.

    Raises:
        ValueError: one does not exist, or its package or device is not there.
    """
    found = [method(text) for text in dict.fromkeys(texts)]
    lacking = missing(found)
    for one in found:
        if one.name == "xformers" and (one.text in lacking or not torch.cuda.is_available()):
            raise ValueError(f"method {one.text!r} needs the package xformers and a CUDA device")
        if package := lacking.get(one.text):
            raise ValueError(f"method {one.text!r} needs the package {package}: pip install 'agentsd[bench]'")
    return found


def covered(unet: Any, wanted: Method) -> list[int] | None:
    """The levels whose self-attention a method acts on; None where it acts on something else too."""
    options, config = wanted.options, wanted.config
    levels = {layer.level for layer in find_layers(unet)}
    if wanted.name == "floor":
        return sorted(floor_levels(unet, options))
    if wanted.name == "tomesd":
        more = options["merge_crossattn"] or options["merge_mlp"]
        return None if more else sorted(level for level in levels if 2 ** (level - 1) <= options["max_downsample"])
    if config is None or config.caches:
        return None
    planner = Planner(config, levels)
    return None if any(planner.parts(level) - {"attn"} for level in levels) else sorted(planner.covered)


def kinds(wanted: Method, unet: Any, setting: Setting) -> list[Kind]:
    """Put a method on a UNet and return its kinds of calls, in an order in which each finds what it needs cached."""
    name, options = wanted.name, wanted.options
    every = caller(unet, setting, setting.batch)
    timesteps = torch.tensor(TIMESTEPS, device=setting.device)
    model: Callable[..., Any] = torch.compile(unet, fullgraph=name not in PEERS) if setting.compile else unet

    def at(step: int, call: Callable[[Any, Tensor], Any] = every) -> Any:
        return call(model, timesteps[step])

    if name == "tgate":
        return _tgate(unet, options, at, caller(unet, setting, max(1, setting.batch // 2)))
    config = wanted.config
    if config is None:
        put(SimpleNamespace(unet=unet, scheduler=SimpleNamespace(timesteps=timesteps)), wanted)
        interval = options.get("cache_interval")
        steps = ["cached step" if step % interval else "full step" for step in range(STEPS)] if interval else []
        return _named(steps or [name] * STEPS, at)
    apply(unet, config)
    for processor in unet.attn_processors.values() if setting.fused else ():
        if isinstance(processor, AgentSDProcessor):
            processor.attend = sdpa
    patch = patch_of(unet)
    assert patch is not None
    if state := patch.technique(StepCacheState):
        return _caching(patch, state, at, lambda step: every(unet, timesteps[step]))
    return _named([_name(patch.planner, config.ends, t) for t in TIMESTEPS], at)


def _named(names: Sequence[str], call: Callable[[int], Any]) -> list[Kind]:
    """The kinds of calls of a schedule by the names of its steps; the first step of a name stands for all."""
    return [Kind(one, names.count(one) / STEPS, partial(call, names.index(one))) for one in dict.fromkeys(names)]


def _name(planner: Planner, ends: Iterable[float], timestep: float) -> str:
    """What the phases in force at a timestep are called."""
    at = progress(timestep, 1000)
    end = next(end for end in sorted(ends) if at < end or end == 1)
    phases = (in_force(planner.phases[level], at) for level in sorted(planner.covered))
    attentions = dict.fromkeys(phase.to_dict()["attention"] or "stock" for phase in phases if phase)
    return f"{'+'.join(attentions) or 'stock'} until {end:g}"


def _caching(patch: Patch, state: StepCacheState, at: Callable[[int], Any], run: Callable[[int], Any]) -> list[Kind]:
    """The kinds of calls in a run of the whole schedule, each with what is kept when it first comes."""
    config, names = patch.config, list[str]()
    # Entries that differ in nothing but how often a step is full have the same kinds of calls.
    same = len({entry.layers if entry.interval > 1 else 0 for entry in config.steps}) == 1
    ends = {*config.ends} if same else {*config.ends, *(entry.until for entry in config.steps)}
    before: dict[str, Any] = {}

    def note(*_: Any) -> None:
        where = f"{_name(patch.planner, ends, TIMESTEPS[len(names)])}, " if len(ends) > 1 else ""
        names.append(f"{where}{'full' if state.full else 'cached'} step")
        before.setdefault(names[-1], kept)

    def call(step: int) -> Any:
        state.restore(before[names[step]])
        return at(step)

    with patch.model.register_forward_pre_hook(note):
        for step in tqdm(range(STEPS), desc="kinds of calls", leave=False):
            kept = state.snapshot()
            run(step)
    return _named(names, call)


def _tgate(unet: Any, options: dict[str, Any], at: Callable[..., Any], half: Callable[..., Any]) -> list[Kind]:
    from tgate.tgate_utils import register_forward, tgate_scheduler

    def stage(step: int) -> Any:
        """The arguments that a step registers, and whether it is without the unconditional half."""
        return *tgate_scheduler(cur_step=step, **options), step >= options["gate_step"]

    def call(step: int) -> Any:
        ca, sa, keep_shape, gated = stage(step)
        register_forward(unet, "Attention", ca_kward=ca, sa_kward=sa, keep_shape=keep_shape)
        return at(step, half) if gated else at(step)

    stages = [stage(step) for step in range(STEPS)]
    return _named([f"as step {stages.index(one)}" for one in stages], call)
