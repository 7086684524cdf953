#!/usr/bin/env python
"""Train tiny vision transformers on scikit-learn's handwritten digits: softmax attention and agent attention.

pip install '.[vit]'
python scripts/training/vit_digits.py

Runs that are in the results are not repeated. Times are CPU seconds of one thread.
"""

import argparse
import math
import statistics
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from timm.models import VisionTransformer
from torch import Tensor, nn
from tqdm import tqdm

from agentsd.bench.layers import exponent
from agentsd.nn import convert_vit
from agentsd.results import environment, markdown_table, put_between, read_json, save_figure, version, write_json

ROOT = Path(__file__).resolve().parents[2]
PATCH = 2
TEST = 360
BATCH = 32
RATE = 3e-3
VARIANTS: dict[str, dict[str, Any] | None] = {
    "softmax": None,
    "agent": {"agent_bias": False, "dwc": False},
    "agent + bias": {"agent_bias": True, "dwc": False},
    "agent + DWC": {"agent_bias": False, "dwc": True},
    "agent + bias + DWC": {"agent_bias": True, "dwc": True},
}
MARK = "scripts/training/vit_digits.py"


def images(side: int) -> tuple[Tensor, Tensor]:
    """The 1,797 digits, enlarged from 8×8 to side×side, in a fixed random order; and what they show."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 8 - 1
    return F.interpolate(x, size=(side, side), mode="bilinear"), torch.tensor(digits.target)[order]


def build(variant: str, side: int, agent_num: int, seed: int) -> nn.Module:
    """The network; all variants of a seed start from the same weights."""
    torch.manual_seed(seed)
    model = VisionTransformer(
        img_size=side,
        patch_size=PATCH,
        in_chans=1,
        num_classes=10,
        embed_dim=32,
        depth=3,
        num_heads=2,
        mlp_ratio=2,
        qkv_bias=True,
    )
    parts = VARIANTS[variant]
    return model if parts is None else convert_vit(model, agent_num, zero_init=False, **parts)


def train(variant: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One run: the accuracy on the test images after every epoch."""
    x, y = images(args.side)
    model = build(variant, args.side, args.agents, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    steps = args.epochs * ((len(x) - TEST) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.2)
    generator = torch.Generator().manual_seed(seed)
    accuracy, losses, start = [], [], time.process_time()
    for epoch in tqdm(range(args.epochs), desc=f"{variant}, seed {seed}", unit="epoch"):
        model.train()
        order = TEST + torch.randperm(len(x) - TEST, generator=generator)
        total = 0.0
        batches = order.split(BATCH)[: steps // args.epochs]
        for batch in batches:
            loss = F.cross_entropy(model(x[batch]), y[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        losses.append(total / len(batches))
        if epoch % 2 or epoch == args.epochs - 1:
            model.eval()
            with torch.inference_mode():
                predicted = torch.cat([model(part).argmax(1) for part in x[:TEST].split(60)])
            accuracy.append((epoch + 1, (predicted == y[:TEST]).float().mean().item()))
    return {"accuracy": accuracy, "loss": losses, "cpu_seconds": time.process_time() - start}


def measure(variant: str, side: int, agent_num: int, repeats: int = 5) -> dict[str, float]:
    """CPU seconds of a training step with 4 images, and the bytes kept for its gradient."""
    model = build(variant, side, agent_num, 0)
    x, y = (part[:4] for part in images(side))
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = F.cross_entropy(model(x), y)
    held = sum(kept.values())
    loss.backward()
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        F.cross_entropy(model(x), y).backward()
        seconds.append(time.process_time() - start)
    return {"cpu_seconds": statistics.median(seconds), "bytes": held}


def table(result: dict[str, Any]) -> str:
    """The results in Markdown."""
    settings = result["settings"]
    sides = sorted(int(side) for side in result["steps"]["softmax"])
    tokens = [(side // PATCH) ** 2 for side in sides]
    rows = []
    for variant, runs in result["runs"].items():
        last = [100 * run["accuracy"][-1][1] for run in runs.values()]
        spread = f"{statistics.mean(last):.1f} ± {statistics.stdev(last):.1f}" if len(last) > 1 else f"{last[0]:.1f}"
        seconds = statistics.mean(run["cpu_seconds"] for run in runs.values())
        rows.append((variant, spread, ", ".join(f"{value:.1f}" for value in last), f"{seconds:.0f}"))
    lines = [
        f"{TEST} test images, {settings['epochs']} epochs over the other {1797 - TEST}, "
        f"{(settings['side'] // PATCH) ** 2} tokens, {settings['agents']} pooled agents; "
        "mean ± standard deviation over the seeds:",
        markdown_table(("attention", "accuracy, %", "each seed, %", "CPU seconds of a run"), rows),
        "A training step (forward and backward, 4 images) of the same networks on larger pictures:",
    ]
    for key, unit, scale in (("cpu_seconds", "ms of CPU time", 1000), ("bytes", "MiB kept for the gradient", 2**-20)):
        rows = []
        for variant, steps in result["steps"].items():
            values = [steps[str(side)][key] for side in sides]
            power = exponent(dict(zip(tokens, values, strict=True)), start=0)
            rows.append((variant, *(f"{value * scale:.0f}" for value in values), f"N^{power:.2f}"))
        lines.append(markdown_table((unit, *(f"{count:,} tokens" for count in tokens), "grows as"), rows))
    return "\n\n".join(lines) + "\n"


def plot(result: dict[str, Any], picture: Path) -> None:
    """Accuracy while training, and the time of a step over the number of tokens."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), dpi=110, layout="constrained")
    for variant, runs in result["runs"].items():
        epochs = [epoch for epoch, _ in next(iter(runs.values()))["accuracy"]]
        curves = torch.tensor([[100 * value for _, value in run["accuracy"]] for run in runs.values()])
        (line,) = left.plot(epochs, curves.mean(0), "k-" if variant == "softmax" else "-", label=variant)
        left.fill_between(epochs, curves.amin(0), curves.amax(0), alpha=0.15, color=line.get_color())
    left.set(xlabel="epoch", ylabel="accuracy on the test images, %", ylim=(50, 100), title="handwritten digits")
    for variant, steps in result["steps"].items():
        sides = sorted(int(side) for side in steps)
        times = [1000 * steps[str(side)]["cpu_seconds"] for side in sides]
        tokens = [(side // PATCH) ** 2 for side in sides]
        right.loglog(tokens, times, "k-" if variant == "softmax" else "-", marker="o", label=variant)
        right.set_xticks(tokens, [f"{count:,}" for count in tokens])
        right.minorticks_off()
    right.set(xlabel="tokens", ylabel="CPU ms of a training step", title="longer inputs")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend()
    save_figure(figure, picture)


def main() -> None:
    """Train what is missing, then write the plot and the tables into the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "vit-digits.json")
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "module.md", help="where the tables go")
    parser.add_argument("--variant", action="append", choices=tuple(VARIANTS), help="repeatable; default: all")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: 3)")
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--side", type=int, default=28, help="side of the pictures in pixels; a token is 2×2")
    parser.add_argument("--agents", type=int, default=16)
    parser.add_argument("--long", type=int, nargs="*", default=[28, 56, 112], help="sides whose step is measured")
    args = parser.parse_args()
    torch.set_num_threads(1)

    settings = {key: getattr(args, key) for key in ("epochs", "side", "agents")}
    versions = {package: version(package) for package in ("timm", "scikit-learn")}
    result: dict[str, Any] = {
        "settings": settings,
        "environment": environment("cpu") | versions,
        "runs": {},
        "steps": {},
    }
    if args.output.exists():
        result = read_json(args.output)
        if result["settings"] != settings:
            parser.error(f"--output {args.output} holds runs with {result['settings']}; choose another file")
    if math.isqrt(args.agents) ** 2 != args.agents:
        parser.error(f"--agents is {args.agents}; it must be a square number")
    for seed in range(args.seeds):
        for variant in args.variant or VARIANTS:
            runs = result["runs"].setdefault(variant, {})
            if str(seed) not in runs:
                runs[str(seed)] = train(variant, seed, args)
                write_json(args.output, result)
    for side in args.long:
        for variant in args.variant or VARIANTS:
            steps = result["steps"].setdefault(variant, {})
            if str(side) not in steps:
                steps[str(side)] = measure(variant, side, args.agents)
                write_json(args.output, result)
    plot(result, args.output.with_suffix(".png"))
    if args.document.exists():
        put_between(args.document, MARK, table(result))
    print(table(result))


if __name__ == "__main__":
    main()
