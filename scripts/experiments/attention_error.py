#!/usr/bin/env python
"""How far the attention of a method is from the stock attention: by level of the UNet and by noise level.

python scripts/experiments/attention_error.py --device cpu --threads 1 --prompts 2
python scripts/experiments/attention_error.py --method paper --method floor --output runs/error
python scripts/experiments/attention_error.py --into docs/benchmarks.md

Every layer is given the input that it has in a stock run, so that errors do not build up along the network; what is
compared is its output before `to_out`, for every token.
"""

import argparse
import dataclasses
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from agentsd import checks, pipelines
from agentsd.api import apply
from agentsd.demo.scenes import held_out_prompts
from agentsd.drawing import UNetCall, draw, record_calls
from agentsd.hosts.diffusers_unet import SelfAttentionLayer, find_layers
from agentsd.images import psnr
from agentsd.methods import (
    Method,
    leave_out_attention,
    method,
    missing,
    own_copy,
    parse,
    prepared,
    put_tomesd,
)
from agentsd.results import environment, filled, markdown_table, read_json, write_json, write_text

SCRIPT = "scripts/experiments/attention_error.py"
VARIANTS = (
    "paper:ratio=0.4",
    "tomesd:ratio=0.4",
    "merge:ratio=0.4",
    "merge:ratio=0.4,proportional=true",
    "kv:stride=2",
    "kv:stride=4",
    "kv:stride=8",
    "fast",
    "pooled:stride=4",
    "floor",
)
# name: the preset that it is short for, with these options before its own
SHORT = {"merge": ("paper", "0/attention=merge,0/stride=2"), "kv": ("faithful", "")}
IDENTICAL = 999.0  # dB in JSON, which has no infinity


def pooled(attn: Any, tokens: Tensor, *_: Any, stride: int = 4, **__: Any) -> Tensor:
    """Keys and values averaged over cells of a square grid, without matching (as token downsampling does it)."""

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

    side = round(tokens.shape[1] ** 0.5)
    image = tokens.transpose(1, 2).unflatten(2, (side, side))
    means = F.avg_pool2d(image, min(stride, side)).flatten(2).transpose(1, 2)
    q, k, v = heads(attn.to_q(tokens)), heads(attn.to_k(means)), heads(attn.to_v(means))
    return attn.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def variant(text: str) -> Method:
    """A method, a short name of `SHORT`, or `pooled`.

    Raises:
        ValueError: there is none, or its attention is the stock one.
    """
    name, _, options = text.partition(":")
    if name == "pooled":
        given = parse(text)[1]
        checks.known_fields(f"method {text!r}: {name}", given, ("stride",))
        return Method(text, {"stride": 4} | given)
    if name in ("stock", "deepcache", "tgate", "xformers"):
        raise ValueError(f"method is {text!r}; its attention is the stock one where it computes it at all")
    if name in SHORT:
        preset, first = SHORT[name]
        settings = method(f"{preset}:{','.join(filter(None, (first, options)))}").settings
        return Method(text, settings)
    return method(text)


def _inputs(unet: nn.Module, layers: Sequence[SelfAttentionLayer], call: UNetCall) -> dict[str, Tensor]:
    """The input of each layer's block in a stock call."""
    found: dict[str, Tensor] = {}

    def note(name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        found[name] = args[0].clone()

    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.block.register_forward_pre_hook(partial(note, layer.name)))
        unet(*call.args, **call.kwargs)
    return found


