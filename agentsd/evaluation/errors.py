"""How far the attention of a method is from the stock attention: by level of the U and by noise level.

Every layer is given the input that it has in a stock run, so that errors do not build up along the network; what is
compared is its output before `to_out`, for every token.
"""

import dataclasses
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from agentsd.config import AgentSDConfig
from agentsd.evaluation.methods import Method, copied, method, missing, prepared, put_tomesd
from agentsd.patch import Layer, apply, find_layers

__all__ = ["VARIANTS", "measure", "missing", "relative_error", "tables", "variant"]

VARIANTS = (
    "paper:ratio=0.4",
    "paper:ratio=0.4,proportional=true",
    "tomesd:ratio=0.4",
    "merge:ratio=0.4",
    "merge:ratio=0.4,proportional=true",
    "kv:stride=2",
    "kv:stride=4",
    "kv:stride=4,kmeans_steps=1",
    "kv:stride=8",
    "kv:stride=8,kmeans_steps=1",
    "fast",
    "fast:kmeans_steps=1",
    "pooled:stride=4",
    "nystrom:stride=4",
    "skipped",
)
# name: the preset that it is short for, with these options before its own
SHORT = {
    "merge": ("paper", "0/attention=merge,0/stride=2"),
    "kv": ("faithful", ""),
}
BASELINES = {"pooled": {"stride": 4}, "nystrom": {"stride": 4}, "skipped": {}}


class _Baseline:
    """A self-attention processor for comparison, of square grids."""

    def __init__(self, stride: int = 1) -> None:
        self.stride = stride

    def pooled(self, tokens: Tensor) -> Tensor:
        """Means of the cells: B×N×C → B×n×C."""
        side = round(tokens.shape[1] ** 0.5)
        stride = min(self.stride, side)
        image = tokens.transpose(1, 2).unflatten(2, (side, side))
        return F.avg_pool2d(image, stride).flatten(2).transpose(1, 2)


def _heads(attn: nn.Module, tokens: Tensor) -> Tensor:
    return tokens.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


class Pooled(_Baseline):
    """Keys and values averaged over cells, without matching and without sizes (as token downsampling does it)."""

    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        few = self.pooled(hidden_states)
        q, k, v = _heads(attn, attn.to_q(hidden_states)), _heads(attn, attn.to_k(few)), _heads(attn, attn.to_v(few))
        return attn.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Nystrom(_Baseline):
    """Nyström attention with pooled landmarks (Xiong et al., AAAI 2021), the pseudo-inverse in the middle exact."""

    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        few = self.pooled(hidden_states)
        q, k, v = (_heads(attn, part(hidden_states)).float() for part in (attn.to_q, attn.to_k, attn.to_v))
        q_few, k_few = (_heads(attn, part(few)).float() for part in (attn.to_q, attn.to_k))
        scale = q.shape[-1] ** -0.5
        to_few = (q @ k_few.transpose(-1, -2) * scale).softmax(-1)
        among = (q_few @ k_few.transpose(-1, -2) * scale).softmax(-1)
        gathered = F.scaled_dot_product_attention(q_few, k, v)
        out = to_few @ (torch.linalg.pinv(among) @ gathered)
        return attn.to_out[0](out.to(hidden_states.dtype).transpose(1, 2).flatten(2))


class Skipped(_Baseline):
    """No attention: every token keeps what it has."""

    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


_PROCESSORS: dict[str, type[_Baseline]] = {"pooled": Pooled, "nystrom": Nystrom, "skipped": Skipped}


def variant(text: str) -> Method:
    """A method, a short name of `SHORT` or a baseline.

    Raises:
        ValueError: there is none, or it reuses features across steps.
    """
    name, _, options = text.partition(":")
    if name in BASELINES:
        from agentsd.benchmark import parse

        given = parse(text)[1]
        if unknown := [key for key in given if key not in BASELINES[name]]:
            raise ValueError(f"method {text!r}: {name} has no option {unknown[0]!r}")
        return Method(text, BASELINES[name] | given)
    if name in ("deepcache", "tgate", "stock"):
        raise ValueError(f"method is {text!r}; its attention is the stock one where it computes it at all")
    if name in SHORT:
        preset, first = SHORT[name]
        return Method(text, method(f"{preset}:{','.join(filter(None, (first, options)))}").settings)
    return method(text)


