#!/usr/bin/env python
"""Measure how well the embedded model follows prompts with combinations held out of its training.

python scripts/training/accuracy.py --prompts 200 --method stock --method paper
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

import agentsd
from agentsd import drawing
from agentsd.demo import scenes
from agentsd.demo.checker import ATTRIBUTES, AttributeChecker, score
from agentsd.pipelines import load
from agentsd.results import write_image, write_json


def checker_accuracy(checker: AttributeChecker, count: int = 2000, seed: int = 1) -> dict[str, float]:
    """Share of each attribute that the checker reads rightly from rendered scenes it was not trained on."""
    rng = random.Random(f"checker/{seed}")
    drawn = [scenes.sample(rng, held_out=index % 2 == 1) for index in range(count)]
    rights: list[dict[str, list[bool]]] = []
    for start in range(0, count, 50):
        part = drawn[start : start + 50]
        images, _ = scenes.render(part, seed=rng.getrandbits(40))
        rights += [score(asked, seen) for asked, seen in zip(part, checker.read(images), strict=True)]
    return shares(rights)


def shares(rights: Sequence[dict[str, list[bool]]]) -> dict[str, float]:
    """Per attribute the share that is right, and of pictures in which everything is (`all`)."""
    pooled = {name: [right for row in rights for right in row[name]] for name in (*ATTRIBUTES, "all")}
    return {name: sum(values) / len(values) for name, values in pooled.items() if values}


def draw(
    pipe: Any, prompts: list[str], steps: int = 25, guidance: float = 4.0, batch: int = 4, folder: Path | None = None
) -> Tensor:
    """One picture per prompt, seeded by its index and rounded to 8 bits: B×3×H×W in [0, 1].

    With `folder`, each is a PNG file there, and those that are there already are not drawn again.
    """
    images: list[Image.Image] = []
    for start in tqdm(range(0, len(prompts), batch), desc="pictures", unit="batch"):
        numbers = range(start, min(start + batch, len(prompts)))
        files = [folder / f"{number:05d}.png" for number in numbers] if folder else []
        if files and all(file.exists() for file in files):
            images += [Image.open(file).convert("RGB") for file in files]
            continue
        part = [prompts[number] for number in numbers]
        made = drawing.draw(pipe, part, numbers, num_inference_steps=steps, guidance_scale=guidance).images
        images += made
        for file, image in zip(files, made, strict=False):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_image(file, image)
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]).float() / 255


def measure(images: Tensor, prompts: list[str], checker: AttributeChecker) -> dict[str, float]:
    """Share of each attribute asked for that the pictures show."""
    return shares([score(scenes.parse(p), seen) for p, seen in zip(prompts, checker.read(images), strict=True)])


def main() -> None:
    """Print one row of accuracies per method; with --output, write them and a sheet of pictures too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", action="append", help="stock or a preset (repeatable); default: stock")
    parser.add_argument("--prompts", type=int, default=200, help="number of held-out prompts (default: 200)")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--checker", type=Path, help="weights of another checker")
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for accuracy.json, the pictures and a sheet of them per method; pictures that exist are kept",
    )
    args = parser.parse_args()

    checker = AttributeChecker.load(args.checker)
    rows = {"checker on rendered scenes": checker_accuracy(checker)}
    pipe = load(args.model, dtype=args.dtype, device=args.device)
    prompts = scenes.held_out_prompts(args.prompts)
    stock = None
    for method in args.method or ["stock"]:
        agentsd.remove(pipe)
        if method != "stock":
            agentsd.apply(pipe, method)
        folder = args.output / method if args.output else None
        images = draw(pipe, prompts, args.steps, args.guidance_scale, args.batch_size, folder)
        rows[method] = measure(images, prompts, checker)
        if method == "stock":
            stock = images
        elif stock is not None:
            error = (images - stock).square().mean((1, 2, 3))
            rows[method]["psnr_to_stock_db"] = (-10 * error.clamp_min(1e-12).log10()).mean().item()
        if args.output:
            args.output.mkdir(parents=True, exist_ok=True)
            columns = min(8, len(images))
            tiles = images[: len(images) // columns * columns].clamp(0, 1).unflatten(0, (-1, columns))
            sheet = tiles.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
            write_image(args.output / f"{method}.png", Image.fromarray((sheet * 255).round().to(torch.uint8).numpy()))
    for name, row in rows.items():
        print(f"{name:28s}", "  ".join(f"{key} {value:.3f}" for key, value in row.items()))
    if args.output:
        settings = {key: str(value) for key, value in vars(args).items() if key != "output"}
        write_json(args.output / "accuracy.json", {"settings": settings, "accuracy": rows})


if __name__ == "__main__":
    main()
