#!/usr/bin/env python
"""Train the optional refinement of AgentSD, agent bias and convolution, on the stock model's own images.

python scripts/distill_bias.py --ratio 0.5 --output refine.safetensors
python scripts/distill_bias.py --ratio 0.4 0.5 0.6 0.7 --output refine-{ratio}.safetensors --report errors.json

Prints the relative error of each layer's output against stock without and with the refinement, on images held out.
"""

import argparse
import json
import random
import shlex
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import agentsd
from agentsd.benchmark import environment
from agentsd.demo import scenes
from agentsd.pipelines import load, one_line
from agentsd.refine import collect, distill, error, save_refinements

HELD_OUT = 2


def main() -> None:
    """Collect samples from the stock model, train, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="the safetensors file to write; {ratio} is the ratio")
    parser.add_argument("--report", type=Path, help="write the errors as JSON")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--preset", default="paper", choices=agentsd.AgentSDConfig.presets())
    parser.add_argument("--ratio", type=float, nargs="+", default=[0.5], help="a refinement for each (default: 0.5)")
    parser.add_argument("--prompts", type=Path, help="a prompt per line; default: scenes of the embedded model")
    parser.add_argument("--images", type=int, default=8, help="images to learn from (default: 8)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps of an image")
    parser.add_argument("--guidance-scale", type=float, help="default: 4 with the embedded model, else 7.5")
    parser.add_argument("--updates", type=int, default=300, help="optimiser steps for each layer")
    parser.add_argument("--rate", type=float, default=0.01, help="learning rate")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    if len(args.ratio) > 1 and "{ratio}" not in args.output:
        parser.error(f"--output {args.output} is one file; with several ratios its name must hold {{ratio}}")
    try:
        if args.prompts:
            prompts = args.prompts.read_text(encoding="utf-8").splitlines()
        else:
            rng = random.Random("refine")
            prompts = [scenes.caption(scenes.sample(rng)) for _ in range(args.images + HELD_OUT)]
        if len(prompts) < args.images + HELD_OUT:
            raise ValueError(
                f"--prompts {args.prompts} has {len(prompts)} lines; --images and {HELD_OUT} to test are needed"
            )
        configs = [agentsd.AgentSDConfig.from_preset(args.preset).replace(ratio=ratio) for ratio in args.ratio]
        pipe = load(args.model, dtype="float32", device=args.device)
    except (ValueError, OSError) as reason:
        parser.error(one_line(reason))

    guidance = args.guidance_scale or (4.0 if args.model == "demo" else 7.5)
    call = {"num_inference_steps": args.steps, "guidance_scale": guidance}
    samples = collect(pipe, configs[0], prompts[: args.images], **call)
    held_out = collect(pipe, configs[0], prompts[args.images : args.images + HELD_OUT], **call)
    layers: dict[str, Any] = {}
    for config in configs:

        def at(parts: list[Any], ratio: float = config.ratio) -> list[Any]:
            return [replace(part, plan=replace(part.plan, ratio=ratio)) for part in parts]

        started = time.process_time()
        refinements = distill(pipe.unet, at(samples), args.updates, args.rate)
        training = time.process_time() - started
        save_refinements(refinements, Path(args.output.format(ratio=config.ratio)))
        print(f"ratio {config.ratio:g}, trained in {training:.0f} s of CPU time")
        layers[str(config.ratio)] = {"cpu_seconds": training, "layers": {}}
        for name, refinement in refinements.items():
            attn = pipe.unet.get_submodule(name)
            tests = [sample for sample in at(held_out) if sample.layer == name]
            errors, seconds = [], []
            for part in (None, refinement):
                began = time.process_time()
                with torch.no_grad():
                    errors.append(statistics.mean(error(attn, part, sample).item() ** 0.5 for sample in tests))
                seconds.append((time.process_time() - began) / len(tests))
            layers[str(config.ratio)]["layers"][name] = {"errors": errors, "cpu_seconds": seconds}
            print(f"{name}: {errors[0]:.4f} → {errors[1]:.4f}", flush=True)
        if args.report:
            command = shlex.join(["python", "scripts/distill_bias.py", *sys.argv[1:]])
            result = {"command": command, "environment": environment(args.device), "ratios": layers}
            partial = args.report.with_name(f".{args.report.name}.part")
            partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            partial.replace(args.report)


if __name__ == "__main__":
    main()
