#!/usr/bin/env python
"""Train the embedded model from nothing; the recipe is agentsd/demo/README.md.

python scripts/train_demo.py --output runs/demo                                        one process, CUDA where there
is one
OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2 scripts/train_demo.py --output runs/demo --device cpu
                                                                two CPU processes

A run that was interrupted goes on where it was when the same command is given again.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator

from agentsd.demo.training import Recipe, Trainer

STAGES = ("text", "vae", "diffusion", "checker")


def main() -> None:
    """Parse the arguments and run the stages asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for model, checkpoints, samples and log.jsonl"
    )
    parser.add_argument(
        "--stage", choices=STAGES, action="append", help="only this stage (repeatable); default: all, in order"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the number of steps of every stage")
    parser.add_argument("--precision", choices=("bf16", "no"), default="bf16", help="autocast precision")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: CUDA where there is one")
    parser.add_argument("--checkpoint-every", type=int, default=200, metavar="STEPS")
    parser.add_argument("--sample-every", type=int, default=400, metavar="STEPS", help="0: no sample pictures")
    args = parser.parse_args()

    recipe = Recipe()
    if args.scale != 1:
        recipe = replace(
            recipe,
            **{
                name: max(1, round(getattr(recipe, name) * args.scale))
                for name in ("vae_steps", "text_steps", "checker_steps")
            },
            stages=tuple(replace(stage, steps=max(1, round(stage.steps * args.scale))) for stage in recipe.stages),
        )
    accelerator = Accelerator(mixed_precision=args.precision, cpu=args.device == "cpu")
    trainer = Trainer(recipe, args.output, accelerator, args.checkpoint_every, args.sample_every)
    for stage in STAGES:
        if not args.stage or stage in args.stage:
            getattr(trainer, stage)()


if __name__ == "__main__":
    main()
