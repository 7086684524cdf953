#!/usr/bin/env python
"""Plot the losses that scripts/train_demo.py logged.

python scripts/plot_training.py runs/demo/log.jsonl agentsd/demo/training.png
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np


def main() -> None:
    """One panel per stage: the logged values and their running mean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    stages: dict[str, dict[int, float]] = {}
    for line in args.log.read_text().splitlines():
        row = json.loads(line)
        stages.setdefault(row["stage"], {})[row["step"]] = row["loss"]
    figure, axes = plt.subplots(1, len(stages), figsize=(3.2 * len(stages), 2.8), constrained_layout=True)
    for axis, (name, losses) in zip(np.atleast_1d(axes), stages.items(), strict=True):
        steps, values = np.array(sorted(losses)), np.array([losses[step] for step in sorted(losses)])
        window = max(1, len(values) // 12)
        mean = np.convolve(values, np.ones(window) / window, "valid")
        axis.plot(steps, values, color="0.8", linewidth=0.8)
        axis.plot(steps[window - 1 :], mean, color="C0")
        axis.set(title=name, xlabel="step", yscale="log")
        axis.grid(alpha=0.3, which="both")
    np.atleast_1d(axes)[0].set_ylabel("loss")
    figure.savefig(args.output, dpi=110)


if __name__ == "__main__":
    main()
