"""Latency and memory of the UNet, stock beside accelerated beside the peers, interleaved in one process.

A method is a set of kinds of UNet calls and the share that each has of a 50-step schedule; what is reported is the
median time of each kind and their weighted mean.
"""

import copy
import importlib.metadata
import json
import math
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from agentsd import attention, merging, processor
from agentsd.config import AgentSDConfig
from agentsd.patch import apply, find_layers, patch_of
from agentsd.reuse import Lane
from agentsd.schedule import phase_at, progress

STEPS = 50
TIMESTEPS = tuple(999 - 1000 * step // STEPS for step in range(STEPS))

_XL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
# Where UNet2DConditionModel's defaults are not those of the architecture.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd21": {
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl": {"sample_size": 128, **_XL},
}


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        model: an architecture of `ARCHITECTURES` with random weights, or whatever `pipelines.load` takes.
        latent: height and width of the latents.
        batch: pictures in a UNet call; guidance makes two of each.
        fused: torch's fused attention wherever this package has one of its own.
    """

    model: str = "sd15"
    latent: tuple[int, int] = (64, 64)
    batch: int = 2
    dtype: str = "bfloat16"
    device: str = "cpu"
    compile: bool = False
    fused: bool = False


@dataclass(frozen=True)
class Kind:
    """One kind of UNet call of a method, and its share of the schedule."""

    name: str
    share: float
    call: Callable[[], Any]


@dataclass
class Timing:
    """Seconds of every repetition of one kind of call."""

    method: str
    kind: str
    share: float
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median, in seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, in seconds."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / 2


def build(setting: Setting) -> nn.Module:
    """The UNet of a setting, in evaluation mode."""
    from diffusers import UNet2DConditionModel

    dtype = getattr(torch, setting.dtype)
    if setting.model in ARCHITECTURES:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.random.fork_rng(), torch.device(setting.device):
                torch.manual_seed(0)
                unet: nn.Module = UNet2DConditionModel(**ARCHITECTURES[setting.model])
        finally:
            torch.set_default_dtype(before)
    else:
        from agentsd import pipelines

        unet = pipelines.load(setting.model, device=setting.device, dtype=dtype).unet
    return unet.eval().requires_grad_(False)


def caller(unet: Any, setting: Setting, batch: int) -> Callable[[Any, Tensor], Any]:
    """A function that calls a UNet at a timestep with the first `batch` elements of a setting's inputs."""
    generator = torch.Generator().manual_seed(1)
    dtype, config = getattr(torch, setting.dtype), unet.config

    def noise(*shape: int) -> Tensor:
        whole = torch.randn(setting.batch, *shape, generator=generator)
        return whole[:batch].to(setting.device, dtype)

    sample, text = noise(config.in_channels, *setting.latent), noise(77, config.cross_attention_dim)
    more = {}
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        more["added_cond_kwargs"] = {"text_embeds": noise(pooled), "time_ids": noise(6)}
    # The peers' wrappers count on the positions that pipelines use.
    return lambda net, timestep: net(sample, timestep, encoder_hidden_states=text, return_dict=False, **more)


