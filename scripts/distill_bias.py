#!/usr/bin/env python
"""Train the optional refinement of AgentSD, agent bias and convolution, on the stock model's own images.

python scripts/distill_bias.py --ratio 0.5 --output refine.safetensors

Prints the relative error of each layer's output against stock without and with the refinement, on images held out.
"""

import argparse
import random
from pathlib import Path

import torch

import agentsd
from agentsd.demo import scenes
from agentsd.pipelines import load, one_line
from agentsd.refine import collect, distill, error, save_refinements


def main() -> None:
    """Collect samples from the stock model, train, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the safetensors file to write")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--preset", default="paper", choices=agentsd.AgentSDConfig.presets())
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--prompts", type=Path, help="a prompt per line; default: scenes of the embedded model")
    parser.add_argument("--images", type=int, default=8, help="images to learn from (default: 8)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps of an image")
    parser.add_argument("--updates", type=int, default=300, help="optimiser steps for each layer")
    parser.add_argument("--rate", type=float, default=0.01, help="learning rate")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    try:
        if args.prompts:
            prompts = args.prompts.read_text(encoding="utf-8").splitlines()
        else:
            rng = random.Random("refine")
            prompts = [scenes.caption(scenes.sample(rng)) for _ in range(args.images + 2)]
        if len(prompts) < args.images + 2:
            raise ValueError(f"--prompts {args.prompts} has {len(prompts)} lines; --images and two to test are needed")
        pipe = load(args.model, dtype="float32", device=args.device)
        config = agentsd.AgentSDConfig.from_preset(args.preset).replace(ratio=args.ratio)
    except (ValueError, OSError) as reason:
        parser.error(one_line(reason))
    samples = collect(pipe, config, prompts[: args.images], num_inference_steps=args.steps)
    held_out = collect(pipe, config, prompts[args.images : args.images + 2], num_inference_steps=args.steps)
    refinements = distill(pipe.unet, samples, args.updates, args.rate)
    save_refinements(refinements, args.output)
    for name, refinement in refinements.items():
        attn = pipe.unet.get_submodule(name)
        tests = [sample for sample in held_out if sample.layer == name]
        with torch.no_grad():
            errors = [
                sum(error(attn, part, sample).item() ** 0.5 for sample in tests) / len(tests)
                for part in (None, refinement)
            ]
        print(f"{name}: {errors[0]:.4f} → {errors[1]:.4f}")


if __name__ == "__main__":
    main()
