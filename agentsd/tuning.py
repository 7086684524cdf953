"""Settings found by measuring: what each candidate costs and errs on a model, and the best combination of them.

The schedule is cut into parts. In each part every level of the UNet has its attention and the part its step reuse. The
time of a UNet call and the error of the noise that it predicts are measured for one change at a time, against stock on
the inputs of stock runs. Under the assumption that times and squared errors add up, the combinations that no other one
beats in both are found exactly, and some of them are verified by whole images.
"""

import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial, reduce
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from tqdm.auto import tqdm

from agentsd.config import AgentSDConfig, Phase
from agentsd.evaluation.files import read_json, write_bytes, write_json
from agentsd.patch import applied, find_layers, level_grid, patch_of
from agentsd.reuse import Reuse
from agentsd.schedule import progress

UNTIL = (0.3, 0.7, 1.0)
# Fewer tokens take next to no time.
TOKENS, AGENTS = 256, 16
SETTINGS: dict[str, dict[str, Any]] = {
    "kv 2, half": {"stride": 2, "kv_ratio": 0.5},
    "kv 2": {"stride": 2},
    "kv 4": {"stride": 4},
    "kv 8": {"stride": 8},
}
CUTS: dict[str, dict[str, Any]] = {"layer": {"reuse_layers": 1}, "level": {"reuse_depth": 1}}
INTERVALS, SHARES = (2, 3, 4), (0.0, 0.7)
PROMPTS = (
    "a photo of an astronaut riding a horse on mars",
    "a bowl of fruit on a wooden table, oil painting",
    "portrait of an old fisherman, detailed face, soft light",
    "a street in a small town at night after rain",
)


class Point(NamedTuple):
    """A choice with what it costs; costs of several add up.

    Attributes:
        time: in stock UNet calls.
        error: expected squared error of the image.
        choice: (part, "reuse" or level, name) for everything that is not stock.
    """

    time: float
    error: float
    choice: tuple[tuple[int, str | int, str], ...] = ()


def pareto(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats in both time and error, fastest first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: p[:2]):
        if not best or point.error < best[-1].error:
            best.append(point)
    return best


def sums(groups: Sequence[Sequence[Point]]) -> list[Point]:
    """The front of all sums of one point of each group."""

    def add(some: list[Point], more: Sequence[Point]) -> list[Point]:
        return pareto([Point(a.time + b.time, a.error + b.error, a.choice + b.choice) for a in some for b in more])

    return reduce(add, groups, [Point(0.0, 0.0)])


def search(parts: Sequence[Sequence[Sequence[Sequence[Point]]]]) -> list[Point]:
    """The front of all combinations, exactly.

    Args:
        parts: for each part of the schedule its alternatives, each of them groups of which one point each is taken.
    """
    return sums([pareto([point for groups in part for point in sums(groups)]) for part in parts])


def whole_steps(steps: int, interval: int, share: float) -> list[int]:
    """The steps that step reuse computes whole; extrapolation has to begin with two."""
    return [i for i in range(steps) if not i or (i - (1 if share else 0)) % interval == 0]


class Measurements:
    """Results by name, in a JSON file that is written after each of them.

    Args:
        path: of the file; what is in it is not measured again.
        settings: what the results belong to.

    Raises:
        ValueError: the file is of other settings, or of something else.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.values: dict[str, Any] = {}
        self.bar = tqdm(disable=True)
        if path.exists():
            found = read_json(path)
            if not isinstance(found, dict) or not found.keys() >= {"settings", "measurements"}:
                raise ValueError(f"{path} is not a file of agentsd-tune; name another output")
            if other := [key for key, value in self.settings.items() if found["settings"].get(key) != value]:
                key = other[0]
                raise ValueError(
                    f"{path} has measurements with {key} {found['settings'].get(key)!r}, not {self.settings[key]!r}; "
                    "name another output or remove it"
                )
            self.values = found["measurements"]

    def start(self, total: int) -> None:
        """Show progress towards so many results; more may be added."""
        self.bar = tqdm(desc="measuring", total=total, leave=False)

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """The result of that name, measured if it is not there."""
        self.bar.set_postfix_str(name)
        if name not in self.values:
            self.values[name] = measure()
            self.write()
        self.bar.update()
        return self.values[name]

    def write(self, **more: Any) -> None:
        """Write the file."""
        write_json(self.path, {"settings": self.settings, **more, "measurements": self.values})


class Call(NamedTuple):
    """A UNet call of a stock run, and the noise that it predicted."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    noise: Tensor

    @property
    def sample(self) -> Tensor:
        """The UNet's input."""
        return self.args[0] if self.args else self.kwargs["sample"]

    @property
    def timestep(self) -> float:
        """Of the noise schedule."""
        return float(self.args[1] if len(self.args) > 1 else self.kwargs["timestep"])