class _Identity:
    """A self-attention that costs nothing."""

    def __call__(self, attn: nn.Module, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """`name:key=value,key=value` → the name and the options, their values read as YAML."""
    import yaml

    name, _, rest = text.partition(":")
    options = {}
    for assignment in filter(None, rest.split(",")):
        key, equals, value = assignment.partition("=")
        if not equals or not key:
            raise ValueError(f"method is {text!r}; options are written name:key=value,key=value")
        options[key] = yaml.safe_load(value.replace("+", ", ") if value.startswith("[") else value)
    return name, options


@contextmanager
def _attention_of(setting: Setting) -> Iterator[None]:
    """Context in which the attention is the one that a setting asks for."""
    before = attention._PRODUCTS_ARE_FASTER
    attention._PRODUCTS_ARE_FASTER = before and not setting.fused
    try:
        yield
    finally:
        attention._PRODUCTS_ARE_FASTER = before


PEERS = {"tomesd": "tomesd", "deepcache": "DeepCache", "tgate": "tgate"}


def check(methods: Sequence[str]) -> None:
    """Raise ValueError for a method that does not exist or whose package is not installed."""
    known = ("stock", "xformers", "floor", *AgentSDConfig.presets(), *PEERS)
    for text in methods:
        name, options = parse(text)
        if name not in known:
            raise ValueError(f"method is {name!r}; it must be one of {', '.join(known)}")
        if name in PEERS:
            if _version(PEERS[name]) is None:
                raise ValueError(f"method {name!r} needs the package {PEERS[name]}: pip install 'agentsd[bench]'")
        elif name == "xformers":
            if _version(name) is None or not torch.cuda.is_available():
                raise ValueError(f"method {name!r} needs the package xformers and a CUDA device")
        elif name not in ("stock", "floor"):
            configuration(name, options)


def configuration(preset: str, options: dict[str, Any]) -> AgentSDConfig:
    """A preset with fields replaced: of the configuration, of every phase, or with `0/field` of the first phase.

    A field of a phase is replaced at all of its levels.
    """
    values = AgentSDConfig.from_preset(preset).to_dict()
    for key, value in options.items():
        number, slash, name = key.rpartition("/")
        if not slash and key in values:
            values[key] = value
            continue
        if slash and not (number.isdigit() and int(number) < len(values["phases"])):
            raise ValueError(f"{key} must name one of the phases 0 to {len(values['phases']) - 1}")
        for phase in [values["phases"][int(number)]] if slash else values["phases"]:
            for fields in phase["levels"].values() if isinstance(phase["levels"], dict) else ():
                fields.pop(name, None)
            phase[name] = value
    return AgentSDConfig.from_dict(values)


def kinds(method: str, unet: Any, setting: Setting) -> list[Kind]:
    """Put a method on a UNet and return its kinds of calls, in an order in which each finds what it needs cached."""
    name, options = parse(method)
    whole = caller(unet, setting, setting.batch)

    def at(step: int, call: Callable[[Any, Tensor], Any] = whole) -> Any:
        return call(model, timesteps[step])

    timesteps = torch.tensor(TIMESTEPS, device=setting.device)
    model: Callable[..., Any] = torch.compile(unet, fullgraph=name not in PEERS) if setting.compile else unet
    if name == "xformers":
        unet.enable_xformers_memory_efficient_attention()
    if name in ("stock", "xformers"):
        return [Kind(name, 1.0, partial(at, 0))]
    if name == "floor":
        layers = find_layers(unet)
        levels = options.get("levels", min(layer.level for layer in layers))
        for layer in layers:
            if levels == "all" or layer.level in (levels if isinstance(levels, list) else [levels]):
                layer.block.attn1.set_processor(_Identity())
        return [Kind("floor", 1.0, partial(at, 0))]
    if name == "tomesd":
        import tomesd

        tomesd.apply_patch(unet, **({"ratio": 0.4} | options))
        return [Kind("merge", 1.0, partial(at, 0))]
    if name == "deepcache":
        return _deepcache(unet, options, at, timesteps)
    if name == "tgate":
        half = caller(unet, setting, max(1, setting.batch // 2))
        return _tgate(unet, options, at, half)
    config = configuration(name, options)
    apply(unet, config)
    steps = [config.phases.index(phase_at(config.phases, progress(t, 1000))) for t in TIMESTEPS]
    if config.reuses:
        return _reusing(unet, config, steps, at)
    return [
        Kind(f"{phase.attention} until {phase.until:g}", steps.count(i) / STEPS, partial(at, steps.index(i)))
        for i, phase in enumerate(config.phases)
        if i in steps
    ]


def _reusing(unet: Any, config: AgentSDConfig, steps: list[int], at: Callable[..., Any]) -> list[Kind]:
    """The kinds of calls in a run of the whole schedule, each with what is kept when it first comes."""
    patch = patch_of(unet)
    assert patch is not None
    assert patch.reuse is not None
    reuse, names = patch.reuse, list[str]()
    # Phases that differ in nothing but how often a call is whole have the same kinds of calls.
    bare = [
        replace(phase, until=1.0, reuse_interval=2, reuse_spacing="uniform", reuse_span=None) for phase in config.phases
    ]
    same = [f"{phase.attention} until {phase.until:g}, " if len(set(bare)) > 1 else "" for phase in config.phases]
    before: dict[str, list[Lane]] = {}

    def note(*_: Any) -> None:
        name = f"{same[steps[len(names)]]}{'reused' if reuse.layers else 'whole'}"
        maps = ", groups kept" if any(block.kept for block in patch.blocks.values()) else ""
        names.append(f"{name}{maps}{'' if reuse.cross == 'run' else ', cross ' + reuse.cross}")
        before.setdefault(names[-1], lanes)

    def call(step: int, name: str) -> Any:
        reuse.lanes = [lane.copy() for lane in before[name]]
        return at(step)

    handle = unet.register_forward_pre_hook(note)
    for step in tqdm(range(STEPS), desc="kinds of calls", leave=False):
        lanes = [lane.copy() for lane in reuse.lanes]
        at(step)
    handle.remove()
    return [Kind(name, names.count(name) / STEPS, partial(call, names.index(name), name)) for name in before]


def _deepcache(unet: Any, options: dict[str, Any], at: Callable[..., Any], timesteps: Tensor) -> list[Kind]:
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(SimpleNamespace(unet=unet, scheduler=SimpleNamespace(timesteps=timesteps)))
    helper.set_params(**({"cache_interval": 3, "cache_branch_id": 0} | options))
    helper.enable()
    interval = helper.params["cache_interval"]
    share = -(-STEPS // interval) / STEPS
    reused = [Kind("reused", 1 - share, partial(at, 1))] if interval > 1 else []
    return [Kind("whole", share, partial(at, 0)), *reused]


def _tgate(unet: Any, options: dict[str, Any], at: Callable[..., Any], half: Callable[..., Any]) -> list[Kind]:
    from tgate.tgate_utils import register_forward, tgate_scheduler

    gate = options.get("gate_step", 10)
    stages: dict[tuple[Any, ...], list[int]] = {}
    for step in range(STEPS):
        ca, sa, keep_shape = tgate_scheduler(cur_step=step, **({"gate_step": gate} | options))
        stages.setdefault((*ca.values(), *sa.values(), keep_shape, step >= gate), []).append(step)

    def call(step: int) -> Any:
        ca, sa, keep_shape = tgate_scheduler(cur_step=step, **({"gate_step": gate} | options))
        register_forward(unet, "Attention", ca_kward=ca, sa_kward=sa, keep_shape=keep_shape)
        return at(step, half) if step >= gate else at(step)

    ordered = sorted(stages.values(), key=min)
    return [Kind(f"as step {steps[0]}", len(steps) / STEPS, partial(call, steps[0])) for steps in ordered]


@contextmanager
def _stopwatch(device: str) -> Iterator[Callable[[], float]]:
    """Yields a function that gives the seconds between entering and leaving."""
    if torch.device(device).type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        yield lambda: start.elapsed_time(end) / 1000
        end.record()
        torch.cuda.synchronize(device)
    else:
        began = time.perf_counter()
        ended = began
        yield lambda: ended - began
        ended = time.perf_counter()


@torch.inference_mode()
def measure(setting: Setting, methods: Sequence[str], repeats: int = 5, warmup: int = 1) -> list[Timing]:
    """Time every kind of call of every method, all methods in turn in each repetition.

    Raises:
        ValueError: a method is not known or not installed.
    """
    check(methods)
    stock = build(setting)
    shared = {id(tensor): tensor for tensor in (*stock.parameters(), *stock.buffers())}
    ready = [(method, kinds(method, copy.deepcopy(stock, dict(shared)), setting)) for method in methods]
    timings = {
        (method, kind.name): Timing(method, kind.name, kind.share) for method, several in ready for kind in several
    }
    calls = (warmup + repeats) * len(timings)
    title = f"{setting.model} {setting.latent[0]}×{setting.latent[1]}"
    with _attention_of(setting), tqdm(total=calls, desc=title, unit="call") as bar:
        for repeat in range(-warmup, repeats):
            for method, several in ready:
                for kind in several:
                    with _stopwatch(setting.device) as seconds:
                        kind.call()
                    if repeat >= 0:
                        timings[method, kind.name].seconds.append(seconds())
                    bar.update()
    return list(timings.values())


@torch.inference_mode()
def _peak(setting: Setting, method: str) -> int:
    with _attention_of(setting):
        for kind in kinds(method, build(setting), setting):
            kind.call()
    return _most_memory(setting.device)


def _most_memory(device: str) -> int:
    """The most memory that the process has had, in bytes: allocated on CUDA, resident on a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux hands ru_maxrss on from the process that starts another one: there it is the parent's where that is larger.
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    peaks = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
    if peaks:
        return peaks[0] * 1024
    # Bytes on macOS, KiB elsewhere.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _in_a_process(task: dict[str, Any], what: str) -> int:
    done = subprocess.run(
        [sys.executable, "-m", "agentsd.benchmark", json.dumps(task)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {what} failed: {done.stderr.strip().splitlines()[-1]}")
    return int(done.stdout.split()[-1])


def peak_memory(setting: Setting, method: str) -> int:
    """Peak memory of one call of each kind, in bytes, in a process of its own: allocated on CUDA, resident on a CPU."""
    return _in_a_process({"setting": asdict(setting), "method": method}, method)


PARTS = ("matching", "folding and merging", "unmerging", "attention", "projections and copies", "rest of the UNet")


@contextmanager
def _timed(owner: Any, name: str, part: str, spent: dict[str, float], device: str) -> Iterator[None]:
    """Context in which the seconds spent in a function, called by a layer, are added to a part."""
    function = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        if part != "layers" and not spent["depth"]:
            return function(*args, **kwargs)
        spent["depth"] += 1
        with _stopwatch(device) as passed:
            out = function(*args, **kwargs)
        spent["depth"] -= 1
        spent[part] += passed()
        return out

    setattr(owner, name, timed)
    try:
        yield
    finally:
        setattr(owner, name, function)


@torch.inference_mode()
def profile(setting: Setting, methods: Sequence[str], repeats: int = 3) -> dict[str, dict[str, float]]:
    """Where the time of a UNet call goes: median seconds of each of `PARTS`, per kind of call.

    Waits for the device after each part, so the sum is more than an undisturbed call takes on a GPU. `stock` and the
    methods of this package only; parts inside a processor that is not ours are not told apart from its projections.

    Raises:
        ValueError: a method is not known, or is none of this package.
    """
    check(methods)
    stock = build(setting)
    shared = {id(tensor): tensor for tensor in (*stock.parameters(), *stock.buffers())}
    result = {}
    for method in methods:
        if method != "stock" and parse(method)[0] not in AgentSDConfig.presets():
            raise ValueError(f"method is {method!r}; the profile is of stock and {', '.join(AgentSDConfig.presets())}")
        unet = copy.deepcopy(stock, dict(shared))
        spent = dict.fromkeys(("depth", "layers", *PARTS), 0.0)
        timed = [
            (processor, "match", PARTS[0]),
            (merging.Match, "fold", PARTS[1]),
            (merging.TokenMap, "merge", PARTS[1]),
            (merging.TokenMap, "unmerge", PARTS[2]),
            (processor, "attention", PARTS[3]),
            (nn.functional, "scaled_dot_product_attention", PARTS[3]),
            *((layer.block.attn1, "forward", "layers") for layer in find_layers(unet)),
        ]
        with ExitStack() as stack:
            stack.enter_context(_attention_of(setting))
            for owner, name, part in timed:
                stack.enter_context(_timed(owner, name, part, spent, setting.device))
            for kind in kinds(method, unet, setting):
                rows = []
                for _ in range(repeats + 1):
                    spent.update(dict.fromkeys(spent, 0.0))
                    with _stopwatch(setting.device) as passed:
                        kind.call()
                    told_apart = sum(spent[part] for part in PARTS)
                    rows.append(spent | {PARTS[4]: spent["layers"] - told_apart, PARTS[5]: passed() - spent["layers"]})
                result[f"{method}: {kind.name}"] = {
                    part: statistics.median(row[part] for row in rows[1:]) for part in PARTS
                }
    return result


def over_schedule(timings: Sequence[Timing]) -> dict[str, float]:
    """Mean seconds of a UNet call over the schedule, per method."""
    total: dict[str, float] = {}
    for timing in timings:
        total[timing.method] = total.get(timing.method, 0.0) + timing.share * timing.median
    return total


def environment(device: str) -> dict[str, Any]:
    """Versions, device, threads and commit."""
    versions = {name: _version(name) for name in ("torch", "diffusers", "agentsd", *PEERS.values())}
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    cuda = torch.device(device).type == "cuda"
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "python": platform.python_version(),
        **{name: version for name, version in versions.items() if version},
        "device": torch.cuda.get_device_name(device) if cuda else _cpu(),
        "driver": _driver() if cuda else None,
        "threads": torch.get_num_threads(),
        "commit": git.stdout.strip() or None,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# The layers that `micro` can measure beside accelerated ones.
STOCK, MODULE = "stock", "module"


def _layer(kind: AgentSDConfig | str, count: int, setting: Setting) -> Callable[[], Any]:
    """A call of one layer on `count` tokens: `STOCK`, `MODULE` (agentsd.nn, 49 agents) or a configuration's."""
    from diffusers.models.attention import BasicTransformerBlock

    from agentsd.nn import AgentAttention
    from agentsd.processor import AgentSDProcessor, Block, Plan

    side = round(count**0.5)
    grid, dtype = (side, side), getattr(torch, setting.dtype)
    # Smooth, as the tokens of a picture are.
    coarse = torch.randn(setting.batch, 320, 16, 16, generator=torch.Generator().manual_seed(count))
    image = nn.functional.interpolate(coarse, size=grid, mode="bilinear")
    x = image.flatten(2).transpose(1, 2).to(setting.device, dtype).contiguous()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == MODULE:
            module = AgentAttention(320, 8, 49, grid=grid).to(setting.device, dtype).eval()
            return lambda: module(x)
        block = BasicTransformerBlock(320, 8, 40, cross_attention_dim=768).to(setting.device, dtype).eval()
    if isinstance(kind, str):
        return lambda: block.attn1(x)
    phase = kind.phases[0].parts[0]
    places = merging.destinations(grid, phase.cell_on(grid), 0, setting.device)
    state = Block({1: Plan(phase, kind.ratio_of(phase), grid, places)}, 1, (phase,))
    block.attn1.set_processor(AgentSDProcessor(block.attn1.processor, state))

    def call() -> None:
        state.remember(block.norm1, (x,))
        block.attn1(x)

    return call


@torch.inference_mode()
def micro(
    tokens: Sequence[int], layers: dict[str, AgentSDConfig | str], setting: Setting, repeats: int = 5
) -> dict[str, dict[int, float]]:
    """Median seconds of one self-attention layer of SD 1.5's finest grid, per number of tokens (square grids).

    Args:
        tokens: numbers of tokens, squares.
        layers: name → configuration whose first phase is measured, or one of `STOCK`, `MODULE`.
        setting: batch, dtype and device.
        repeats: repetitions, all variants in turn in each.
    """
    seconds: dict[tuple[str, int], list[float]] = {}
    with tqdm(total=(repeats + 1) * len(tokens) * len(layers), desc="layers") as bar:
        for count in tokens:
            calls = {name: _layer(kind, count, setting) for name, kind in layers.items()}
            for repeat in range(repeats + 1):
                for name, call in calls.items():
                    with _stopwatch(setting.device) as passed:
                        call()
                    if repeat:
                        seconds.setdefault((name, count), []).append(passed())
                    bar.update()
    return {name: {n: statistics.median(seconds[name, n]) for n in tokens} for name in layers}


@torch.inference_mode()
def _layer_peak(kind: AgentSDConfig | str, count: int, setting: Setting) -> int:
    call = _layer(kind, count, setting)
    # A first call on few tokens loads what does not depend on their number.
    _layer(kind, 256, setting)()
    cuda = torch.device(setting.device).type == "cuda"
    if cuda:
        before = torch.cuda.memory_allocated(setting.device)
        torch.cuda.reset_peak_memory_stats(setting.device)
    else:
        Path("/proc/self/clear_refs").write_text("5")
        before = _most_memory(setting.device)
    call()
    return _most_memory(setting.device) - before


def layer_memory(kind: AgentSDConfig | str, count: int, setting: Setting) -> int:
    """Bytes by which one call of a layer raises the memory of a process of its own: its output and all in between.

    Raises:
        RuntimeError: the process failed; so it does on a CPU where the system is not Linux.
    """
    named = kind if isinstance(kind, str) else kind.to_dict()
    return _in_a_process({"setting": asdict(setting), "layer": named, "tokens": count}, f"{count} tokens")


def exponent(times: Mapping[int, float], start: int = 4096) -> float:
    """The exponent of the growth with the number of tokens from `start` on: least squares in the logarithms."""
    points = [(math.log(n), math.log(t)) for n, t in times.items() if n >= start]
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def _setting(values: dict[str, Any]) -> Setting:
    return Setting(**(values | {"latent": tuple(values["latent"])}))


def _measured(task: dict[str, Any]) -> int:
    setting = _setting(task["setting"])
    if "method" in task:
        return _peak(setting, task["method"])
    layer = task["layer"]
    return _layer_peak(layer if isinstance(layer, str) else AgentSDConfig.from_dict(layer), task["tokens"], setting)


if __name__ == "__main__":
    print(_measured(json.loads(sys.argv[1])))
