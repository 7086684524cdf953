#!/usr/bin/env python
"""Plot the losses that scripts/training/demo.py logged.

python scripts/training/plot.py runs/demo/log.jsonl agentsd/demo/training.png
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from agentsd.results import save_figure


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
    rows = -(-len(stages) // 3)
    figure, axes = plt.subplots(rows, 3, figsize=(9.6, 2.8 * rows), dpi=110, layout="constrained", squeeze=False)
    for axis in axes.flat[len(stages) :]:
        axis.remove()
    for axis, (name, losses) in zip(axes.flat, stages.items(), strict=False):
        steps, values = np.array(sorted(losses)), np.array([losses[step] for step in sorted(losses)])
        window = max(1, len(values) // 12)
        mean = np.convolve(values, np.ones(window) / window, "valid")
        axis.plot(steps, values, color="0.8", linewidth=0.8)
        axis.plot(steps[window - 1 :], mean, color="C0")
        axis.set(title=name, xlabel="step", yscale="log")
        axis.grid(alpha=0.3, which="both")
    for axis in axes[:, 0]:
        axis.set_ylabel("loss")
    save_figure(figure, args.output)


if __name__ == "__main__":
    main()
