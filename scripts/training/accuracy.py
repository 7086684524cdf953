#!/usr/bin/env python
"""Measure how well the embedded model follows prompts with combinations held out of its training.

python scripts/training/accuracy.py --prompts 200 --method stock --method paper
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

import agentsd
from agentsd.demo.accuracy import checker_accuracy, draw, held_out_prompts, measure
from agentsd.demo.checker import AttributeChecker
from agentsd.pipelines import load
from agentsd.results import write_image, write_json


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
    prompts = held_out_prompts(args.prompts)
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
