"""Drawing what was planned: load the model, draw each batch, write the images."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from agentsd import pipelines
from agentsd.api import apply, disabled
from agentsd.config import AgentSDConfig, AgentSDWarning
from agentsd.drawing import draw
from agentsd.generate import metadata
from agentsd.generate.request import Batch, Plan
from agentsd.images import comparison, difference, psnr

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

STOCK, ACCELERATED = KINDS = "stock", "accelerated"
Written = tuple[list[Path], str]  # the files of one image, the one to look at first, and a line on it


class Run:
    """A loaded model that draws a plan.

    Attributes:
        pipe: the pipeline, accelerated where the plan says so.
        summary: model, size, sampling and device in a line.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        settings = plan.settings
        path = plan.path or pipelines.download(settings.model, allow_pickle=settings.allow_pickle)
        self.pipe = _load(path, plan)
        self._call = _call(self.pipe, plan)
        self._fields = _fields(self.pipe, path, self._call, plan)
        f = self._fields
        self.summary = (
            f"{f['Model']}: {f['Size']}, {f['Steps']} steps, {f['Sampler']}, guidance {f['CFG scale']}, "
            f"{_name(plan.dtype)} on {plan.device}"
        )
        if plan.recorded.model_hash not in (None, f["Model hash"]):
            _warn(f"the model has changed since {settings.from_png} was made: the image will differ")
        now = metadata.versions()
        for name, version in plan.recorded.versions.items():
            if version != now.get(name):
                _warn(f"{settings.from_png} was made with {name} {version}: the image may differ a little")

    def images(self) -> Iterator[Written]:
        """Draw and write each image."""
        for batch, label in zip(self.plan.batches, _labels(self.plan.batches), strict=True):
            images, seconds = self._draw(batch, label)
            for index in batch.wanted:
                paths = self.plan.output.save([(images[index], self._text(batch, index, self.plan.config))])
                yield paths, f"seed {batch.seeds[index]}, {seconds:.2f} s"

    def comparisons(self) -> Iterator[Written]:
        """Draw each image stock and accelerated, by turns, and write both and a picture of both."""
        settings, batches = self.plan.settings, self.plan.batches
        few = math.ceil(4 / self._call.get("strength", 1))  # enough to meet every phase; a compilation may need all
        warm_up = settings.steps if settings.compile else min(few, settings.steps)
        for kind in KINDS:
            self._draw(batches[0], f"warm-up, {kind}", kind, num_inference_steps=warm_up)
        how = f"each timed once, by turns, after a warm-up of {warm_up} steps each"
        for number, (batch, label) in enumerate(zip(batches, _labels(batches), strict=True)):
            order = KINDS if number % 2 == 0 else KINDS[::-1]
            drawn = {kind: self._draw(batch, f"{label}, {kind}", kind) for kind in order}
            for index in batch.wanted:
                yield self._compared(batch, index, drawn, how)

    def _compared(
        self, batch: Batch, index: int, drawn: dict[str, tuple[list[Image.Image], float]], how: str
    ) -> Written:
        (stock, before), (accelerated, after) = ((drawn[kind][0][index], drawn[kind][1]) for kind in KINDS)
        decibels = psnr(accelerated, stock)
        closeness = "identical" if decibels == math.inf else f"PSNR {decibels:.1f} dB"
        speed = f"{before / after:.2f}x"
        delta, factor = difference(accelerated, stock)
        panels = [
            (stock, "Stock", f"{before:.2f} s"),
            (accelerated, "AgentSD", f"{after:.2f} s, {speed} the speed"),
            (delta, f"Difference, amplified {factor}x" if factor > 1 else "Difference", closeness),
        ]
        seed = f"seed {batch.seeds[index]}"
        picture = comparison(panels, batch.prompts[index], f"{self.summary}, {seed}; {self._configuration()}; {how}")
        texts = [self._text(batch, index, config) for config in (None, self.plan.config)]
        paths = self.plan.output.save([(picture, texts[1]), (stock, texts[0]), (accelerated, texts[1])])
        times = f"stock {before:.2f} s, accelerated {after:.2f} s ({speed}), {closeness}, {how}"
        return paths, f"{seed}, {times}; beside it {paths[1].name} and {paths[2].name}"

    def _draw(
        self, batch: Batch, label: str, kind: str = ACCELERATED, **changes: Any
    ) -> tuple[list[Image.Image], float]:
        """The images of a batch, and the seconds for each."""
        settings, size = self.plan.settings, len(batch.prompts)
        call: dict[str, Any] = self._call | changes
        call |= {name: [call[name]] * size for name in call.keys() & {"image", "mask_image"}}
        if settings.negative_prompt:
            call["negative_prompt"] = [settings.negative_prompt] * size
        with disabled(self.pipe) if kind == STOCK else nullcontext():
            drawn = draw(self.pipe, batch.prompts, batch.seeds, label=None if settings.quiet else label, **call)
        if drawn.flagged:
            _warn(f"the model's safety checker has blackened an image ({label})")
        images = drawn.images
        if "mask_image" in call:
            # The VAE has changed the rest too.
            images = [Image.composite(*three) for three in zip(images, call["image"], call["mask_image"], strict=True)]
        return images, drawn.seconds / size

    def _text(self, batch: Batch, index: int, config: AgentSDConfig | None) -> str:
        prompt, seed = batch.prompts[index], batch.seeds[index]
        negative_prompt, position = self.plan.settings.negative_prompt, (len(batch.prompts), index)
        return metadata.parameters(self._fields, prompt, negative_prompt, seed, config, position)

    def _configuration(self) -> str:
        settings = self.plan.settings
        source = settings.config or settings.preset or settings.from_png or "paper"
        return ", ".join([f"AgentSD {getattr(source, 'name', source)}", *settings.set])


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Context in which torch has as many threads; 0 changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _load(path: Path, plan: Plan) -> "DiffusionPipeline":
    settings = plan.settings
    pipe = pipelines.load(
        path, dtype=plan.dtype, device=plan.device, allow_pickle=settings.allow_pickle, config=settings.model_config
    )
    pipe = pipelines.for_task(pipe, image=plan.image is not None, mask=plan.mask is not None)
    if settings.scheduler:
        pipelines.set_scheduler(pipe, settings.scheduler)
    pipelines.load_loras(pipe, plan.loras)
    if settings.attention_backend:
        pipelines.set_attention_backend(pipe, settings.attention_backend)
    if plan.config is not None:
        apply(pipe, plan.config)
    if settings.compile:
        pipe.unet.compile_repeated_blocks(fullgraph=True)
    return pipe