@dataclass(frozen=True)
class Call:
    """One call of the UNet in a stock run."""

    progress: float
    sample: Tensor
    timestep: Tensor
    text: Tensor


@contextmanager
def _recorded(unet: nn.Module, calls: list[tuple[Tensor, Tensor, Tensor]]) -> Iterator[None]:
    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        calls.append((args[0].clone(), torch.as_tensor(timestep).clone(), kwargs["encoder_hidden_states"].clone()))

    handle = unet.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _inputs(unet: nn.Module, layers: Sequence[Layer], call: Call) -> dict[str, Tensor]:
    """The input of each layer's block in a stock call."""
    found: dict[str, Tensor] = {}
    handles = [
        layer.block.register_forward_pre_hook(lambda _, args, name=layer.name: found.update({name: args[0].clone()}))
        for layer in layers
    ]
    unet(call.sample, call.timestep, encoder_hidden_states=call.text)
    for handle in handles:
        handle.remove()
    return found


def _outputs(unet: nn.Module, call: Call, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the attention of each layer makes of given inputs of its block, for every token.

    Where a method restores the merged tokens only after the attention, it is what the block adds to its input.
    """
    found: dict[str, Tensor] = {}
    handles = []
    for layer in find_layers(unet):

        def force(_: nn.Module, args: tuple[Any, ...], given: Tensor = inputs[layer.name]) -> tuple[Any, ...]:
            return given.clone(), *args[1:]

        def note(_: nn.Module, args: tuple[Any, ...], out: Tensor, name: str = layer.name) -> None:
            found[name] = out.clone()

        def added(_: nn.Module, args: tuple[Any, ...], name: str = layer.name) -> None:
            if found[name].shape != args[0].shape:
                found[name] = args[0] - inputs[name]

        handles += [layer.block.register_forward_pre_hook(force), layer.block.attn1.register_forward_hook(note)]
        handles.append(layer.block.norm2.register_forward_pre_hook(added))
    unet(call.sample, call.timestep, encoder_hidden_states=call.text)
    for handle in handles:
        handle.remove()
    return found


def _everywhere(pipe: Any, wanted: Method | None) -> nn.Module:
    """A UNet with a method at every level, however few its tokens, and nothing after its self-attentions.

    A configuration that names what it does at each level is not put on others. Nothing is kept from call to call.
    """
    own = copied(pipe)
    layers = find_layers(own.unet)
    options = {} if wanted is None else wanted.options
    if wanted is None:
        pass
    elif wanted.name in _PROCESSORS:
        for layer in layers:
            layer.block.attn1.set_processor(_PROCESSORS[wanted.name](**options))
    elif wanted.name == "tomesd":
        put_tomesd(own, options | {"max_downsample": 8})
    else:
        levels = tuple(sorted({layer.level for layer in layers}))
        config = AgentSDConfig.from_dict(options)
        phases = []
        for phase in config.phases:
            fresh: dict[str, Any] = {"match_interval": 1}
            everywhere: dict[str, Any] = {"levels": levels, "min_tokens": 1}
            if isinstance(phase.levels, Mapping):
                everywhere = {"levels": {level: {**given, **fresh} for level, given in phase.levels.items()}}
            phases.append(dataclasses.replace(phase, **everywhere, **fresh, reuse_interval=1))
        apply(own, config.replace(phases=tuple(phases), cross_reuse_from=None))
    for layer in layers:
        layer.block.attn1.to_out = nn.ModuleList([nn.Identity(), nn.Identity()])
    unet: nn.Module = own.unet
    return unet


def _finest(pipe: Any, wanted: Method) -> Any:
    """A pipeline with a method where it is at home: baselines at the finest level."""
    if wanted.name not in _PROCESSORS:
        return prepared(pipe, wanted)
    own = copied(pipe)
    layers = find_layers(own.unet)
    finest = min(layer.level for layer in layers)
    for layer in layers:
        if layer.level == finest:
            layer.block.attn1.set_processor(_PROCESSORS[wanted.name](**wanted.settings))
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
        pipe: the pipeline, stock.
        variants: as `variant` makes them.
        prompts: one for each image; all are drawn at once.
        steps, guidance: of the sampler.
        at: noise levels, as progress from 0 (noise) to 1 (image); the nearest step of each is taken.
        seed: of the first image.
        quiet: no progress bar.

    Returns:
        For each variant `error` (level → relative error at each noise level, the mean over layers and images of
        ‖O − O_stock‖ / ‖O_stock‖), and `psnr` of each image in dB.
    """
    from agentsd.evaluation.metrics import pair_distances

    pipe.set_progress_bar_config(disable=True)

    def draw(call: Any) -> Tensor:
        images = call(
            list(prompts),
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed + index) for index in range(len(prompts))],
            output_type="pt",
        ).images
        drawn: Tensor = (images * 255).round().to(torch.uint8)
        return drawn

    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    stock_pipe = copied(pipe)
    with _recorded(stock_pipe.unet, calls):
        stock = draw(stock_pipe)
    horizon = pipe.scheduler.config.num_train_timesteps
    reached = [1 - float(timestep) / horizon for _, timestep, _ in calls]
    nearest = [int((torch.tensor(reached) - progress).abs().argmin()) for progress in at]
    chosen = [Call(reached[i], *calls[i]) for i in nearest]
    layers = find_layers(pipe.unet)
    levels = sorted({layer.level for layer in layers})
    result: dict[str, Any] = {
        "progress": [call.progress for call in chosen],
        "levels": levels,
        "variants": [],
    }
    reference = _everywhere(pipe, None)
    inputs = [_inputs(stock_pipe.unet, find_layers(stock_pipe.unet), call) for call in chosen]
    truth = [_outputs(reference, call, given) for call, given in zip(chosen, inputs, strict=True)]
    for wanted in tqdm(variants, desc="variants", disable=quiet):
        with torch.random.fork_rng():
            unet = _everywhere(pipe, wanted)
            errors: dict[int, list[float]] = {level: [] for level in levels}
            for call, given, true in zip(chosen, inputs, truth, strict=True):
                found = _outputs(unet, call, given)
                for level in levels:
                    names = [layer.name for layer in layers if layer.level == level]
                    errors[level].append(statistics.mean(relative_error(found[name], true[name]) for name in names))
        images = draw(_finest(pipe, wanted))
        result["variants"].append(
            {
                "variant": wanted.text,
                "settings": wanted.settings,
                "error": {str(level): values for level, values in errors.items()},
                "psnr": [min(value, 999.0) for value in pair_distances("psnr", images, stock).tolist()],
            }
        )
    return result


