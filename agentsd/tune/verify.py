"""Whole images decide: which configurations of a front are drawn, and which of them meets the target best."""

import hashlib
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from agentsd.config import AgentSDConfig

# Of whole images: speed relative to stock, and root-mean-square error against the stock images, from 0 to 1.
Figures = tuple[float, float]
ENOUGH = 6


@dataclass(frozen=True)
class Verified:
    """A configuration with its whole images.

    Attributes:
        name: of a preset, or of a choice.
        predicted: None for presets.
        speedup: of whole images, against stock in between: the ratio of the medians over the prompts.
        error: root-mean-square error against the stock images of the same seeds, from 0 to 1.
    """

    name: str
    config: AgentSDConfig
    predicted: Figures | None
    speedup: float
    error: float

    def __str__(self) -> str:
        return f"{self.speedup:.2f} times as fast as stock, error {decibels(self.error)}"


def decibels(error: float) -> str:
    """A root-mean-square error with its PSNR."""
    return f"{error:.4f} ({-20 * math.log10(error) if error else math.inf:.1f} dB)"


@dataclass(frozen=True)
class Target:
    """What is wanted of whole images: a speed-up, with the smallest error; or an error, with the highest speed."""

    speedup: float | None = None
    error: float | None = None

    def met(self, figures: Figures) -> bool:
        speedup, error = figures
        return speedup >= self.speedup if self.speedup is not None else error <= (self.error or 0)

    def pick(self, front: Sequence[Figures], faster: float = 1.0, worse: float = 1.0) -> int:
        """The index, in a front with the fastest first, of what meets the target best if predictions are off by two
        factors; the nearest end where nothing does."""
        fitting = [i for i, (speedup, error) in enumerate(front) if self.met((speedup * faster, error * worse))]
        return max(fitting, default=0) if self.speedup is not None else min(fitting, default=len(front) - 1)

    def best(self, found: Sequence[Verified]) -> Verified:
        """The best of those that meet the target.

        Raises:
            ValueError: none does; the message says what the best reaches.
        """
        good = [one for one in found if self.met((one.speedup, one.error))]
        fastest = max(good or found, key=lambda one: one.speedup)
        closest = min(good or found, key=lambda one: one.error)
        if good:
            return closest if self.speedup is not None else fastest
        if self.speedup is not None:
            raise ValueError(
                f"no configuration is {self.speedup:g} times as fast as stock here: the fastest that was measured "
                f"reaches {fastest.speedup:.2f} with an error of {decibels(fastest.error)}"
            )
        raise ValueError(
            f"no configuration stays within an error of {self.error:g} here: the closest that was measured has "
            f"{decibels(closest.error)} at {closest.speedup:.2f} times the speed"
        )


def verify(
    target: Target,
    front: Sequence[tuple[Figures, AgentSDConfig]],
    draw: Callable[[dict[str, AgentSDConfig]], dict[str, Figures]],
) -> list[Verified]:
    """Draw what is predicted to meet the target and its neighbours, then what that corrects the prediction to.

    Args:
        target: what is wanted.
        front: predicted figures and configurations, fastest first.
        draw: measures configurations by name.

    Returns:
        What was drawn, fastest first.
    """
    predicted = [figures for figures, _ in front]
    found: dict[int, Verified] = {}
    start = target.pick(predicted)
    batch = [i for i in (start, start - 1, start + 1) if 0 <= i < len(front)]
    while batch:
        names = {i: hashlib.sha256(repr(front[i][1]).encode()).hexdigest()[:8] for i in batch}
        results = draw({name: front[i][1] for i, name in names.items()})
        found |= {i: Verified(name, front[i][1], predicted[i], *results[name]) for i, name in names.items()}
        met = any(target.met((one.speedup, one.error)) for one in found.values())
        faster = statistics.median(one.speedup / predicted[i][0] for i, one in found.items())
        errors = [one.error / predicted[i][1] for i, one in found.items() if predicted[i][1]]
        wanted = target.pick(predicted, faster, statistics.median(errors or [1.0]))
        done = met and len(found) >= ENOUGH
        if wanted in found:
            done = met
            wanted = min(found) - 1 if target.speedup is not None else max(found) + 1
        batch = [] if done or wanted not in range(len(front)) else [wanted]
    return [one for _, one in sorted(found.items())]
