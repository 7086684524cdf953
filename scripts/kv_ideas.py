"""What would bring `kv`, and merging with log s, nearer to the stock attention: ideas outside the core.

The embedded model draws held-out prompts in float32. At five noise levels each idea makes the attention's output
before `to_out` from the stock run's inputs: ‖O − O_stock‖ / ‖O_stock‖. Then kv with stride 4 draws
whole images with each idea.

Usage: python scripts/kv_ideas.py --output benchmarks/results/eval-kv-ideas.json
"""

import argparse
import shlex
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from agentsd import pipelines
from agentsd.benchmark import environment
from agentsd.demo.accuracy import held_out_prompts
from agentsd.evaluation.errors import relative_error
from agentsd.evaluation.files import write_json
from agentsd.evaluation.metrics import pair_distances
from agentsd.evaluation.report import table
from agentsd.evaluation.scoring import Column
from agentsd.merging import Match, TokenMap, destinations, step_key
from agentsd.patch import Layer, find_layers

AT = (0.2, 0.4, 0.6, 0.8, 0.9)
# label: level, stride, share of the tokens merged away (None: kv, whose queries all stay)
Setting = tuple[int, int, float | None]
SETTINGS: dict[str, Setting] = {
    "kv, stride 4": (1, 4, None),
    "kv, stride 8": (1, 8, None),
    "kv, stride 2, level 2": (2, 2, None),
    "merge 0.4 with log s": (1, 2, 0.4),
}
IDEAS: dict[str, dict[str, Any]] = {
    "as it is: random destination in each cell": {},
    "without log s": {"order": "none"},
    "second order, a bias for each group (mean q²)": {"order": "mean"},
    "second order, trace of the keys' covariance": {"order": "trace"},
    "second order, its diagonal (head size doubles)": {"order": "diagonal"},
    "second order, whole covariance (d× the cost)": {"order": "full"},
    "destination: top-left corner": {"dst": "corner"},
    "destination: anywhere, without cells": {"dst": "anywhere"},
    "destination: nearest to the cell's mean": {"dst": "medoid"},
    "k-means, 1 step": {"steps": 1},
    "k-means, 2 steps": {"steps": 2},
    "k-means, 5 steps": {"steps": 5},
    "k-means, 1 step, and a bias for each group": {"steps": 1, "order": "mean"},
    "matched by the keys": {"metric": ("k",)},
    "matched by the keys and values": {"metric": ("k", "v")},
    "matched by the keys and values, k-means, 1 step": {"metric": ("k", "v"), "steps": 1},
    "map of 1 step before": {"before": 1},
    "map of 2 steps before": {"before": 2},
    "map of 4 steps before": {"before": 4},
    "map of the side's first layer": {"layer": "side"},
    "map of the level's first layer (across the U)": {"layer": "level"},
}


