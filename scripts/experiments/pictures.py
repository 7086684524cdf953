#!/usr/bin/env python3
"""Draw the pictures of docs/options.md and docs/how-it-works.md with the embedded model.

    python scripts/experiments/pictures.py [NAME …]

Each row shows what one option does to one image: the images, and under them their difference from stock, enlarged by
the same factor for the whole row.
"""

import argparse
from collections.abc import Mapping
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import agentsd
from agentsd import KV, Agent, AgentSDConfig, Merge, Phase, StepCache
from agentsd.drawing import draw
from agentsd.images import psnr
from agentsd.pipelines import load

IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"
PROMPT = "a large red circle on the left and a small blue star on the right on a striped green background"
STEPS, SEED = 16, 3
SIDE, MARGIN, LINE = 176, 8, 18


def one(attention: Agent | Merge | KV | None, **fields: Any) -> AgentSDConfig:
    """A configuration of one phase."""
    return AgentSDConfig(phases=(Phase(attention=attention, **fields),))


def merged_in(start: float, end: float) -> AgentSDConfig:
    """A configuration that merges tokens in one part of the schedule."""
    phases = Phase(start, None), Phase(end, Merge(0.6)), Phase(1.0, None)
    return AgentSDConfig(phases=phases[start == 0 : 3 - (end == 1)])


ROWS: dict[str, Mapping[str, AgentSDConfig | str]] = {
    "presets": {name: name for name in ("faithful", "fast", "paper")},
    "attention": {
        "kv, stride 4": one(KV(4)),
        "merge, ratio 0.4": one(Merge(0.4)),
        "agent, ratio 0.4": one(Agent(0.4)),
    },
    "ratio": {f"merge, ratio {ratio}": one(Merge(ratio)) for ratio in (0.2, 0.4, 0.6, 0.75)},
    "stride": {f"kv, stride {stride}": one(KV(stride)) for stride in (2, 4, 8, 16)},
    "proportional": {
        f"merge, ratio 0.6, {words}": one(Merge(0.6, proportional=on))
        for on, words in ((False, "each alike"), (True, "by size"))
    },
    "phases": {
        "merge 0.6 until 0.4": merged_in(0.0, 0.4),
        "from 0.4 to 0.7": merged_in(0.4, 0.7),
        "from 0.7": merged_in(0.7, 1.0),
    },
    "levels": {
        f"kv, {words}": one(KV(4), levels=levels, min_tokens=64)
        for words, levels in (("finest grid", (0,)), ("two grids", (0, -1)), ("three grids", (0, -1, -2)))
    },
    "constants": {
        "as published": one(Agent()),
        "k_scale2 1": one(Agent(k_scale2=1.0)),
        "k_shortcut 0": one(Agent(k_shortcut=0.0)),
    },
    "parts": {
        "self-attention": one(Merge()),
        "and crossattn": one(Merge(parts=("attn", "crossattn"))),
        "and mlp": one(Merge(parts=("attn", "mlp"))),
    },
    "step-cache": {
        f"interval {interval}": AgentSDConfig(
            phases=(Phase(attention=KV(8)),), steps=(StepCache(interval=interval, extrapolate=0.7),)
        )
        for interval in (2, 3, 4)
    },
}


@cache
def pipeline() -> Any:
    """The embedded model."""
    return load("demo", dtype="float32")


@cache
def image(config: AgentSDConfig | str | None) -> Image.Image:
    """The image of one prompt and seed."""
    pipe = pipeline()
    with agentsd.applied(pipe, config) if config else nullcontext():
        return draw(pipe, PROMPT, SEED, num_inference_steps=STEPS, guidance_scale=4.0).images[0]


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
    images = {caption: image(config) for caption, config in ROWS[name].items()}
    deltas = {
        caption: np.abs(np.asarray(drawn, np.int16) - np.asarray(stock, np.int16)) for caption, drawn in images.items()
    }
    high = max(np.percentile(delta, 99.5) for delta in deltas.values())
    factor = 2 ** int(np.log2(255 / max(2.0, high)))
    legend = Image.new("RGB", (SIDE, SIDE), "white")
    words = f"difference\nfrom stock, times {factor}"
    ImageDraw.Draw(legend).text((8, SIDE // 2 - LINE), words, font=ImageFont.load_default(14), fill="#222222")
    tiles = [("stock", stock, legend)]
    for caption, drawn in images.items():
        delta = (deltas[caption] * factor).clip(0, 255).astype(np.uint8)
        tiles.append((caption, drawn, Image.fromarray(delta)))
        print(f"{name}: {caption}: {psnr(drawn, stock):.1f} dB, difference ×{factor}", flush=True)
    row(tiles).save(IMAGES / f"{name}.webp", quality=82, method=6)


def views() -> None:
    """Destinations, groups and agents of one layer, as `agentsd.visualize` shows them."""
    pipe = pipeline()
    with agentsd.applied(pipe, one(Agent())):
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
    stock = image(None)
    for name in names:
        if name == "views":
            views()
        else:
            compare(name, stock)


if __name__ == "__main__":
    main()
