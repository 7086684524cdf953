"""What the web page does, without the page: checking what is asked for, drawing it twice, writing it down."""

import json
import queue
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL.Image import Image

from agentsd import AgentSDConfig, AgentSDWarning, Report, apply, checks, describe, disabled, pipelines
from agentsd.demo import unknown_words
from agentsd.drawing import draw
from agentsd.generate import metadata
from agentsd.generate.output import Output
from agentsd.images import psnr

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

KINDS = ("stock", "accelerated")


@dataclass(frozen=True)
class Limits:
    """The most that may be asked for: pixels a side, denoising steps, letters of a prompt."""

    side: int = 1024
    steps: int = 100
    letters: int = 1000


@dataclass(frozen=True)
class Request:
    """What the visitor asks for, in the order of the page's fields; None leaves width and height to the model."""

    prompt: str
    negative_prompt: str
    model: str
    preset: str
    ratio: float
    steps: int
    guidance_scale: float
    seed: int
    width: int | None = None
    height: int | None = None


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
        psnr: of the accelerated image to the stock one, in dB.
        parameters: the text that the accelerated image's file carries.
        unknown: words of the prompt that the embedded model does not know.
    """

    paths: tuple[Path, Path]
    seconds: tuple[float, float]
    psnr: float
    parameters: str
    report: Report
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
        dtype: of the models; None is float16 on CUDA and float32 elsewhere.
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

    def check(self, request: Request) -> AgentSDConfig:
        """The configuration that is asked for; ValueError, in one sentence, if something is that is not allowed."""
        if not request.prompt.strip():
            raise ValueError("the prompt is empty: it says what to draw")
        for name, text in (("prompt", request.prompt), ("negative prompt", request.negative_prompt)):
            if len(text) > self.limits.letters:
                raise ValueError(f"the {name} has {len(text)} letters; it may have {self.limits.letters}")
        checks.choice("model", request.model, self.models)
        checks.whole("steps", request.steps, 1, self.limits.steps)
        checks.whole("seed", request.seed, 0, 2**53)  # the whole numbers that a web page can count
        checks.number("guidance scale", request.guidance_scale, 0, 50)
        for name, side in (("width", request.width), ("height", request.height)):
            if side:
                checks.whole(name, side, 8, self.limits.side)
        config = AgentSDConfig.from_preset(request.preset)
        return config.replace(ratio=request.ratio) if config.has("ratio") else config

    def draw(self, request: Request, cancelled: threading.Event) -> Iterator[Progress | Result]:
        """Draw the prompt stock and accelerated; step by step, and at the end the result.

        Raises:
            Cancelled: `cancelled` was set.
            ValueError: in one sentence, if anything is asked for that is not allowed or cannot be done.
        """
        config = self.check(request)
        news: queue.SimpleQueue[Progress | Result | BaseException] = queue.SimpleQueue()

        def work() -> None:
            try:
                with self._lock:
                    news.put(self._draw(request, config, cancelled, news))
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
        self, request: Request, config: AgentSDConfig, cancelled: threading.Event, news: "queue.SimpleQueue[Any]"
    ) -> Result:
        if cancelled.is_set():
            raise Cancelled
        pipe = self._pipe(request.model)
        size = self._size(request, pipe)

        call: dict[str, Any] = {"guidance_scale": request.guidance_scale, "width": size[0], "height": size[1]}
        if request.negative_prompt:
            call["negative_prompt"] = [request.negative_prompt]

        def run(kind: str, steps: int) -> tuple[Image, float]:
            def step_ends(_: Any, step: int, *__: Any) -> dict[str, Any]:
                if cancelled.is_set():
                    raise Cancelled
                news.put(Progress(kind, step + 1, steps))
                return {}

            news.put(Progress(kind, 0, steps))
            with disabled(pipe) if kind == "stock" else nullcontext():
                call.update(num_inference_steps=steps, callback_on_step_end=step_ends)
                drawn = draw(pipe, request.prompt, request.seed, **call)
            return drawn.images[0], drawn.seconds

        key = (request.model, size, json.dumps(config.to_dict()))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", AgentSDWarning)
            apply(pipe, config)
            if key not in self._warm:  # the first call of a size is slow, whatever it is
                for kind in KINDS:
                    run(kind, 1)
                self._warm.add(key)
            (stock, before), (accelerated, after) = (run(kind, request.steps) for kind in KINDS)
        texts = [self._text(request, pipe, size, setting) for setting in (None, config)]
        paths = self.output.save([(stock, texts[0]), (accelerated, texts[1])])
        return Result(
            (paths[0], paths[1]),
            (before, after),
            psnr(accelerated, stock),
            texts[1],
            describe(pipe),
            tuple(str(warning.message) for warning in caught),
            tuple(unknown_words(request.prompt)) if request.model == "demo" else (),
        )

    def _pipe(self, name: str) -> "DiffusionPipeline":
        if self._loaded is None or self._loaded[0] != name:
            self._loaded = None  # there may not be room for both
            self._loaded = name, pipelines.load(self.models[name], dtype=self.dtype, device=self.device)
        return self._loaded[1]

    def _size(self, request: Request, pipe: "DiffusionPipeline") -> tuple[int, int]:
        """Width and height in pixels."""
        multiple, default = pipelines.size_multiple(pipe), pipelines.default_size(pipe)
        width, height = request.width or default[0], request.height or default[1]
        for name, side in (("width", width), ("height", height)):
            if side % multiple:
                raise ValueError(f"{name} is {side}; for this model it must be a multiple of {multiple}")
            if side > self.limits.side:
                raise ValueError(f"{name} is {side}; it must be at most {self.limits.side}")
        return width, height

    def _text(
        self, request: Request, pipe: "DiffusionPipeline", size: tuple[int, int], config: AgentSDConfig | None
    ) -> str:
        """What the file says about its image: what agentsd-generate writes, with the model by its last name."""
        run = {
            "model": request.model,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "threads": torch.get_num_threads() if self.device.type == "cpu" else 0,
        }
        fields = metadata.describe_run(pipe, run, steps=request.steps, guidance_scale=request.guidance_scale, size=size)
        return metadata.parameters(fields, request.prompt, request.negative_prompt, request.seed, config)
