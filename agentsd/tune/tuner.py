"""From measurements to a configuration: what each candidate costs, the front of their combinations, the best of it."""

import math
import statistics
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from agentsd.cache.steps import full_steps
from agentsd.config import AgentSDConfig
from agentsd.tune.candidates import Candidates, key, only
from agentsd.tune.measure import Measurements, Runs, clock
from agentsd.tune.search import Choice, Point, search
from agentsd.tune.verify import Figures, Target, Verified, verify

# Of the points of the front that are drawn as whole images, one is so much slower than the next.
STEP = 0.98


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
        self.runs = Runs(pipe, prompts, call, now or clock(pipe.unet.device))
        self.measurements, self.repeats = measurements, repeats
        measurements.expect(len(prompts))
        stock = [measurements.get(f"stock, prompt {i}", self.runs.about, i) for i in range(len(prompts))]
        self.calls = len(stock[0]["progress"])
        self.outside = statistics.median(run["seconds"] / run["inside"] - 1 for run in stock)
        self.candidates = Candidates.of(pipe, stock[0]["progress"], stock[0]["latent"])

    def changed_calls(self, part: int, turn: int) -> dict[str, tuple[float, float]]:
        """Seconds and relative squared error of one UNet call with each change."""
        calls, indices = self.runs.stock(turn % len(self.runs.prompts)).calls, self.candidates.parts[part]
        index = indices[(2 * turn + 1) * len(indices) // (2 * self.repeats)]
        # A cached step needs a full one before it.
        alone, pair = calls[index : index + 1], calls[max(index, 1) - 1 :][:2]
        changes = self.candidates.changed_calls().items()
        return {
            name: self.runs.replay(pair if config and config.steps else alone, config)[-1] for name, config in changes
        }

    def cache_errors(self, name: str, prompt: int) -> list[float]:
        """Relative squared error of every call of a stock run with a step cache; 0 in full steps."""
        config = only(self.candidates.finest, cache=self.candidates.caches[name])
        return [error for _, error in self.runs.replay(self.runs.stock(prompt).calls, config)]

    def image_error(self, part: int, what: int | str, prompt: int) -> float:
        """Mean squared error of the image where a part has one change alone."""
        config = self.candidates.config(((part, what, self.probe(part, what)),))
        return self.runs.image(prompt, config)["square"]

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
        options, measured = self.candidates.options, range(min(self.repeats, len(self.runs.prompts)))
        self.measurements.expect(self.repeats * len(parts) + len(measured) * (len(caches) + len(parts) * len(options)))
        turns = [
            [get(f"calls, part {part}, turn {turn}", self.changed_calls, part, turn) for turn in range(self.repeats)]
            for part in range(len(parts))
        ]
        cached = {name: [get(f"{name}, prompt {i}", self.cache_errors, name, i) for i in measured] for name in caches}
        every = [turn for part in turns for turn in part]
        times = {name: statistics.median(turn[name][0] / turn["stock"][0] for turn in every) for name in every[0]}
        tables = []
        for part, calls in enumerate(parts):
            errors = {name: statistics.mean(turn[name][1] for turn in turns[part]) for name in times}
            errors |= {name: statistics.mean(run[i] for run in cached[name] for i in calls) for name in caches}
            for what, names in options.items():
                start = f"image, part {part}, {what}, prompt"
                square = statistics.mean(get(f"{start} {i}", self.image_error, part, what, i) for i in measured)
                # A part of one or two calls may have no cached step.
                noise = errors[key(what, self.probe(part, what))]
                weight = square / noise if noise and square else 1.0
                errors |= {key(what, name): errors[key(what, name)] * weight for name in names}
            tables.append([self.groups(part, name, times, errors) for name in (None, *caches)])
        return tables

    def groups(
        self, part: int, name: str | None, times: dict[str, float], errors: dict[str, float]
    ) -> list[list[Point]]:
        """What a part costs with one step cache (None: without), and what the attention of each level adds."""
        candidates, calls = self.candidates, self.candidates.parts[part]
        full, cached, step = len(calls), 0, ""
        base = Point(float(full), 0.0)
        if name is not None:
            cache = candidates.caches[name]
            full = len(set(calls).intersection(full_steps(self.calls, cache)))
            cached, step = len(calls) - full, f"{cache.layers} layers"
            base = Point(full + cached * times[f"{step}: None"], errors[name], ((part, "steps", name),))
        groups = [[base]]
        for level, attentions in candidates.attentions.items():
            groups.append([Point(0.0, 0.0)])
            for attention in attentions:
                more = full * (times[key(level, attention)] - 1)
                if cached and level == candidates.finest:
                    more += cached * (times[f"{step}: {attention}"] - times[f"{step}: None"])
                groups[-1].append(Point(more, errors[key(level, attention)], ((part, level, attention),)))
        return groups

    @cached_property
    def front(self) -> list[tuple[Figures, Choice]]:
        """All combinations that are predicted to be beaten by no other, fastest first, with figures of whole images."""
        outside = self.calls * self.outside
        points = search(self.tables())
        return [(((self.calls + outside) / (p.time + outside), math.sqrt(p.error)), p.choice) for p in points]

    def measure(self, configs: dict[str, AgentSDConfig]) -> dict[str, Figures]:
        """Figures of whole images, stock and all configurations in turn for each prompt."""
        stage, prompts = "+".join(configs), range(len(self.runs.prompts))
        options = {"stock": None, **configs}
        self.measurements.expect(len(prompts) * len(options))
        images = [
            {
                name: self.measurements.get(f"{name} in {stage}, prompt {i}", self.runs.image, i, config)
                for name, config in options.items()
            }
            for i in prompts
        ]
        seconds = {name: statistics.median(image[name]["seconds"] for image in images) for name in options}
        errors = {name: math.sqrt(statistics.mean(image[name]["square"] for image in images)) for name in configs}
        return {name: (seconds["stock"] / seconds[name], errors[name]) for name in configs}

    def tune(self, target: Target) -> tuple[Verified, list[Verified]]:
        """The best configuration by whole images, and all that were verified, fastest first.

        Raises:
            ValueError: no configuration reaches the target; the message says what the best reaches.
        """
        ladder: list[tuple[Figures, AgentSDConfig]] = []
        for figures, choice in self.front:
            if not ladder or figures[0] < STEP * ladder[-1][0][0]:
                ladder.append((figures, self.candidates.config(choice)))
        found = verify(target, ladder, self.measure)
        return target.best(found), found

    def result(self, target: Target, best: Verified, verified: Sequence[Verified]) -> dict[str, Any]:
        """What was found, as JSON holds it."""
        return {
            "target": vars(target),
            "front": [[*figures, choice] for figures, choice in self.front],
            "verified": [{**vars(one), "config": one.config.to_dict()} for one in verified],
            "chosen": best.name,
        }
