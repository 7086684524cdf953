"""What the web page does, without the page: checking what is asked for, drawing it twice, writing it down."""

import json
import math
import queue
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentsd import AgentSDConfig, AgentSDWarning, __version__, apply, describe, disabled
from agentsd.cli.comparison import psnr
from agentsd.cli.images import Output
from agentsd.cli.parameters import format_parameters

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

    from agentsd import Report

KINDS = ("stock", "accelerated")


@dataclass(frozen=True)
class Limits:
    """The most that may be asked for: pixels a side, denoising steps, letters of a prompt."""

    side: int = 1024
    steps: int = 100
    letters: int = 1000


@dataclass(frozen=True)
class Wish:
    """What the visitor of the page asks for; None leaves width and height to the model."""

    prompt: str
    negative_prompt: str
    model: str
    preset: str
    ratio: float
    steps: float
    guidance_scale: float
    seed: float
    width: float | None = None
    height: float | None = None


@dataclass(frozen=True)
class Progress:
    """How far a run is: `step` of `steps` of the image of a kind; step 0 comes before the first."""

    kind: str
    step: int
    steps: int


@dataclass(frozen=True)
class Result:
    """The two images, stock and accelerated, and what was measured.

    Attributes:
        paths: of the images.
        seconds: for each.
        psnr: of the accelerated image to the stock one, in dB.
        parameters: the text that the accelerated image's file carries.
        report: what is done in which layer.
        warnings: of agentsd, a sentence each.
        unknown: words of the prompt that the embedded model does not know.
    """

    paths: tuple[Path, Path]
    seconds: tuple[float, float]
    psnr: float
    parameters: str
    report: "Report"
    warnings: tuple[str, ...]
    unknown: tuple[str, ...]


class Cancelled(Exception):  # noqa: N818
    """The visitor does not want the images any more."""


