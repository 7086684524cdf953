"""From measurements to a configuration: what each candidate costs, the front of their combinations, the best of it."""

import math
import statistics
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from agentsd.cache.steps import full_steps
from agentsd.config import AgentSDConfig, StepCache
from agentsd.tune.candidates import Candidates, only
from agentsd.tune.measure import Measurements, Runs
from agentsd.tune.search import Point, search
from agentsd.tune.verify import Figures, Target, Verified, verify

# Of the points of the front that are drawn as whole images, one is so much slower than the next.
STEP = 0.98


def _key(what: int | str, name: str) -> str:
    return f"level {what}: {name}" if isinstance(what, int) else name


class Tuner:
    """Measures candidates on a pipeline and chooses.

    Args:
        pipe: a text-to-image pipeline with a UNet, not accelerated.
        prompts: image i is of prompt i and seed i.
        call: further arguments of the pipeline's call, such as `num_inference_steps`.
        measurements: where results are kept.
        repeats: UNet calls of each part on which attention is measured, and prompts on which the step cache is.
        now: the time in seconds; None is `measure.clock`.

    Example:
        ```python
        tuner = Tuner(pipe, prompts, {"num_inference_steps": 50}, Measurements(Path("tuned.json"), {"model": "demo"}))
        best, verified = tuner.tune(Target(speedup=2.0))
        ```
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str],
        call: dict[str, Any],
        measurements: Measurements,
        repeats: int = 2,
        now: Callable[[], float] | None = None,
    ) -> None:
        self.runs = Runs(pipe, prompts, call, now)
        self.measurements, self.repeats = measurements, repeats
        self.measured = range(min(repeats, len(prompts)))
        measurements.expect(len(prompts))
        stock = [measurements.get(f"stock, prompt {i}", self.runs.about, i) for i in range(len(prompts))]
        self.calls = len(stock[0]["progress"])
        self.outside = statistics.median(run["seconds"] / run["inside"] - 1 for run in stock)
        self.candidates = Candidates.of(pipe, stock[0]["progress"], stock[0]["latent"])

    def changed_calls(self, part: int, turn: int) -> dict[str, tuple[float, float]]:
        """Seconds and relative squared error of one UNet call with each change: stock, each attention of each level,
        and as a cached step with each attention of the finest level (of which the time alone counts)."""
        replay, candidates = self.runs.replay, self.candidates
        calls, indices = self.runs.stock(turn % len(self.runs.prompts)).calls, candidates.parts[part]
        index = indices[(2 * turn + 1) * len(indices) // (2 * self.repeats)]
        results = {"stock": replay([calls[index]])[0]}
        for level, names in candidates.attentions.items():
            for name in names:
                results[_key(level, name)] = replay([calls[index]], only(level, name))[0]
        finest = candidates.finest
        for layers in candidates.layers:
            for name in (None, *candidates.attentions.get(finest, ())):
                config = only(finest, name, StepCache(interval=2, layers=layers))
                results[f"{layers} layers: {name}"] = replay(calls[max(index, 1) - 1 :][:2], config)[1]
        return results

    def cache_errors(self, name: str, prompt: int) -> list[float]:
        """Relative squared error of every call of a stock run with a step cache; 0 in full steps."""
        config = only(self.candidates.finest, cache=self.candidates.caches[name])
        return [error for _, error in self.runs.replay(self.runs.stock(prompt).calls, config)]

    def image_error(self, part: int, what: int | str, prompt: int) -> float:
        """Mean squared error of the image where a part has one change alone."""
        config = self.candidates.config(((part, what, self.probe(part, what)),))
        return self.runs.image(prompt, config, stock_calls=self.candidates.parts[part][0])["square"]

    def probe(self, part: int, what: int | str) -> str:
        """The change whose image says how much errors matter: the last attention of a level; the first step cache
        with a cached step in the part."""
        if isinstance(what, int):
            return self.candidates.attentions[what][-1]
        calls, caches = len(self.candidates.parts[part]), self.candidates.caches
        return next((n for n, cache in caches.items() if len(full_steps(calls, cache)) < calls), next(iter(caches)))

    def tables(self) -> list[list[list[list[Point]]]]:
        """Everything measured, as `search` takes it: times in stock calls, errors as squared errors of the image."""
        get, parts, caches = self.measurements.get, self.candidates.parts, self.candidates.caches
        changes: list[int | str] = [*self.candidates.attentions, *(["steps"] if caches else [])]
        self.measurements.expect(
            self.repeats * len(parts) + len(self.measured) * (len(caches) + len(parts) * len(changes))
        )
        turns = [
            [get(f"calls, part {part}, turn {turn}", self.changed_calls, part, turn) for turn in range(self.repeats)]
            for part in range(len(parts))
        ]
        cached = {
            name: [get(f"{name}, prompt {i}", self.cache_errors, name, i) for i in self.measured] for name in caches
        }
        every = [turn for part in turns for turn in part]
        times = {name: statistics.median(turn[name][0] / turn["stock"][0] for turn in every) for name in every[0]}
        tables = []
        for part, calls in enumerate(parts):
            errors = {name: statistics.mean(turn[name][1] for turn in turns[part]) for name in times}
            errors |= {name: statistics.mean(run[i] for run in cached[name] for i in calls) for name in caches}
            for what in changes:
                squares = [
                    get(f"image, part {part}, {what}, prompt {i}", self.image_error, part, what, i)
                    for i in self.measured
                ]
                # A part of one or two calls may have no cached step.
                noise = errors[_key(what, self.probe(part, what))]
                weight = statistics.mean(squares) / noise if noise and any(squares) else 1.0
                for name in self.candidates.names(what):
                    errors[_key(what, name)] *= weight
            tables.append([self.groups(part, name, times, errors) for name in (None, *caches)])
        return tables

    def groups(
        self, part: int, name: str | None, times: dict[str, float], errors: dict[str, float]
    ) -> list[list[Point]]:
        """What a part costs with one step cache (None: without), and what the attention of each level adds."""
        candidates = self.candidates
        calls = set(candidates.parts[part])
        full, layers, base = len(calls), 0, Point(float(len(calls)), 0.0)
        if name is not None:
            cache = candidates.caches[name]
            full, layers = len(calls.intersection(full_steps(self.calls, cache))), cache.layers
            time = full + (len(calls) - full) * times[f"{layers} layers: None"]
            base = Point(time, errors[name], ((part, "steps", name),))
        groups = [[base]]
        for level, attentions in candidates.attentions.items():
            options = [Point(0.0, 0.0)]
            for attention in attentions:
                more = full * (times[_key(level, attention)] - 1)
                if layers and level == candidates.finest:
                    saved = times[f"{layers} layers: {attention}"] - times[f"{layers} layers: None"]
                    more += (len(calls) - full) * saved
                options.append(Point(more, errors[_key(level, attention)], ((part, level, attention),)))
            groups.append(options)
        return groups

    @cached_property
    def front(self) -> list[Point]:
        """All combinations that are predicted to be beaten by no other, fastest first."""
        return search(self.tables())

    def figures(self, point: Point) -> Figures:
        """Of whole images, as predicted."""
        outside = self.calls * self.outside
        return (self.calls + outside) / (point.time + outside), math.sqrt(point.error)

    def measure(self, configs: dict[str, AgentSDConfig]) -> dict[str, Figures]:
        """Figures of whole images, stock and all configurations in turn for each prompt."""
        stage, prompts = "+".join(configs), range(len(self.runs.prompts))
        options = {"stock": None, **configs}
        self.measurements.expect(len(prompts) * len(options))
        results: dict[str, list[dict[str, float]]] = {name: [] for name in options}
        for prompt in prompts:
            for name, config in options.items():
                key = f"{name} in {stage}, prompt {prompt}"
                results[name].append(self.measurements.get(key, self.runs.image, prompt, config))
        seconds = {name: statistics.median(one["seconds"] for one in found) for name, found in results.items()}
        errors = {name: math.sqrt(statistics.mean(one["square"] for one in found)) for name, found in results.items()}
        return {name: (seconds["stock"] / seconds[name], errors[name]) for name in configs}

    def tune(self, target: Target) -> tuple[Verified, list[Verified]]:
        """The best configuration by whole images, and all that were verified, fastest first.

        Raises:
            ValueError: no configuration reaches the target; the message says what the best reaches.
        """
        ladder: list[tuple[Figures, AgentSDConfig]] = []
        for point in self.front:
            figures = self.figures(point)
            if not ladder or figures[0] < STEP * ladder[-1][0][0]:
                ladder.append((figures, self.candidates.config(point.choice)))
        found = verify(target, ladder, self.measure)
        return target.best(found), found

    def result(self, target: Target, best: Verified, verified: Sequence[Verified]) -> dict[str, Any]:
        """What was found, in plain numbers, strings, lists and dictionaries."""
        return {
            "target": {"speedup": target.speedup, "error": target.error},
            "front": [[*self.figures(point), point.choice] for point in self.front],
            "verified": [one.to_dict() for one in verified],
            "chosen": best.name,
        }
