"""Which calls should be whole: rules for step reuse tried on the embedded model, outside the package.

Usage: python scripts/check_spacing.py --prompts 6 --steps 50 --output benchmarks/results/reuse-spacing.json

Every rule spends about the same number of whole calls per image, with the cut, the extrapolation and the attention of
preset turbo. *even* and *quadratic* know the schedule alone. *input* and *noise* are adaptive: a call is whole when the
UNet's input, or the noise that it predicted in the call before, has moved from the last whole call by more than a
threshold, which is set by runs of other prompts. *planned* takes the whole calls that make the sum of the features'
errors smallest on the stock runs of those prompts, each step weighted as named.
"""

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

import agentsd
from agentsd import AgentSDConfig, pipelines
from agentsd.benchmark import environment
from agentsd.cli.comparison import psnr
from agentsd.demo.accuracy import held_out_prompts
from agentsd.reuse import Reuse

# Decides, from the step and what has been seen in it and since the last whole call, whether the call is whole.
Rule = Callable[[int, float, float], bool]


def moved(now: Tensor, before: Tensor) -> float:
    """Relative distance."""
    return float((now - before).norm() / now.norm())


def record(pipe: Any, draw: Callable[[Any], Any]) -> tuple[Any, np.ndarray]:
    """A stock image, and the inner products of its features at the cut."""
    features: list[Tensor] = []
    hook = (
        pipe.unet.up_blocks[-1]
        .attentions[-2]
        .register_forward_hook(lambda _, __, out: features.append(out[0].float().flatten()))
    )
    image = draw(pipe)
    hook.remove()
    stack = torch.stack(features)
    return image, (stack @ stack.T).double().numpy()


def threshold(spent: Callable[[float], float], calls: int) -> float:
    """The threshold at which so many whole calls are spent on average."""
    low, high = 0.0, 1.0
    for _ in range(7):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > calls else (low, middle)
    return (low + high) / 2


def planned(grams: list[np.ndarray], weights: np.ndarray, share: float, calls: int) -> list[int]:
    """The whole calls, so many, with the least weighted error of the features in between (dynamic programming)."""
    steps = len(weights)
    error = np.zeros((steps, steps, steps))
    for G in grams:
        for a in range(steps):
            for b in range(a + 1, steps):
                t = np.arange(b + 1, steps)
                w = share * (t - b) / (b - a)
                p, q = 1 + w, -w
                square = p * p * G[b, b] + q * q * G[a, a] + 2 * p * q * G[a, b] + np.diag(G)[t]
                square -= 2 * p * G[b, t] + 2 * q * G[a, t]
                error[a, b, t] += np.sqrt(np.maximum(square, 0) / np.diag(G)[t]) / len(grams)
    # cost[a, b, c]: of all calls between b and c, where a and b are the last whole ones.
    running = np.cumsum(error * weights, axis=2)
    cost = np.concatenate([np.zeros((steps, steps, 1)), running], axis=2)
    for b in range(steps):
        cost[:, b] -= cost[:, b, b + 1 : b + 2]
    best = cost[:, :, steps].copy()
    choices = []
    for _ in range(calls - 2):
        total = cost[:, :, :steps] + best[None, :, :]
        total[:, np.tril(np.ones((steps, steps), bool))] = np.inf
        choices.append(total.argmin(2))
        best = np.minimum(total.min(2), np.inf)
    chosen = [0, 1]
    for choice in reversed(choices):
        chosen.append(int(choice[chosen[-2], chosen[-1]]))
    return chosen


class Ruled:
    """The embedded model with a rule for its whole calls."""

    def __init__(self, pipe: Any, config: AgentSDConfig, rule: Rule) -> None:
        self.pipe = pipe
        self.config = config
        self.rule = rule
        self.spent = 0

    def __call__(self, draw: Callable[[Any], Any]) -> Any:
        """An image; `spent` is then its number of whole calls."""
        own = Reuse.begin
        kept: dict[str, Any] = {}
        self.spent = 0

        def begin(reuse: Reuse, *args: Any) -> None:
            sample = args[4][0].float()
            if reuse.lanes:
                lane = reuse.lanes[0]
                noise = moved(kept["noise"], kept["noise then"]) if kept["noise"] is not kept["noise then"] else 0.0
                whole = self.rule(lane.step + 1, moved(sample, kept["input"]), noise)
                lane.whole = frozenset([lane.step + 1] if whole else [])
            own(reuse, *args)
            if not reuse.layers:
                self.spent += 1
                kept["input"] = sample
            kept["whole"] = not reuse.layers

        def seen(_: Any, __: Any, out: Any) -> None:
            kept["noise"] = out[-1].float()
            if kept["whole"]:
                kept["noise then"] = kept["noise"]

        agentsd.apply(self.pipe, self.config)
        hook = self.pipe.unet.conv_out.register_forward_hook(seen)
        Reuse.begin = begin  # type: ignore[assignment]
        try:
            return draw(self.pipe)
        finally:
            Reuse.begin = own  # type: ignore[method-assign]
            hook.remove()
            agentsd.remove(self.pipe)

    def spending(self, draw: Callable[[Any], Any]) -> int:
        """The number of whole calls of an image."""
        self(draw)
        return self.spent


