"""Measuring on a pipeline: stock runs, their UNet calls again with changes, and whole images."""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from agentsd import drawing
from agentsd.api import applied
from agentsd.config import AgentSDConfig
from agentsd.drawing import UNetCall, draw, record_calls
from agentsd.results import read_json, write_json
from agentsd.schedule import progress


class Measurements:
    """Results by name, in a JSON file that is written after each of them; what is in it is not measured again.

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
            for key, value in self.settings.items():
                if (other := found["settings"].get(key)) != value:
                    raise ValueError(
                        f"{path} has measurements with {key} {other!r}, not {value!r}; name another output or remove it"
                    )
            self.values = found["measurements"]

    def expect(self, more: int) -> None:
        """Show progress towards so many results more."""
        if self.bar.disable:
            self.bar = tqdm(desc="measuring", total=0, leave=False)
        self.bar.total += more

    def get(self, name: str, measure: Callable[..., Any], *args: Any) -> Any:
        """The result of that name, measured if it is not there."""
        self.bar.set_postfix_str(name)
        if name not in self.values:
            self.values[name] = measure(*args)
            self.write()
        self.bar.update()
        return self.values[name]

    def write(self, **more: Any) -> None:
        write_json(self.path, {"settings": self.settings, **more, "measurements": self.values})


class Run(NamedTuple):
    """A stock run: its UNet calls in order, the image, H×W×3 from 0 to 1, and the seconds in all and in the UNet."""

    calls: list[UNetCall]
    image: np.ndarray
    seconds: float
    inside: float


def clock(device: torch.device) -> Callable[[], float]:
    """A function that says the time in seconds, when the device has done what it was told.

    On one thread of a CPU it is the time that the process has computed: it stands still while other processes do.
    """
    computed = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if computed else partial(drawing.now, device)


@dataclass
class Runs:
    """Runs of a pipeline; image i is of prompt i and seed i."""

    pipe: Any
    prompts: Sequence[str]
    call: dict[str, Any]
    now: Callable[[], float]
    _stock: dict[int, Run] = field(default_factory=dict)

    def _draw(self, prompt: int) -> tuple[np.ndarray, float]:
        began = self.now()
        drawn = draw(self.pipe, self.prompts[prompt], prompt, output="np", **self.call)
        assert drawn.arrays is not None
        return drawn.arrays[0], self.now() - began

    def stock(self, prompt: int) -> Run:
        if prompt not in self._stock:
            unet, times = self.pipe.unet, list[float]()

            def note(*_: Any) -> None:
                times.append(self.now())

            hooks = unet.register_forward_pre_hook(note), unet.register_forward_hook(note)
            with hooks[0], hooks[1], record_calls(unet) as calls:
                image, seconds = self._draw(prompt)
            self._stock[prompt] = Run(calls, image, seconds, sum(times[1::2]) - sum(times[::2]))
        return self._stock[prompt]

    def about(self, prompt: int) -> dict[str, Any]:
        """Seconds of a stock run and of its UNet calls, the progress at each of them, and the size of the latents."""
        run, steps = self.stock(prompt), self.pipe.scheduler.config.num_train_timesteps
        at = [progress(call.timestep, steps) for call in run.calls]
        latent = [*run.calls[0].sample.shape[-2:]]
        return {"seconds": run.seconds, "inside": run.inside, "progress": at, "latent": latent}

    def replay(self, calls: Sequence[UNetCall], config: AgentSDConfig | None = None) -> list[tuple[float, float]]:
        """Seconds and relative squared error of calls of a stock run that are made again, in turn; None is stock."""
        results = []
        with torch.no_grad(), applied(self.pipe, config) if config else nullcontext():
            for call in calls:
                began = self.now()
                out = self.pipe.unet(*call.args, **call.kwargs)[0]
                seconds, stock = self.now() - began, call.output.double()
                results.append((seconds, float((out.double() - stock).square().sum() / stock.square().sum())))
        return results

    def image(self, prompt: int, config: AgentSDConfig | None = None) -> dict[str, float]:
        """Seconds of a whole image and its mean squared error to the stock image; None is stock."""
        with applied(self.pipe, config) if config else nullcontext():
            image, seconds = self._draw(prompt)
        return {"seconds": seconds, "square": float(np.square(image - self.stock(prompt).image, dtype=float).mean())}