def _call(pipe: "DiffusionPipeline", plan: Plan) -> dict[str, Any]:
    """The arguments that all calls of the pipeline have in common."""
    settings = plan.settings
    multiple = pipelines.size_multiple(pipe)
    settings.check_size(multiple)
    width, height = pipelines.default_size(pipe)
    if plan.image is not None:
        width, height = (max(multiple, side // multiple * multiple) for side in plan.image.size)
    size = settings.width or width, settings.height or height
    call: dict[str, Any] = {"num_inference_steps": settings.steps, "guidance_scale": settings.guidance_scale}
    if plan.image is None:
        return call | {"width": size[0], "height": size[1]}
    call |= {"image": plan.image.resize(size), "strength": settings.strength}
    if plan.mask is None:  # takes its size from the image
        return call
    mask = plan.mask.resize(size).point(lambda value: 255 if value >= 128 else 0)
    return call | {"mask_image": mask, "width": size[0], "height": size[1]}


def _fields(pipe: "DiffusionPipeline", path: Path, call: dict[str, Any], plan: Plan) -> dict[str, Any]:
    settings = plan.settings
    run = {
        "model": "demo" if settings.model == "demo" else _absolute(settings.model),
        "model_config": settings.model_config and _absolute(settings.model_config),
        "lora": [f"{_absolute(lora)}:{metadata.plain(weight)}" for lora, weight in plan.loras],
        "dtype": _name(plan.dtype),
        "device": str(plan.device),
        "scheduler": settings.scheduler,
        "attention_backend": settings.attention_backend,
        "compile": settings.compile,
        "threads": settings.threads or (torch.get_num_threads() if plan.device.type == "cpu" else 0),
        "init_image": settings.init_image and _absolute(settings.init_image),
        "mask": settings.mask and _absolute(settings.mask),
        "versions": metadata.versions(),
        "sha256": {
            option: [pipelines.sha256(file) for file in files] for option, files in settings.files().items() if files
        },
    }
    return metadata.describe_run(
        pipe,
        run,
        steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        size=call["image"].size if "image" in call else (call["width"], call["height"]),
        model_hash=pipelines.fingerprint(path),
        strength=settings.strength if settings.init_image else None,
    )


def _labels(batches: list[Batch]) -> list[str]:
    total = sum(len(batch.wanted) for batch in batches)
    labels, first = [], 1
    for batch in batches:
        last = first + len(batch.wanted) - 1
        labels.append(f"image {first}/{total}" if first == last else f"images {first}-{last}/{total}")
        first = last + 1
    return labels


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _absolute(name: str | Path) -> str:
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else str(name)


def _warn(text: str) -> None:
    warnings.warn(text, AgentSDWarning, stacklevel=3)