@dataclass
class Trajectory:
    """A stock run.

    Attributes:
        calls: every UNet call in order. The prompt's embedding and the timesteps are the run's own tensors, because
            step reuse knows a run by them.
        image: H×W×3, from 0 to 1.
        seconds: of the whole run.
        inside: of its UNet calls.
    """

    calls: list[Call] = field(default_factory=list)
    image: Any = None
    seconds: float = 0.0
    inside: float = 0.0


@dataclass(frozen=True)
class Verified:
    """A configuration with its whole images.

    Attributes:
        name: of a preset, or of a choice.
        config: the configuration.
        predicted: speed-up and root-mean-square error as predicted; None for presets.
        speedup: of whole images, against stock in between: the ratio of the medians over the prompts.
        error: root-mean-square error against the stock images of the same seeds, from 0 to 1.
    """

    name: str
    config: AgentSDConfig
    predicted: tuple[float, float] | None
    speedup: float
    error: float

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dictionaries."""
        return {**vars(self), "config": self.config.to_dict()}


def write_config(config: AgentSDConfig, path: Path, comments: Sequence[str]) -> None:
    """Write a configuration as `to_file` does, below lines of comment."""
    head = "".join(f"# {line}\n" for line in comments)
    write_bytes(path, (head + yaml.safe_dump(config.to_dict(), sort_keys=False)).encode())


def decibels(error: float) -> float:
    """The PSNR of a root-mean-square error on the scale from 0 to 1."""
    return -20 * math.log10(error) if error else math.inf


def squared_error(out: Tensor, stock: Tensor) -> float:
    """Squared error relative to the stock output's square."""
    return float((out - stock).double().square().sum() / stock.double().square().sum())


def reuse_of(unet: nn.Module) -> Reuse:
    """What an accelerated UNet keeps from call to call."""
    patch = patch_of(unet)
    assert patch is not None
    assert patch.reuse is not None
    return patch.reuse


@contextmanager
def _instead(unet: Any, noises: Sequence[Tensor]) -> Iterator[None]:
    """Context in which the first calls return what is known already."""
    inner, own, known = unet.forward, vars(unet).get("forward"), iter(noises)

    def forward(*args: Any, **kwargs: Any) -> Any:
        noise = next(known, None)
        return inner(*args, **kwargs) if noise is None else (noise,)

    unet.forward = forward
    try:
        yield
    finally:
        del unet.forward
        if own is not None:
            unet.forward = own