def heads(attn: Any, tokens: Tensor) -> Tensor:
    """B×N×C → B×H×N×d."""
    return tokens.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def nearest(x: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine similarity of every token to its most similar anchor, and which."""
    found = (F.normalize(x, dim=-1) @ F.normalize(anchors, dim=-1).mT).max(-1)
    return found.values, found.indices


def matched(x: Tensor, stride: int, key: int, dst: str = "random", steps: int = 0) -> Match:
    """A match of B×N×C tokens on a square grid, with other destinations or after steps of k-means."""
    side = round(x.shape[1] ** 0.5)
    places = destinations((side, side), (stride, stride), None if dst == "corner" else key, "cpu").expand(len(x), -1)
    if dst == "anywhere":
        anywhere = torch.randperm(side * side, generator=torch.Generator().manual_seed(key))
        places = anywhere[: places.shape[1]].expand(len(x), -1)
    if dst == "medoid":
        cells = torch.arange(side * side).view(side // stride, stride, side // stride, stride).transpose(1, 2)
        cells = cells.reshape(-1, stride**2)
        means = F.normalize(x, dim=-1)[:, cells].mean(2, keepdim=True)
        best = F.cosine_similarity(x[:, cells], means, dim=-1).argmax(-1)
        places = cells.expand(len(x), -1, -1).gather(2, best[..., None])[..., 0]
    anchors = x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))
    score, best = nearest(x, anchors)
    for _ in range(steps):
        anchors = TokenMap(best, anchors.shape[1]).merge(F.normalize(x, dim=-1))
        score, best = nearest(x, anchors)
        places = nearest(anchors, x)[1]
    own = torch.arange(anchors.shape[1]).expand(len(x), -1)
    return Match(best.scatter(1, places, own), score.scatter(1, places, float("-inf")), anchors.shape[1])


def second_order(q: Tensor, k: Tensor, groups: TokenMap, order: str) -> Tensor:
    """½ s² qᵀ Σ q, the second cumulant of a group's keys, of one image: H×M×n, or H×1×n."""

    def means(tokens: Tensor) -> Tensor:
        return groups.merge(tokens.transpose(0, 1).flatten(1)[None])[0].unflatten(1, (len(k), -1)).transpose(0, 1)

    def outer(tokens: Tensor) -> Tensor:
        return (tokens[..., :, None] * tokens[..., None, :]).flatten(2)

    half = 0.5 / k.shape[-1]
    if order == "full":
        return half * outer(q) @ (means(outer(k)) - outer(means(k))).mT
    variance, squares = (means(k * k) - means(k) ** 2).clamp_min(0), q * q
    if order == "mean":
        squares = squares.mean(1, keepdim=True)
    if order == "trace":
        squares, variance = squares.mean(-1, keepdim=True), variance.sum(-1, keepdim=True)
    return half * squares @ variance.mT


def attend(attn: Any, y: Tensor, groups: TokenMap, merges: bool, order: str) -> Tensor:
    """Attention of one image's tokens (merged, or all) to groups: 1×N×C, before `to_out`."""
    few = groups.merge(y)
    q, k, v = (heads(attn, f(t))[0] for f, t in ((attn.to_q, few if merges else y), (attn.to_k, few), (attn.to_v, few)))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if order != "none":
        scores += groups.sizes.log()
    if order in ("mean", "trace", "diagonal", "full"):
        scores += second_order(q, heads(attn, attn.to_k(y))[0], groups, order)
    out = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)[None]
    return groups.unmerge(out) if merges else out


Seen = dict[str, list[Tensor]]


def output(idea: dict[str, Any], setting: Setting, layer: Layer, layers: list[Layer], seen: Seen, y: Tensor) -> Tensor:
    """An idea's attention of a layer; `seen` has the inputs of each layer's block, step by step."""
    same = [other for other in layers if other.level == layer.level]
    side = [other for other in same if other.name.split("_")[0] == layer.name.split("_")[0]]
    source = {"side": side[0], "level": same[0]}.get(idea.get("layer", ""), layer)
    step, attn, (_, stride, ratio) = len(seen[layer.name]) - 1, layer.block.attn1, setting
    x = seen[source.name][max(0, step - idea.get("before", 0))]
    if "metric" in idea:
        x = torch.cat([F.normalize({"k": attn.to_k, "v": attn.to_v}[name](y), dim=-1) for name in idea["metric"]], -1)
    match = matched(x, stride, step_key(0, step), idea.get("dst", "random"), idea.get("steps", 0))
    groups = match.fold(x.shape[1] if ratio is None else int(x.shape[1] * ratio))
    parts = [TokenMap(index[None], groups.groups) for index in groups.index]
    order = idea.get("order", "log s")
    return torch.cat([attend(attn, y[i : i + 1], part, ratio is not None, order) for i, part in enumerate(parts)])


