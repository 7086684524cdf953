#!/usr/bin/env python
"""Train the embedded model from nothing, in stages that each resume.

python scripts/training/train.py --output runs/demo                     one process; --device cuda where there is a GPU
OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 scripts/training/train.py --output runs/demo            two CPU processes

A run that was interrupted goes on where it was when the same command is given again: every stage has a checkpoint with
weights, their moving average, the optimizer and the number of updates, from which the data follow. `--steps` and
`--count` may be changed on the way; the rate stays until the last fifth of the updates.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import autoencoder
import diffusion
import text
from loop import Run

STAGES = (
    diffusion.Stage(16, 450, 32, 1.5e-3),
    diffusion.Stage(32, 16000, 16, 1e-3),
    diffusion.Stage(64, 6000, 8, 6e-4, closeups=0.0),
)
NAMES = ("text", "autoencoder", *(stage.name for stage in STAGES))
UPDATES = {"text": 500, "autoencoder": 1400}


def main() -> None:
    """Parse the arguments and run the stages asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for model, checkpoints and log.jsonl")
    parser.add_argument(
        "--stage", choices=NAMES, action="append", help="only this (repeatable); default: all, in order"
    )
    parser.add_argument("--steps", type=int, help="updates of the stage, instead of the recipe's")
    parser.add_argument("--count", type=int, help="pictures in an update of a diffusion stage, instead of the recipe's")
    parser.add_argument("--rate", type=float, help="learning rate of a diffusion stage, instead of the recipe's")
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("bf16", "no"), default="bf16", help="autocast precision")
    parser.add_argument("--save-seconds", type=float, default=300, help="time between checkpoints")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop a diffusion stage after this time")
    parser.add_argument(
        "--compile", action="store_true", help="compile the UNet: minutes at the start, 13 %% less a step"
    )
    args = parser.parse_args()
    run = Run(args.output, args.device, args.precision, args.save_seconds)
    run.stop_on_signals()
    chosen = args.stage or NAMES
    matrices = args.optimizer == "muon"
    if "text" in chosen:
        text.train(run, args.steps or UPDATES["text"])
    if "autoencoder" in chosen and not run.stopping:
        autoencoder.train(run, args.steps or UPDATES["autoencoder"], matrices=matrices)
    previous = None
    for stage in STAGES:
        if stage.name in chosen and not run.stopping:
            changed = replace(
                stage,
                steps=args.steps or stage.steps,
                count=args.count or stage.count,
                rate=args.rate or stage.rate,
                matrices=matrices,
            )
            diffusion.train(run, changed, previous, limit_seconds=60 * args.minutes, compiled=args.compile)
        previous = stage


if __name__ == "__main__":
    main()