def relative_error(found: Tensor, true: Tensor) -> float:
    """The mean over a batch of ‖found − true‖ / ‖true‖."""
    difference = (found.double() - true.double()).flatten(1).norm(dim=1)
    return float((difference / true.double().flatten(1).norm(dim=1)).mean())


def tables(result: dict[str, Any]) -> str:
    """Both tables in Markdown: the finest level by noise level with the images, and every level."""
    finest = str(result["levels"][0])
    head = ["variant", *(f"at {progress:.2f}" for progress in result["progress"]), "mean error", "PSNR, dB", "worst"]
    rows = [head]
    for row in result["variants"]:
        errors = row["error"][finest]
        cells = [row["variant"], *(f"{value:.4f}" for value in errors), f"{statistics.mean(errors):.4f}"]
        rows.append([*cells, f"{statistics.mean(row['psnr']):.1f}", f"{min(row['psnr']):.1f}"])
    second = [["variant", *(f"level {level}" for level in result["levels"])]]
    for row in result["variants"]:
        means = [statistics.mean(row["error"][str(level)]) for level in result["levels"]]
        second.append([row["variant"], *(f"{value:.4f}" for value in means)])
    return "\n\n".join(_pipes(table) for table in (rows, second))


def _pipes(table: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in table]
    lines.insert(1, "|" + "---|" * len(table[0]))
    return "\n".join(lines)
