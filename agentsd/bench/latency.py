"""Seconds of UNet calls: every method in turn in each repetition, medians, and their mean over the schedule."""

import copy
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from tqdm.auto import tqdm

from agentsd.bench import calls
from agentsd.bench.architectures import Setting, build


@dataclass
class Timing:
    """Seconds of every repetition of one kind of call, and the levels whose self-attention alone its method acts on."""

    method: str
    kind: str
    share: float
    covered: list[int] | None = None
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median, in seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float | None:
        """Half the distance between the quartiles, in seconds; None of a single repetition."""
        if len(self.seconds) < 2:
            return None
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / 2


class Stopwatch:
    """Seconds between `stopwatch` entered and left; of CUDA events on a CUDA device."""

    seconds = 0.0


@contextmanager
def stopwatch(device: str) -> Iterator[Stopwatch]:
    """Context that is timed."""
    watch = Stopwatch()
    if torch.device(device).type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        yield watch
        end.record()
        torch.cuda.synchronize(device)
        watch.seconds = start.elapsed_time(end) / 1000
    else:
        began = time.perf_counter()
        yield watch
        watch.seconds = time.perf_counter() - began


def sharing_weights(unet: nn.Module) -> nn.Module:
    """A copy of a UNet with modules and hooks of its own."""
    return copy.deepcopy(unet, {id(tensor): tensor for tensor in (*unet.parameters(), *unet.buffers())})


@torch.inference_mode()
def measure(setting: Setting, methods: Sequence[str], repeats: int = 5, warmup: int = 1) -> list[Timing]:
    """Time every kind of call of every method, all methods in turn in each repetition.

    Raises:
        ValueError: a method is not known or not installed.
    """
    wanted = calls.methods_of(methods)
    stock = build(setting)
    ready = [(one, calls.kinds(one, sharing_weights(stock), setting)) for one in wanted]
    timings = {
        (one.text, kind.name): Timing(one.text, kind.name, kind.share, calls.covered(stock, one))
        for one, several in ready
        for kind in several
    }
    title = f"{setting.model} {setting.latent[0]}×{setting.latent[1]}"
    with tqdm(total=(warmup + repeats) * len(timings), desc=title, unit="call") as bar:
        for repeat in range(-warmup, repeats):
            for one, several in ready:
                for kind in several:
                    with stopwatch(setting.device) as watch:
                        kind.call()
                    if repeat >= 0:
                        timings[one.text, kind.name].seconds.append(watch.seconds)
                    bar.update()
    return list(timings.values())


def over_schedule(timings: Sequence[Timing]) -> dict[str, float]:
    """Mean seconds of a UNet call over the schedule, per method."""
    total: dict[str, float] = {}
    for timing in timings:
        total[timing.method] = total.get(timing.method, 0.0) + timing.share * timing.median
    return total