def table(found: dict[str, dict[str, Any]], calls: list[int]) -> str:
    """The figures in Markdown."""
    lines = ["| rule |" + " whole calls | PSNR to stock, mean / worst, dB |" * len(calls)]
    lines.append("|---" * (1 + 2 * len(calls)) + "|")
    for name in dict.fromkeys(key.rpartition(", ")[0] for key in found):
        cells = []
        for number in calls:
            spent, decibels = found[f"{name}, {number}"]["spent"], found[f"{name}, {number}"]["psnr"]
            between = f" ({min(spent)}–{max(spent)})" if min(spent) < max(spent) else ""
            cells += [
                f"{statistics.mean(spent):.1f}{between}",
                f"{statistics.mean(decibels):.1f} / {min(decibels):.1f}",
            ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=6, help="held-out prompts, one image each (default: 6)")
    parser.add_argument("--others", type=int, default=3, help="prompts that thresholds and plans are made on")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--calls", type=int, nargs="+", default=[18, 21], help="whole calls of an image")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    args = parser.parse_args()

    pipe = pipelines.load("demo", device="cpu", dtype=getattr(torch, args.dtype))
    pipe.set_progress_bar_config(disable=True)
    prompts = held_out_prompts(args.prompts + args.others)

    def drawing(index: int) -> Callable[[Any], Any]:
        seed = torch.Generator().manual_seed(index)
        return lambda pipe: pipe(
            prompts[index], num_inference_steps=args.steps, guidance_scale=4.0, generator=seed
        ).images[0]

    turbo = AgentSDConfig.from_preset("turbo")
    # One phase, so that nothing but the rule decides.
    one = replace(turbo, phases=(replace(turbo.phases[0], until=1.0),))
    share = one.phases[0].extrapolate
    others = range(args.prompts, args.prompts + args.others)
    grams = [record(pipe, drawing(index))[1] for index in tqdm(others, desc="stock, other prompts")]
    stock = [record(pipe, drawing(index))[0] for index in tqdm(range(args.prompts), desc="stock")]
    sigma = ((1 - pipe.scheduler.alphas_cumprod) / pipe.scheduler.alphas_cumprod).sqrt()
    pipe.scheduler.set_timesteps(args.steps)
    levels = np.append(sigma[pipe.scheduler.timesteps].double().numpy(), 0.0)
    steps = -np.diff(levels)
    weightings = {
        "each step alike": np.ones(args.steps),
        "share of log σ": np.append(-np.diff(np.log(levels[:-1])), 0.0),
        "share of σ": steps,
    }

    def inputs(far: float) -> Rule:
        return lambda step, now, noise: now > far

    def noises(far: float) -> Rule:
        return lambda step, now, noise: noise > far

    def fixed(calls: list[int]) -> Rule:
        return lambda step, now, noise: step in calls

    found: dict[str, dict[str, Any]] = {}
    for calls in args.calls:
        # The first two calls are whole: there is nothing to extrapolate from.
        even = sorted({0, 1} | {round(1 + i * (args.steps - 1) / (calls - 1)) for i in range(calls - 1)})
        middle = [2 * i / (calls - 2) - 1 for i in range(calls - 2)]
        curved = {0, 1} | {2 + int((args.steps - 2) * (1 + m * abs(m)) / 2) for m in middle}
        spare = (step for step in range(args.steps // 2, args.steps) if step not in curved)
        quadratic = sorted(curved | {next(spare) for _ in range(calls - len(curved))})
        rules: dict[str, tuple[Rule, Any]] = {
            "even": (fixed(even), even),
            "quadratic": (fixed(quadratic), quadratic),
        }
        for name, limited in (("input", inputs), ("noise", noises)):

            def spent(far: float, limited: Callable[[float], Rule] = limited) -> float:
                ruled = Ruled(pipe, one, limited(far))
                return statistics.mean(ruled.spending(drawing(index)) for index in others)

            far = threshold(spent, calls)
            rules[name] = limited(far), far
        for name, weights in weightings.items():
            chosen = planned(grams, weights, share, calls)
            rules[f"planned, {name}"] = fixed(chosen), chosen
        for name, (rule, setting) in rules.items():
            numbers, decibels = [], []
            ruled = Ruled(pipe, one, rule)
            for index in tqdm(range(args.prompts), desc=f"{name}, {calls}"):
                decibels.append(psnr(ruled(drawing(index)), stock[index]))
                numbers.append(ruled.spent)
            found[f"{name}, {calls}"] = {"setting": setting, "spent": numbers, "psnr": decibels}
    print(table(found, args.calls))
    if args.output:
        result = {
            "command": shlex.join(["python", "scripts/check_spacing.py", *sys.argv[1:]]),
            "environment": environment("cpu"),
            "prompts": args.prompts,
            "others": args.others,
            "steps": args.steps,
            "dtype": args.dtype,
            "rules": found,
        }
        partial = args.output.with_name(args.output.name + ".part")
        partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        partial.replace(args.output)


if __name__ == "__main__":
    main()