class Processor:
    """The stock attention, shown to `look`, which may return another output."""

    def __init__(self, layer: Layer, seen: Seen, look: Callable[[Layer, Tensor, Tensor], Tensor | None]) -> None:
        self.layer, self.look = layer, look
        layer.block.norm1.register_forward_pre_hook(lambda _, args: seen.setdefault(layer.name, []).append(args[0]))

    def __call__(self, attn: Any, y: Tensor, *_: Any, **__: Any) -> Tensor:
        q, k, v = (heads(attn, part(y)) for part in (attn.to_q, attn.to_k, attn.to_v))
        true = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        other = self.look(self.layer, y, true)
        result: Tensor = attn.to_out[0](true if other is None else other)
        return result


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=2, help="held-out prompts (default: 2)")
    parser.add_argument("--steps", type=int, default=20, help="from 10 (default: 20)")
    parser.add_argument("--image-steps", type=int, default=10, help="of the whole images (default: 10)")
    parser.add_argument("--output", type=Path, required=True, help="write the errors as JSON")
    args = parser.parse_args()
    pipe = pipelines.load("demo", device="cpu", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    layers = [layer for layer in find_layers(pipe.unet) if layer.level <= 2]
    seen: Seen = {}
    errors: dict[tuple[str, str], dict[int, list[float]]] = {(idea, label): {} for idea in IDEAS for label in SETTINGS}

    def draw(steps: int, look: Callable[[Layer, Tensor, Tensor], Tensor | None]) -> Tensor:
        seen.clear()
        for layer in layers:
            layer.block.norm1._forward_pre_hooks.clear()
            layer.block.attn1.set_processor(Processor(layer, seen, look))
        generators = [torch.Generator().manual_seed(index) for index in range(args.prompts)]
        options = {"num_inference_steps": steps, "guidance_scale": 4.0, "generator": generators, "output_type": "pt"}
        images: Tensor = pipe(held_out_prompts(args.prompts), **options).images
        return (images * 255).round().to(torch.uint8)

    chosen = [round(at * args.steps) for at in AT]
    total = sum(setting[0] == layer.level for setting in SETTINGS.values() for layer in layers) * len(IDEAS)
    with tqdm(total=total * len(chosen), unit="output") as bar:

        def compare(layer: Layer, y: Tensor, true: Tensor) -> None:
            if (step := len(seen[layer.name]) - 1) not in chosen:
                return
            for (name, label), found in errors.items():
                if SETTINGS[label][0] == layer.level:
                    made = output(IDEAS[name], SETTINGS[label], layer, layers, seen, y)
                    found.setdefault(step, []).append(relative_error(made, true))
                    bar.update()

        draw(args.steps, compare)

    def acting(idea: dict[str, Any], setting: Setting) -> Callable[[Layer, Tensor, Tensor], Tensor | None]:
        return lambda layer, y, _: output(idea, setting, layer, layers, seen, y) if layer.level == setting[0] else None

    stock = draw(args.image_steps, lambda *_: None)
    label, about = next(iter(SETTINGS)), "relative error of the attention, mean over layers, images and noise levels"
    rows = []
    for name, idea in tqdm(IDEAS.items(), unit="idea"):
        images = draw(args.image_steps, acting(idea, SETTINGS[label]))
        scores: dict[str, Any] = {"psnr": {"value": pair_distances("psnr", images, stock).mean().item()}}
        for key in SETTINGS:
            means = [100 * statistics.mean(values) for values in errors[name, key].values()]
            scores[key] = {"value": statistics.mean(means), "by_noise_level": means}
        rows.append({"method": name, "scores": scores})
    columns = [Column(key, f"{key}, error in %", "less", 2, about) for key in SETTINGS]
    columns.append(Column("psnr", f"{label}: PSNR to stock, dB", "more", 1, f"mean, {args.image_steps} steps"))
    command = shlex.join(["python", "scripts/kv_ideas.py", *sys.argv[1:]])
    facts = {"prompts": args.prompts, "steps": args.steps, "image_steps": args.image_steps, "dtype": "float32"}
    result = {"columns": [vars(column) for column in columns], "methods": rows}
    write_json(args.output, result | {"provenance": {"command": command, **facts, **environment("cpu")}})
    print(table(result))


if __name__ == "__main__":
    main()
