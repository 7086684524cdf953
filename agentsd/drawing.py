"""Drawing prompts with seeds, and recording UNet calls: the one way for every tool."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor, nn


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """A generator on the CPU for each image, so that every device starts from the same noise."""
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


@dataclass(frozen=True)
class Drawn:
    """The images of one call of a pipeline.

    Attributes:
        images: as PIL images; empty for other outputs.
        arrays: B×H×W×3 from 0 to 1 (`np`), or latents B×C×h×w (`latent`).
        flagged: whether the model's safety checker has blackened an image.
    """

    images: list[Image]
    arrays: NDArray[Any] | None
    seconds: float
    flagged: bool = False


def now(device: torch.device | str = "cuda") -> float:
    """The time in seconds, when a CUDA device has done what it was told."""
    if torch.device(device).type == "cuda" and torch.cuda.is_initialized():
        torch.cuda.synchronize(device)
    return time.perf_counter()


def draw(
    pipe: Callable[..., Any],
    prompts: Sequence[str] | str,
    seeds: Sequence[int] | int,
    *,
    output: str = "pil",
    label: str | None = None,
    **call: Any,
) -> Drawn:
    """Call a pipeline, or what `methods.prepared` makes of one, once.

    Args:
        pipe: what is called.
        prompts: one for each image, as the seeds.
        seeds: one for each image.
        output: `pil`, `np` or `latent`.
        label: of the progress bar; None shows none.
        **call: further arguments of the pipeline's call, such as `num_inference_steps`.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    seeds = [seeds] if isinstance(seeds, int) else list(seeds)
    set_bar, bar = getattr(pipe, "set_progress_bar_config", dict), getattr(pipe, "_progress_bar_config", {})
    set_bar(desc=label, disable=True if label is None else None, leave=False)
    try:
        began = now()
        result = pipe(prompts, generator=generators(seeds), output_type=output, **call)
        seconds = now() - began
    finally:
        set_bar(**bar)
    flagged = any(getattr(result, "nsfw_content_detected", None) or [])
    if output == "pil":
        return Drawn(list(result.images), None, seconds, flagged)
    arrays = result.images.float().cpu().numpy() if isinstance(result.images, Tensor) else np.asarray(result.images)
    return Drawn([], arrays, seconds, flagged)


class UNetCall(NamedTuple):
    """A call of a UNet and the noise that it predicted. Arguments are the caller's own tensors."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor

    @property
    def sample(self) -> Tensor:
        """The UNet's input."""
        return self.args[0] if self.args else self.kwargs["sample"]

    @property
    def timestep(self) -> float:
        """Of the noise schedule."""
        return float(self.args[1] if len(self.args) > 1 else self.kwargs["timestep"])


@contextmanager
def record_calls(unet: nn.Module) -> Iterator[list[UNetCall]]:
    """Context in which every call of a UNet is appended to the list."""
    calls: list[UNetCall] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        calls.append(UNetCall(args, kwargs, out[0].clone()))

    with unet.register_forward_hook(record, with_kwargs=True):
        yield calls
