"""Seconds of UNet calls: every method in turn in each repetition, medians, and their mean over the schedule."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from tqdm.auto import tqdm

from agentsd.bench import calls
from agentsd.bench.architectures import Setting, build
from agentsd.drawing import now
from agentsd.methods import sharing_weights

Key = TypeVar("Key")


@dataclass
class Timing:
    """Seconds of every repetition of one kind of call, and the levels whose self-attention alone its method acts on."""

    method: str
    kind: str
    share: float
    covered: list[int] | None = None
    seconds: Sequence[float] = ()

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float | None:
        """Half the distance between the quartiles, in seconds; None of a single repetition."""
        if len(self.seconds) < 2:
            return None
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / 2


def interleaved(
    several: Mapping[Key, Callable[[], Any]], device: str, repeats: int, warmup: int = 1, title: str = ""
) -> dict[Key, list[float]]:
    """Seconds of every repetition of several calls, all in turn in each."""
    seconds: dict[Key, list[float]] = {key: [] for key in several}
    with tqdm(total=(warmup + repeats) * len(several), desc=title, unit="call") as bar:
        for repeat in range(-warmup, repeats):
            for key, call in several.items():
                began = now(device)
                call()
                if repeat >= 0:
                    seconds[key].append(now(device) - began)
                bar.update()
    return seconds


@torch.inference_mode()
def measure(setting: Setting, methods: Sequence[str], repeats: int = 5, warmup: int = 1) -> list[Timing]:
    """Time every kind of call of every method, all methods in turn in each repetition.

    Raises:
        ValueError: a method is not known or not installed.
    """
    wanted = calls.methods_of(methods)
    stock = build(setting)
    ready = [(one, kind) for one in wanted for kind in calls.kinds(one, sharing_weights(stock), setting)]
    title = f"{setting.model} {setting.latent[0]}×{setting.latent[1]}"
    seconds = interleaved({(m.text, k.name): k.call for m, k in ready}, setting.device, repeats, warmup, title)
    return [Timing(m.text, k.name, k.share, calls.covered(stock, m), seconds[m.text, k.name]) for m, k in ready]


def over_schedule(timings: Sequence[Timing]) -> dict[str, float]:
    """Mean seconds of a UNet call over the schedule, per method."""
    total: dict[str, float] = {}
    for timing in timings:
        total[timing.method] = total.get(timing.method, 0.0) + timing.share * timing.median
    return total
