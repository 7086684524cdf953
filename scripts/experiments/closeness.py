#!/usr/bin/env python
"""How close accelerated images of the embedded model are to the stock images of the same seeds, in dB PSNR.

python scripts/experiments/closeness.py --prompts 12 --dtype bfloat16 --output benchmarks/results/cpu-closeness.json
python scripts/experiments/closeness.py --steps 50 --method turbo turbo:steps/interval=3 deepcache:cache_interval=3
"""

import argparse
import shlex
import statistics
import sys
from itertools import product
from pathlib import Path

import torch
from PIL.Image import Image
from tqdm.auto import tqdm

from agentsd import AgentSDConfig, pipelines
from agentsd.demo.scenes import held_out_prompts
from agentsd.drawing import draw
from agentsd.images import psnr
from agentsd.methods import method, prepared
from agentsd.results import environment, markdown_table, write_json
from agentsd.tune.measure import clock


def main() -> None:
    """Print one row per method; with --output, write the figures too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=12, help="held-out prompts, one image each (default: 12)")
    parser.add_argument("--steps", type=int, nargs="+", default=[25], help="denoising steps; several: each in turn")
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--size", type=int, help="pixels a side (default: the model's)")
    parser.add_argument("--dtype", default="float32")
    presets = AgentSDConfig.presets()
    parser.add_argument("--method", nargs="+", default=presets, help="as agentsd-eval (default: every preset)")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    args = parser.parse_args()

    pipe = pipelines.load("demo", device="cpu", dtype=getattr(torch, args.dtype))
    pipe.set_progress_bar_config(disable=True)  # of the methods' own copies too
    drawers = {text: prepared(pipe, method(text)) for text in ("stock", *args.method)}
    prompts = held_out_prompts(args.prompts)
    call = {"guidance_scale": args.guidance_scale, "height": args.size, "width": args.size}
    now = clock(pipe.unet.device)

    def timed(text: str, index: int, steps: int) -> Image:
        began = now()
        image = draw(drawers[text], prompts[index], index, num_inference_steps=steps, **call).images[0]
        seconds[text, steps].append(now() - began)
        return image

    def name(text: str, steps: int) -> str:
        return f"{text}, {steps} steps" if len(args.steps) > 1 else text

    seconds: dict[tuple[str, int], list[float]] = {pair: [] for pair in product(drawers, args.steps)}
    decibels: dict[str, list[float]] = {name(text, steps): [] for text in args.method for steps in args.steps}
    for index, steps in tqdm(list(product(range(len(prompts)), args.steps)), unit="prompt"):
        stock = timed("stock", index, steps)
        for text in args.method:
            decibels[name(text, steps)].append(psnr(timed(text, index, steps), stock))
    median = {pair: statistics.median(values) for pair, values in seconds.items()}
    faster = {name(t, n): median["stock", n] / median[t, n] for t in args.method for n in args.steps}
    rows = [
        (text, f"{faster[text]:.2f}×", f"{statistics.mean(values):.1f} / {min(values):.1f}")
        for text, values in decibels.items()
    ]
    print(markdown_table(("method", "faster than stock", "PSNR to the stock image, mean / worst, dB"), rows))
    if args.output:
        result = {
            "command": shlex.join(["python", "scripts/experiments/closeness.py", *sys.argv[1:]]),
            "environment": environment("cpu"),
            "prompts": args.prompts,
            "steps": args.steps if len(args.steps) > 1 else args.steps[0],
            "guidance_scale": args.guidance_scale,
            **({"size": args.size} if args.size else {}),
            "dtype": args.dtype,
            "psnr": decibels,
            "speedup": faster,
        }
        write_json(args.output, result)


if __name__ == "__main__":
    main()
