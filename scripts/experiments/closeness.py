"""How close accelerated images of the embedded model lie to the stock images of the same seeds, in dB PSNR.

Usage: python scripts/check_closeness.py --prompts 12 --dtype bfloat16 --output benchmarks/results/cpu-closeness.json
       python scripts/check_closeness.py --steps 50 --method turbo turbo:reuse_interval=3 deepcache:cache_interval=3
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from tqdm.auto import tqdm

from agentsd import AgentSDConfig, apply, pipelines
from agentsd.benchmark import environment
from agentsd.cli.comparison import psnr
from agentsd.demo.accuracy import held_out_prompts
from agentsd.evaluation import methods


def drawer(pipe: Any, text: str) -> Callable[..., Any]:
    """A function that draws as the pipeline does, with a method or with the configuration in a file."""
    kind, _, path = text.partition(":")
    if kind == "config":
        accelerated: Callable[..., Any] = apply(methods.copied(pipe), AgentSDConfig.from_file(path))
        return accelerated
    return methods.prepared(pipe, methods.method(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=12, help="held-out prompts, one image each (default: 12)")
    parser.add_argument("--steps", type=int, nargs="+", default=[25], help="denoising steps; several: each in turn")
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--size", type=int, help="pixels a side (default: the model's)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--method",
        nargs="+",
        default=AgentSDConfig.presets(),
        help="as agentsd-eval takes them, or config:FILE (default: every preset)",
    )
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    args = parser.parse_args()

    pipe = pipelines.load("demo", device="cpu", dtype=getattr(torch, args.dtype))
    pipe.set_progress_bar_config(disable=True)
    drawers = {"stock": pipe} | {text: drawer(pipe, text) for text in args.method}
    prompts = held_out_prompts(args.prompts)

    def draw(text: str, index: int, steps: int) -> Image:
        seed = torch.Generator().manual_seed(index)
        call: dict[str, Any] = {
            "num_inference_steps": steps,
            "guidance_scale": args.guidance_scale,
            "generator": seed,
        }
        if args.size:
            call |= {"height": args.size, "width": args.size}
        # On one thread, the time that is computed: other processes on the machine do not count.
        now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        began = now()
        image: Image = drawers[text](prompts[index], **call).images[0]
        seconds[text, steps].append(now() - began)
        return image

    def name(text: str, steps: int) -> str:
        return f"{text}, {steps} steps" if len(args.steps) > 1 else text

    seconds: dict[tuple[str, int], list[float]] = {pair: [] for pair in product(drawers, args.steps)}
    decibels: dict[str, list[float]] = {name(text, steps): [] for text in args.method for steps in args.steps}
    for index, steps in tqdm(list(product(range(len(prompts)), args.steps)), unit="prompt"):
        stock = draw("stock", index, steps)
        for text in args.method:
            decibels[name(text, steps)].append(psnr(draw(text, index, steps), stock))
    median = {pair: statistics.median(values) for pair, values in seconds.items()}
    faster = {name(t, n): median["stock", n] / median[t, n] for t in args.method for n in args.steps}
    print("| method | faster than stock | PSNR to the stock image, mean / worst, dB |\n|---|---|---|")
    for text, values in decibels.items():
        print(f"| {text} | {faster[text]:.2f}× | {statistics.mean(values):.1f} / {min(values):.1f} |")
    if args.output:
        settings = {
            "prompts": args.prompts,
            "steps": args.steps if len(args.steps) > 1 else args.steps[0],
            "guidance_scale": args.guidance_scale,
        }
        if args.size:
            settings["size"] = args.size
        command = shlex.join(["python", "scripts/check_closeness.py", *sys.argv[1:]])
        result = {
            "command": command,
            "environment": environment("cpu"),
            **settings,
            "dtype": args.dtype,
            "psnr": decibels,
            "speedup": faster,
        }
        partial = args.output.with_name(args.output.name + ".part")
        partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        partial.replace(args.output)


if __name__ == "__main__":
    main()
