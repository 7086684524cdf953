#!/usr/bin/env python3
"""Draw the pictures of docs/options.md and docs/how-it-works.md with the embedded model.

    python scripts/docs_pictures.py [NAME …]

Each row shows what one option does to one image: the images, and under them their difference from stock, enlarged by
the same factor for the whole row.
"""

import argparse
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import agentsd
from agentsd import AgentSDConfig, Phase
from agentsd.cli.comparison import psnr
from agentsd.pipelines import load

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
PROMPT = "a large red circle on the left and a small blue star on the right on a striped green background"
STEPS, SEED = 16, 3
SIDE, MARGIN, LINE = 176, 8, 18


def one(**fields: Any) -> AgentSDConfig:
    """A configuration of one phase."""
    ratio = fields.pop("ratio", 0.4)
    return AgentSDConfig(ratio=ratio, phases=(Phase(**fields),))


def merged_in(start: float, end: float) -> AgentSDConfig:
    """A configuration that merges tokens in one part of the schedule."""
    merging, stock = {"attention": "merge", "stride": 2, "ratio": 0.6}, {"attention": "stock"}
    ends = ((start, stock), (end, merging), (1.0, stock))
    phases = {until: Phase(until=until, **fields) for until, fields in reversed(ends) if until}  # type: ignore[arg-type]
    return AgentSDConfig(phases=tuple(phases[until] for until in sorted(phases)))


ROWS: dict[str, Mapping[str, AgentSDConfig | str]] = {
    "presets": {name: name for name in ("faithful", "fast", "paper")},
    "attention": {
        "kv, stride 4": one(attention="kv", stride=4),
        "merge, ratio 0.4": one(attention="merge", stride=2),
        "agent, ratio 0.4": one(),
    },
    "ratio": {
        f"merge, ratio {ratio}": one(attention="merge", stride=2, ratio=ratio) for ratio in (0.2, 0.4, 0.6, 0.75)
    },
    "stride": {f"kv, stride {stride}": one(attention="kv", stride=stride) for stride in (2, 4, 8, 16)},
    "proportional": {
        f"merge, ratio 0.6, {words}": one(attention="merge", stride=2, ratio=0.6, proportional=on)
        for on, words in ((False, "each alike"), (True, "by size"))
    },
    "phases": {
        "merge 0.6 until 0.4": merged_in(0.0, 0.4),
        "from 0.4 to 0.7": merged_in(0.4, 0.7),
        "from 0.7": merged_in(0.7, 1.0),
    },
    "levels": {
        f"kv, {words}": one(attention="kv", stride=4, levels=levels, min_tokens=64)
        for words, levels in (("finest grid", (0,)), ("two grids", (0, -1)), ("three grids", (0, -1, -2)))
    },
    "constants": {
        "as published": one(),
        "k_scale2 1": one(k_scale2=1.0),
        "k_shortcut 0": one(k_shortcut=0.0),
        "pooled agents": one(agents="pool"),
    },
    "parts": {
        "self-attention": one(attention="merge", stride=2),
        "and crossattn": one(attention="merge", stride=2, merge_crossattn=True),
        "and mlp": one(attention="merge", stride=2, merge_mlp=True),
    },
    "reuse": {
        f"interval {interval}": one(attention="kv", stride=8, reuse_interval=interval, reuse_layers=1, extrapolate=0.7)
        for interval in (2, 3, 4)
    },
}


@cache
def pipeline() -> Any:
    """The embedded model."""
    pipe = load("demo", dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def draw(config: AgentSDConfig | str | None) -> Image.Image:
    """The image of one prompt and seed."""
    pipe = pipeline()

    def call() -> Image.Image:
        generator = torch.Generator().manual_seed(SEED)
        image: Image.Image = pipe(PROMPT, num_inference_steps=STEPS, guidance_scale=4.0, generator=generator).images[0]
        return image

    if config is None:
        return call()
    with agentsd.applied(pipe, config):
        return call()


def row(tiles: list[tuple[str, Image.Image, Image.Image]]) -> Image.Image:
    """Images side by side, each with a caption over it and its difference under it."""
    font = ImageFont.load_default(12)
    picture = Image.new("RGB", (len(tiles) * (SIDE + MARGIN) - MARGIN, LINE + 2 * SIDE + MARGIN), "white")
    write = ImageDraw.Draw(picture)
    for column, (caption, image, delta) in enumerate(tiles):
        x = column * (SIDE + MARGIN)
        write.text((x, 1), caption, font=font, fill="#222222")
        picture.paste(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (x, LINE))
        picture.paste(delta.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (x, LINE + SIDE + MARGIN))
    return picture


def compare(name: str, stock: Image.Image) -> None:
    """Write the picture of one option, and say how far each image is from stock."""
    images = {caption: draw(config) for caption, config in ROWS[name].items()}
    deltas = {
        caption: np.abs(np.asarray(image, np.int16) - np.asarray(stock, np.int16)) for caption, image in images.items()
    }
    high = max(np.percentile(delta, 99.5) for delta in deltas.values())
    factor = 2 ** int(np.log2(255 / max(2.0, high)))
    legend = Image.new("RGB", (SIDE, SIDE), "white")
    words = f"difference\nfrom stock, times {factor}"
    ImageDraw.Draw(legend).text((8, SIDE // 2 - LINE), words, font=ImageFont.load_default(14), fill="#222222")
    tiles = [("stock", stock, legend)]
    for caption, image in images.items():
        delta = (deltas[caption] * factor).clip(0, 255).astype(np.uint8)
        tiles.append((caption, image, Image.fromarray(delta)))
        print(f"{name}: {caption}: {psnr(image, stock):.1f} dB, difference ×{factor}", flush=True)
    row(tiles).save(IMAGES / f"{name}.webp", quality=82, method=6)


def views() -> None:
    """Destinations, groups and agents of one layer, as `agentsd.visualize` shows them."""
    pipe = pipeline()
    with agentsd.applied(pipe, one(attention="agent")):
        view = agentsd.visualize(pipe, PROMPT, step=STEPS // 2, layer=0, seed=SEED, num_inference_steps=STEPS)
    side = 384
    for name in ("destinations", "groups", "agents"):
        picture = getattr(view, name)
        height = round(picture.height * side / picture.width)
        picture.resize((side, height), Image.Resampling.LANCZOS).save(IMAGES / f"{name}.webp", quality=82, method=6)


def main() -> None:
    """Draw all, or those named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join((*ROWS, 'views'))}; default: all")
    names = parser.parse_args().names or [*ROWS, "views"]
    if unknown := [name for name in names if name not in (*ROWS, "views")]:
        parser.error(f"NAME is {unknown[0]!r}; it must be one of {', '.join((*ROWS, 'views'))}")
    stock = draw(None)
    for name in names:
        if name == "views":
            views()
        else:
            compare(name, stock)


if __name__ == "__main__":
    main()