class Tuner:
    """Measures candidates on a pipeline and chooses.

    Args:
        pipe: a text-to-image pipeline with a UNet, not accelerated.
        prompts: image i is of prompt i and seed i.
        call: further arguments of the pipeline's call, such as `num_inference_steps`.
        measurements: where results are kept.
        repeats: UNet calls of each part on which attention is measured, and prompts on which reuse is.

    Example:
        ```python
        tuner = Tuner(pipe, prompts, {"num_inference_steps": 50}, Measurements(Path("tuned.json"), {"model": "demo"}))
        best, verified = tuner.tune(speedup=2.0)
        ```
    """

    def __init__(
        self, pipe: Any, prompts: Sequence[str], call: dict[str, Any], measurements: Measurements, repeats: int = 2
    ) -> None:
        self.pipe, self.prompts, self.call, self.repeats = pipe, prompts, call, repeats
        self.measurements = measurements
        self.measured = range(min(repeats, len(prompts)))
        self.runs: dict[int, Trajectory] = {}
        self.modules = self.cuts()
        measurements.start(len(prompts))
        stock = [self.stock(index) for index in range(len(prompts))]
        self.at: list[float] = stock[0]["progress"]
        self.outside = statistics.median(run["seconds"] / run["inside"] - 1 for run in stock)
        ends = [next(until for until in UNTIL if at < until or until == 1) for at in self.at]
        self.until = [*sorted(set(ends))[:-1], 1.0]
        self.parts = [[i for i, end in enumerate(ends) if end == until] for until in sorted(set(ends))]
        self.settings: dict[int, list[str]] = {}
        for level in sorted({layer.level for layer in find_layers(pipe.unet)}):
            grid = level_grid(stock[0]["latent"], level)
            fitting = [n for n, f in SETTINGS.items() if (grid[0] // f["stride"]) * (grid[1] // f["stride"]) >= AGENTS]
            if grid[0] * grid[1] >= TOKENS and fitting:
                self.settings[level] = fitting

    @property
    def finest(self) -> list[str]:
        """The settings of the finest level, which takes part in reused calls."""
        return ["stock", *next(iter(self.settings.values()), [])]

    def cuts(self) -> dict[str, nn.Module]:
        """The cuts for step reuse that this UNet has, and the modules whose output is kept there."""
        found: dict[str, nn.Module] = {}
        for name, fields in CUTS.items():
            phase = Phase(attention="stock", reuse_interval=2, **fields)
            try:
                with applied(self.pipe, AgentSDConfig(phases=(phase,), controlnet=False)):
                    reuse = reuse_of(self.pipe.unet)
                    number = reuse.cuts[phase] + 1
                    module = next(spot.module for spot in reuse.spots if spot.edge and spot.number == number)
            except ValueError:
                continue
            if module not in found.values():
                found[name] = module
        return found

    @property
    def reuses(self) -> dict[str, tuple[str, int, float]]:
        """Every form of step reuse: its cut, interval and share of extrapolation."""
        return {f"{k}, {cut}, {s:g}": (cut, k, s) for cut in self.modules for k in INTERVALS for s in SHARES}

    def config(self, choice: Sequence[tuple[int, str | int, str]]) -> AgentSDConfig:
        """The configuration of a choice."""
        phases = []
        for part, until in enumerate(self.until):
            fields: dict[str, Any] = {"until": until, "attention": "stock"}
            levels = {}
            for _, what, name in (entry for entry in choice if entry[0] == part):
                if isinstance(what, int):
                    levels[what] = {**SETTINGS[name], "min_tokens": TOKENS}
                else:
                    cut, interval, share = self.reuses[name]
                    fields |= {"reuse_interval": interval, "extrapolate": share, **CUTS[cut]}
            if levels:
                fields |= {"attention": "kv", "levels": levels}
            phases.append(Phase(**fields))
        return AgentSDConfig(phases=tuple(phases))

    def timed(self, function: Callable[[], Any]) -> tuple[Any, float]:
        """A result and the seconds that it took."""
        began = self.now()
        result = function()
        return result, self.now() - began

    def now(self) -> float:
        """The time in seconds, when the device has done what it was told.

        On one thread of a CPU, the time that the process has computed: it stands still while other processes do.
        """
        kind = self.pipe.unet.device.type
        if kind == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if kind == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()

    def draw(self, prompt: int) -> tuple[Any, float]:
        """An image and the seconds that it took."""
        seed = torch.Generator().manual_seed(prompt)
        result, seconds = self.timed(
            lambda: self.pipe(self.prompts[prompt], generator=seed, output_type="np", **self.call)
        )
        return result.images[0], seconds

    def run(self, prompt: int) -> Trajectory:
        """The stock run of a prompt."""
        if prompt not in self.runs:
            run = self.runs[prompt] = Trajectory()

            def before(*_: Any) -> None:
                run.inside -= self.now()

            def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
                run.inside += self.now()
                run.calls.append(Call(args, kwargs, out[0].clone()))

            unet = self.pipe.unet
            with unet.register_forward_pre_hook(before), unet.register_forward_hook(after, with_kwargs=True):
                run.image, run.seconds = self.draw(prompt)
        return self.runs[prompt]

    def stock(self, prompt: int) -> dict[str, Any]:
        """Seconds of a stock run and of its UNet calls, the progress at each of them, and the size of the latents."""

        def measure() -> dict[str, Any]:
            run, steps = self.run(prompt), self.pipe.scheduler.config.num_train_timesteps
            at = [progress(call.timestep, steps) for call in run.calls]
            latent = list(run.calls[0].sample.shape[-2:])
            return {"seconds": run.seconds, "inside": run.inside, "progress": at, "latent": latent}

        result: dict[str, Any] = self.measurements.get(f"stock, prompt {prompt}", measure)
        return result

    def compute(
        self, call: Call, config: AgentSDConfig | None = None, held: Tensor | None = None
    ) -> tuple[float, float]:
        """Seconds and relative squared error of a call.

        Args:
            call: of a stock run.
            config: the acceleration; None is stock.
            held: features at the cut of `config`, which makes the call a reused one.
        """
        unet = self.pipe.unet
        with torch.no_grad(), ExitStack() as stack:
            if config is not None:
                stack.enter_context(applied(self.pipe, config))
            if held is not None:
                reuse = reuse_of(unet)

                def hold(*_: Any) -> None:
                    reuse.layers, reuse.keep, reuse.held = reuse.keep, 0, held

                stack.enter_context(unet.register_forward_pre_hook(hold))
            out, seconds = self.timed(lambda: unet(*call.args, **call.kwargs)[0])
        return seconds, squared_error(out, call.noise)

    def watched(self, call: Call) -> tuple[float, dict[str, Tensor]]:
        """Seconds of a stock call, and its features at every cut."""
        features: dict[str, Tensor] = {}
        with ExitStack() as stack:
            for cut, module in self.modules.items():

                def keep(_: nn.Module, args: Any, out: Any, cut: str = cut) -> None:
                    features[cut] = (out[0] if isinstance(out, tuple) else out).clone()

                stack.enter_context(module.register_forward_hook(keep))
            seconds, _ = self.compute(call)
        return seconds, features

    def only(self, level: int, name: str, **reuse: Any) -> AgentSDConfig:
        """The configuration in which one level is other than stock."""
        fields: dict[str, Any] = {"attention": "stock"}
        if name != "stock":
            fields = {"attention": "kv", "levels": {level: {**SETTINGS[name], "min_tokens": TOKENS}}}
        return AgentSDConfig(phases=(Phase(**fields, **reuse),), controlnet=False)

    def round(self, part: int, turn: int) -> dict[str, tuple[float, float]]:
        """Seconds and relative squared error of one stock call with each change in turn: stock, each setting of each
        level, and reused with each setting of the finest level (features are the call's own: no error of reuse)."""
        calls = self.parts[part]
        call = self.run(turn % len(self.prompts)).calls[calls[(2 * turn + 1) * len(calls) // (2 * self.repeats)]]
        seconds, features = self.watched(call)
        results = {"stock": (seconds, 0.0)}
        for level, names in self.settings.items():
            results |= {f"{level}: {name}": self.compute(call, self.only(level, name)) for name in names}
        level = min(self.settings, default=1)
        for cut, held in features.items():
            for name in self.finest:
                config = self.only(level, name, reuse_interval=2, **CUTS[cut])
                results[f"{cut}, reused: {name}"] = self.compute(call, config, held)
        return results

    def reuse(self, prompt: int) -> dict[str, list[float]]:
        """Relative squared error of every call of a stock run, for every form of step reuse (0 in whole calls)."""
        calls = self.run(prompt).calls
        errors: dict[str, list[float]] = {name: [] for name in self.reuses}
        kept: dict[int, dict[str, Tensor]] = {}
        for i, call in enumerate(calls):
            kept[i] = self.watched(call)[1]
            kept.pop(i - 2 * max(INTERVALS), None)
            for name, (cut, interval, share) in self.reuses.items():
                whole = whole_steps(i + 1, interval, share)
                if whole[-1] == i:
                    errors[name].append(0.0)
                    continue
                held = kept[whole[-1]][cut]
                if share:
                    distance = (i - whole[-1]) / (whole[-1] - whole[-2])
                    held = torch.lerp(held, kept[whole[-2]][cut], -share * distance)
                config = self.only(1, "stock", reuse_interval=2, **CUTS[cut])
                errors[name].append(self.compute(call, config, held)[1])
        return errors

    def probe(self, part: int, what: str | int, prompt: int) -> float:
        """Mean squared error of the image where a part has one change alone.

        Calls before the part are not computed: they are stock on stock inputs.
        """
        run = self.run(prompt)
        known = [call.noise for call in run.calls[: self.parts[part][0]]]
        config = self.config([(part, what, self.probing(part, what))])
        with applied(self.pipe, config), _instead(self.pipe.unet, known):
            image, _ = self.draw(prompt)
        return float(np.square(image - run.image, dtype=np.float64).mean())

    def probing(self, part: int, what: str | int) -> str:
        """The change whose image tells how much errors matter: the strongest at a level; the first reuse that acts."""
        if isinstance(what, int):
            return self.settings[what][-1]
        acting = (
            name
            for name, (_, interval, share) in self.reuses.items()
            if len(whole_steps(len(self.parts[part]), interval, share)) < len(self.parts[part])
        )
        return next(acting, next(iter(self.reuses)))

    def tables(self) -> list[list[list[list[Point]]]]:
        """Everything measured, as `search` takes it: times in stock calls, errors as squared errors of the image."""
        get = self.measurements.get
        changes: list[str | int] = [*self.settings, *(["reuse"] if self.modules else [])]
        passes = len(self.measured) * (bool(self.modules) + len(self.parts) * len(changes))
        self.measurements.bar.total += self.repeats * len(self.parts) + passes
        rounds = [
            [get(f"calls, part {p}, turn {t}", partial(self.round, p, t)) for t in range(self.repeats)]
            for p in range(len(self.parts))
        ]
        reuses = [get(f"reuse, prompt {i}", partial(self.reuse, i)) for i in self.measured if self.modules]
        every = [turn for part in rounds for turn in part]
        times = {name: statistics.median(turn[name][0] / turn["stock"][0] for turn in every) for name in every[0]}
        tables = []
        for part, calls in enumerate(self.parts):
            errors = {
                **{name: statistics.mean(turn[name][1] for turn in rounds[part]) for name in times},
                **{r: statistics.mean(errors[r][i] for errors in reuses for i in calls) for r in self.reuses},
            }
            weight: dict[str | int, float] = {}
            for what in changes:
                squares = [
                    get(f"image, part {part}, {what}, prompt {i}", partial(self.probe, part, what, i))
                    for i in self.measured
                ]
                name = self.probing(part, what)
                noise = errors[name if what == "reuse" else f"{what}: {name}"]
                # A part of one or two calls may be too short for any reuse.
                weight[what] = statistics.mean(squares) / noise if noise and any(squares) else 1.0
            tables.append([self.groups(part, name, times, errors, weight) for name in [None, *self.reuses]])
        return tables

    @cached_property
    def front(self) -> list[Point]:
        """All combinations that are predicted to be beaten by no other, fastest first."""
        return search(self.tables())

    def groups(
        self,
        part: int,
        name: str | None,
        times: dict[str, float],
        errors: dict[str, float],
        weight: dict[str | int, float],
    ) -> list[list[Point]]:
        """What a part costs with one form of step reuse (None: without), and what each level adds."""
        calls = self.parts[part]
        whole, cut = len(calls), ""
        base = Point(float(whole), 0.0)
        if name is not None:
            cut, interval, share = self.reuses[name]
            whole = len(set(whole_steps(len(self.at), interval, share)) & set(calls))
            reused = (len(calls) - whole) * times[f"{cut}, reused: stock"]
            base = Point(whole + reused, weight["reuse"] * errors[name], ((part, "reuse", name),))
        groups = [[base]]
        for level, names in self.settings.items():
            options = [Point(0.0, 0.0)]
            for setting in names:
                more = whole * (times[f"{level}: {setting}"] - 1)
                if cut and level == min(self.settings):
                    more += (len(calls) - whole) * (times[f"{cut}, reused: {setting}"] - times[f"{cut}, reused: stock"])
                error = weight[level] * errors[f"{level}: {setting}"]
                options.append(Point(more, error, ((part, level, setting),)))
            groups.append(options)
        return groups

    def speedup(self, point: Point) -> float:
        """Of a whole image, as predicted."""
        calls = len(self.at)
        return calls * (1 + self.outside) / (point.time + calls * self.outside)

    def verify(self, configs: dict[str, AgentSDConfig]) -> dict[str, tuple[float, float]]:
        """Speed-up and root-mean-square error of whole images, all configurations in turn for each prompt."""
        stage = "+".join(configs)
        self.measurements.bar.total += len(self.prompts) * (len(configs) + 1)
        seconds: dict[str, list[float]] = {name: [] for name in ("stock", *configs)}
        squares: dict[str, list[float]] = {name: [] for name in configs}

        def measure(name: str, prompt: int) -> dict[str, float]:
            with applied(self.pipe, configs[name]) if name in configs else nullcontext():
                image, passed = self.draw(prompt)
            return {
                "seconds": passed,
                "square": float(np.square(image - self.run(prompt).image, dtype=np.float64).mean()),
            }

        for prompt in range(len(self.prompts)):
            for name in seconds:
                result = self.measurements.get(f"{name} in {stage}, prompt {prompt}", partial(measure, name, prompt))
                seconds[name].append(result["seconds"])
                squares.setdefault(name, []).append(result["square"])
        stock = statistics.median(seconds["stock"])
        return {
            name: (stock / statistics.median(seconds[name]), math.sqrt(statistics.mean(squares[name])))
            for name in configs
        }

    def tune(self, speedup: float | None = None, error: float | None = None) -> tuple[Verified, list[Verified]]:
        """The best configuration by whole images, and all that were verified.

        Args:
            speedup: of whole images, at least; the one of the smallest error is taken.
            error: root-mean-square error of the images, at most; the fastest one is taken.

        Raises:
            ValueError: no configuration reaches the target; the message says what the best reaches.
        """
        ladder: list[Point] = []
        for point in self.front:
            if not ladder or self.speedup(point) < 0.98 * self.speedup(ladder[-1]):
                ladder.append(point)
        predicted = [(self.speedup(point), math.sqrt(point.error)) for point in ladder]
        verified: dict[int, Verified] = {}

        def pick(faster: float, worse: float) -> int:
            """The place in the ladder of what meets the target best if all predictions are off by two factors."""
            if speedup is not None:
                return max((i for i, (s, _) in enumerate(predicted) if s * faster >= speedup), default=0)
            return next((i for i, (_, e) in enumerate(predicted) if e * worse <= (error or 0)), len(ladder) - 1)

        def meets(one: Verified) -> bool:
            return one.speedup >= speedup if speedup is not None else one.error <= (error or 0)

        start = pick(1, 1)
        batch = [i for i in (start, start - 1, start + 1) if 0 <= i < len(ladder)]
        while batch:
            configs = {i: self.config(ladder[i].choice) for i in batch}
            names = {i: hashlib.sha256(repr(config).encode()).hexdigest()[:8] for i, config in configs.items()}
            results = self.verify({names[i]: configs[i] for i in batch})
            for i in batch:
                verified[i] = Verified(names[i], configs[i], predicted[i], *results[names[i]])
            faster = statistics.median(one.speedup / predicted[i][0] for i, one in verified.items())
            errors = [one.error / predicted[i][1] for i, one in verified.items() if predicted[i][1]]
            wanted = pick(faster, statistics.median(errors) if errors else 1.0)
            done = any(map(meets, verified.values())) and len(verified) > 5
            if wanted in verified:
                done = any(map(meets, verified.values()))
                wanted = min(verified) - 1 if speedup is not None else max(verified) + 1
            batch = [] if done or wanted not in range(len(ladder)) else [wanted]
        found = [one for _, one in sorted(verified.items())]
        good = [one for one in found if meets(one)]
        if not good and speedup is not None:
            best = max(found, key=lambda one: one.speedup)
            raise ValueError(
                f"no configuration is {speedup:g} times as fast as stock here: the fastest that was measured reaches "
                f"{best.speedup:.2f} with an error of {best.error:.4f} ({decibels(best.error):.1f} dB)"
            )
        if not good:
            best = min(found, key=lambda one: one.error)
            raise ValueError(
                f"no configuration stays within an error of {error:g} here: the closest that was measured has "
                f"{best.error:.4f} ({decibels(best.error):.1f} dB) at {best.speedup:.2f} times the speed"
            )
        if speedup is not None:
            return min(good, key=lambda one: one.error), found
        return max(good, key=lambda one: one.speedup), found