def _outputs(unet: nn.Module, call: UNetCall, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the attention of each layer makes of given inputs of its block, for every token.

    Where a method restores the merged tokens only after the attention, it is what the block adds to its input.
    """
    found: dict[str, Tensor] = {}

    def force(name: str, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return inputs[name].clone(), *args[1:]

    def note(name: str, _: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        found[name] = out.clone()

    def added(name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        if found[name].shape != args[0].shape:
            found[name] = args[0] - inputs[name]

    with ExitStack() as hooks:
        for layer in find_layers(unet):
            block, name = layer.block, layer.name
            hooks.enter_context(block.register_forward_pre_hook(partial(force, name)))
            hooks.enter_context(block.attn1.register_forward_hook(partial(note, name)))
            hooks.enter_context(block.norm2.register_forward_pre_hook(partial(added, name)))
        unet(*call.args, **call.kwargs)
    return found


def _everywhere(pipe: Any, wanted: Method | None) -> nn.Module:
    """A UNet with a method at every level, however few its tokens, and nothing after its self-attentions.

    A configuration that names several levels is put on those. Nothing is kept from call to call.
    """
    own = own_copy(pipe)
    layers = find_layers(own.unet)
    levels = tuple(sorted({layer.level for layer in layers}))
    if wanted is None:
        pass
    elif wanted.name == "pooled":
        _pool(wanted, layers)
    elif wanted.name == "floor":
        leave_out_attention(own.unet, wanted.options | {"levels": "all"})
    elif wanted.name == "tomesd":
        put_tomesd(own, wanted.options | {"max_downsample": 8})
    elif config := wanted.config:
        if all(phase.levels == (0,) for phase in config.phases):
            phases = [dataclasses.replace(phase, levels=levels, min_tokens=1) for phase in config.phases]
            config = config.replace(phases=phases)
        apply(own, config.replace(steps=()))
    for layer in layers:
        layer.block.attn1.to_out = nn.ModuleList([nn.Identity(), nn.Identity()])
    unet: nn.Module = own.unet
    return unet


def _pool(wanted: Method, layers: Sequence[SelfAttentionLayer]) -> None:
    for layer in layers:
        layer.block.attn1.set_processor(partial(pooled, **wanted.options))  # type: ignore[arg-type]


def _drawing(pipe: Any, wanted: Method) -> Callable[..., Any]:
    """A pipeline with a method where it is meant to be; `pooled` at the finest level."""
    if wanted.name != "pooled":
        return prepared(pipe, wanted)
    own = own_copy(pipe)
    layers = find_layers(own.unet)
    finest = min(layer.level for layer in layers)
    _pool(wanted, [layer for layer in layers if layer.level == finest])
    return own


@torch.inference_mode()
def measure(
    pipe: Any,
    variants: Sequence[Method],
    prompts: Sequence[str],
    *,
    steps: int = 20,
    guidance: float = 4.0,
    at: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    seed: int = 0,
    quiet: bool = False,
) -> dict[str, Any]:
    """Errors of the attention, and how far whole images come from the stock images of the same seeds.

    Args:
        pipe, variants: the pipeline, stock, and what `variant` makes.
        prompts, seed: one prompt for each image, all drawn at once, and the seed of the first.
        steps, guidance: of the sampler.
        at: noise levels, as progress from 0 (noise) to 1 (image); the nearest step of each is taken.
        quiet: no progress bar.

    Returns:
        For each variant `error` (level → relative error at each noise level, the mean over layers and images of
        ‖O − O_stock‖ / ‖O_stock‖), and `psnr` of each image in dB.
    """

    def images(call: Any) -> list[Image]:
        seeds = [seed + index for index in range(len(prompts))]
        return draw(call, prompts, seeds, num_inference_steps=steps, guidance_scale=guidance).images

    pipe.set_progress_bar_config(disable=True)
    own = own_copy(pipe)
    with record_calls(own.unet) as calls:
        stock = images(own)
    horizon = pipe.scheduler.config.num_train_timesteps
    progress = [1 - call.timestep / horizon for call in calls]
    nearest = [min(range(len(calls)), key=lambda i: abs(progress[i] - wanted)) for wanted in at]
    chosen = [calls[i] for i in nearest]
    layers = find_layers(own.unet)
    levels = sorted({layer.level for layer in layers})
    inputs = [_inputs(own.unet, layers, call) for call in chosen]
    reference = _everywhere(pipe, None)
    truth = [_outputs(reference, call, given) for call, given in zip(chosen, inputs, strict=True)]
    rows = []
    for wanted in tqdm(variants, desc="variants", disable=quiet):
        errors: dict[int, list[float]] = {level: [] for level in levels}
        with torch.random.fork_rng():
            unet = _everywhere(pipe, wanted)
            for call, given, true in zip(chosen, inputs, truth, strict=True):
                found = _outputs(unet, call, given)
                for level in levels:
                    names = [layer.name for layer in layers if layer.level == level]
                    errors[level].append(statistics.mean(relative_error(found[name], true[name]) for name in names))
        decibels = map(psnr, images(_drawing(pipe, wanted)), stock)
        rows.append(
            {
                "variant": wanted.text,
                "settings": wanted.settings,
                "error": {str(level): values for level, values in errors.items()},
                "psnr": [min(value, IDENTICAL) for value in decibels],
            }
        )
    return {"progress": [progress[i] for i in nearest], "levels": levels, "variants": rows}


def relative_error(found: Tensor, true: Tensor) -> float:
    """The mean over a batch of ‖found − true‖ / ‖true‖."""
    difference = (found.double() - true.double()).flatten(1).norm(dim=1)
    return float((difference / true.double().flatten(1).norm(dim=1)).mean())


def tables(result: dict[str, Any]) -> str:
    """Both tables in Markdown: the finest level by noise level with the images, and every level."""
    levels = [str(level) for level in result["levels"]]
    head = ["variant", *(f"at {progress:.2f}" for progress in result["progress"]), "mean error", "PSNR, dB", "worst"]
    finest, every = [], []
    for row in result["variants"]:
        errors = row["error"][levels[0]]
        cells = [f"{value:.4f}" for value in (*errors, statistics.mean(errors))]
        finest.append([row["variant"], *cells, f"{statistics.mean(row['psnr']):.1f}", f"{min(row['psnr']):.1f}"])
        every.append([row["variant"], *(f"{statistics.mean(row['error'][level]):.4f}" for level in levels)])
    second = ["variant", *(f"level {level}" for level in levels)]
    return markdown_table(head, finest) + "\n\n" + markdown_table(second, every)


def block(result: dict[str, Any]) -> str:
    """The command behind a result, what it was run on, and its tables."""
    about = result["provenance"]
    machine = f"{about['device']}, {about['threads']} thread{'s' * (about['threads'] > 1)}"
    packages = ", ".join(f"{name} {about[name]}" for name in ("torch", "diffusers"))
    caption = f"{len(about['prompts'])} prompts, {about['steps']} steps, {about['dtype']}, {machine}, {packages}"
    return f"```bash\n{about['command']}\n```\n\n*{caption}*\n\n{tables(result)}"


def renewed(document: Path) -> str:
    """A document with new tables between `<!-- SCRIPT FILE.json -->` and `<!-- /SCRIPT -->`."""
    return filled(document, SCRIPT, lambda words: block(read_json(document.parent / words[0])))


def main() -> None:
    """Measure, print the tables and write errors.json; or renew the tables of a document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="as agentsd-generate (default: demo)")
    parser.add_argument("--method", action="append", help="a method, kv, merge or pooled; repeatable (default: all)")
    parser.add_argument("--prompt", action="append", help="repeatable (default: scenes of the embedded model)")
    parser.add_argument("--prompts", type=int, default=6, help="scenes to draw (default: 6)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--dtype", help="default: float16 on cuda, else float32")
    parser.add_argument("--device", help="default: the best there is")
    parser.add_argument("--threads", type=int, help="on a CPU (default: torch's)")
    parser.add_argument("--output", type=Path, default=Path("runs/error"), help="folder for errors.json")
    parser.add_argument(
        "--into", type=Path, metavar="DOCUMENT", help=f"only renew the tables after <!-- {SCRIPT} FILE -->"
    )
    args = parser.parse_args()

    if args.into:
        write_text(args.into, renewed(args.into))
        return
    variants = [variant(text) for text in args.method or VARIANTS]
    if absent := missing(variants):
        raise SystemExit(f"not installed: {', '.join(absent.values())}")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = pipelines.find_device(args.device)
    pipe = pipelines.load(args.model, dtype=pipelines.find_dtype(args.dtype, device), device=device)
    prompts = args.prompt or held_out_prompts(args.prompts)
    result = measure(pipe, variants, prompts, steps=args.steps, guidance=args.guidance_scale)
    result["provenance"] = {
        "command": shlex.join(["python", SCRIPT, *sys.argv[1:]]),
        "prompts": prompts,
        "steps": args.steps,
        "guidance": args.guidance_scale,
        "dtype": str(pipe.unet.dtype).removeprefix("torch."),
        **environment(str(device)),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    write_json(args.output / "errors.json", result)
    print(tables(result))


if __name__ == "__main__":
    main()