class Studio:
    """Models, one of them loaded at a time, and a folder for what they draw.

    Args:
        models: what `agentsd.pipelines.load` takes. Nothing else can be loaded; visitors know them by their last name.
        output: the folder where images go.
        limits: what may be asked for.
        dtype: of the models; None is the device's own.
        device: where they run; None is the best there is.

    Raises:
        ValueError: a model does not exist, or two have the same last name.
        OSError: the folder cannot be written to.
    """

    def __init__(
        self,
        models: Sequence[str],
        output: Path,
        limits: Limits | None = None,
        dtype: str | None = None,
        device: str | None = None,
    ) -> None:
        from agentsd import pipelines

        self.models: dict[str, str] = {}
        for model in models:
            path = pipelines.find(model)
            name = model if model == "demo" or path is None else path.name
            if name in self.models:
                raise ValueError(f"--model {model!r}: there is already a model of the name {name!r}")
            self.models[name] = model
        self.output = Output(output, 2, [f"-{kind}" for kind in KINDS])
        self.output.check()
        self.limits = limits or Limits()
        self.device = pipelines.find_device(device)
        self.dtype = pipelines.find_dtype(dtype, self.device)
        self._lock = threading.Lock()
        self._loaded: tuple[str, DiffusionPipeline] | None = None
        self._warm: set[tuple[Any, ...]] = set()

    def check(self, wish: Wish) -> AgentSDConfig:
        """The configuration that is asked for.

        Raises:
            ValueError: in one sentence, if anything is asked for that is not allowed.
        """
        if not wish.prompt.strip():
            raise ValueError("the prompt is empty: it says what to draw")
        for name, text in (("prompt", wish.prompt), ("negative prompt", wish.negative_prompt)):
            if len(text) > self.limits.letters:
                raise ValueError(f"the {name} has {len(text)} letters; it may have {self.limits.letters}")
        if wish.model not in self.models:
            raise ValueError(f"model is {wish.model!r}; it must be one of {', '.join(self.models)}")
        _whole("steps", wish.steps, 1, self.limits.steps)
        _whole("seed", wish.seed, 0, 2**53)  # the whole numbers that a web page can count
        if not 0 <= wish.guidance_scale <= 50:
            raise ValueError(f"guidance scale is {wish.guidance_scale:g}; it must be from 0 to 50")
        for name, side in (("width", wish.width), ("height", wish.height)):
            if side is not None:
                _whole(name, side, 8, self.limits.side)
        config = AgentSDConfig.from_preset(wish.preset)
        return config.replace(ratio=wish.ratio) if config.uses_ratio else config

    def draw(self, wish: Wish, cancelled: threading.Event) -> Iterator[Progress | Result]:
        """Draw the prompt stock and accelerated; step by step, and at the end the result.

        Raises:
            Cancelled: `cancelled` was set.
            ValueError: in one sentence, if anything is asked for that is not allowed or cannot be done.
        """
        config = self.check(wish)
        news: queue.SimpleQueue[Progress | Result | BaseException] = queue.SimpleQueue()

        def work() -> None:
            try:
                with self._lock:
                    news.put(self._draw(wish, config, cancelled, news))
            except BaseException as error:
                news.put(error)

        threading.Thread(target=work, daemon=True).start()
        try:
            while True:
                new = news.get()
                if isinstance(new, BaseException):
                    raise new
                yield new
                if isinstance(new, Result):
                    return
        finally:  # also when nobody listens any more
            cancelled.set()

    def _draw(
        self, wish: Wish, config: AgentSDConfig, cancelled: threading.Event, news: "queue.SimpleQueue[Any]"
    ) -> Result:
        from agentsd import pipelines
        from agentsd.demo import unknown_words

        if cancelled.is_set():
            raise Cancelled
        pipe = self._pipe(wish.model)
        multiple, default = pipelines.size_multiple(pipe), pipelines.default_size(pipe)
        width, height = int(wish.width or default[0]), int(wish.height or default[1])
        for name, side in (("width", width), ("height", height)):
            if side % multiple:
                raise ValueError(f"{name} is {side}; for this model it must be a multiple of {multiple}")
            if side > self.limits.side:
                raise ValueError(f"{name} is {side}; it must be at most {self.limits.side}")

        def run(kind: str, steps: int) -> "tuple[Image, float]":
            import torch

            def step_ends(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                if cancelled.is_set():
                    raise Cancelled
                news.put(Progress(kind, step + 1, steps))
                return {}

            news.put(Progress(kind, 0, steps))
            started = time.perf_counter()
            image = pipe(
                wish.prompt,
                negative_prompt=wish.negative_prompt or None,
                num_inference_steps=steps,
                guidance_scale=wish.guidance_scale,
                width=width,
                height=height,
                generator=torch.Generator("cpu").manual_seed(int(wish.seed)),
                callback_on_step_end=step_ends,
            ).images[0]
            return image, time.perf_counter() - started

        def both(steps: int) -> "list[tuple[Image, float]]":
            with disabled(pipe):
                stock = run("stock", steps)
            return [stock, run("accelerated", steps)]

        key = (wish.model, width, height, json.dumps(config.to_dict()))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", AgentSDWarning)
            apply(pipe, config)
            if key not in self._warm:  # the first call of a size is slow, whatever it is
                both(1)
                self._warm.add(key)
            (stock, before), (accelerated, after) = both(int(wish.steps))
        texts = [self._text(wish, pipe, (width, height), setting) for setting in (None, config)]
        paths = self.output.save([(stock, texts[0]), (accelerated, texts[1])])
        return Result(
            (paths[0], paths[1]),
            (before, after),
            psnr(accelerated, stock),
            texts[1],
            describe(pipe),
            tuple(str(warning.message) for warning in caught),
            tuple(unknown_words(wish.prompt)) if wish.model == "demo" else (),
        )

    def _pipe(self, name: str) -> "DiffusionPipeline":
        from agentsd import pipelines

        if self._loaded is None or self._loaded[0] != name:
            self._loaded = None  # there may not be room for both
            pipe = pipelines.load(self.models[name], dtype=self.dtype, device=self.device)
            pipe.set_progress_bar_config(disable=True)
            self._loaded = name, pipe
        return self._loaded[1]

    def _text(self, wish: Wish, pipe: "DiffusionPipeline", size: tuple[int, int], config: AgentSDConfig | None) -> str:
        """What the file says about its image: what agentsd-generate writes, with the model by its last name."""
        import torch

        from agentsd import pipelines

        run = {
            "model": wish.model,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "threads": torch.get_num_threads() if self.device.type == "cpu" else 0,
        }
        fields: dict[str, object] = {
            "Steps": int(wish.steps),
            "Sampler": pipelines.sampler_name(pipe),
            "CFG scale": f"{wish.guidance_scale:g}",
            "Seed": int(wish.seed),
            "Size": f"{size[0]}x{size[1]}",
            "Model": Path(wish.model).stem,
            "AgentSD": "off" if config is None else json.dumps(config.to_dict()),
            "AgentSD run": json.dumps(run),
            "Version": f"AgentSD {__version__}",
        }
        return format_parameters(wish.prompt, wish.negative_prompt, fields)


def _whole(name: str, value: float, low: int, high: int) -> None:
    if (
        not isinstance(value, int | float)
        or not math.isfinite(value)
        or value != int(value)
        or not low <= value <= high
    ):
        raise ValueError(f"{name} is {value}; it must be a whole number from {low} to {high}")
