"""An optional refinement of AgentSD: the paper's agent bias and convolution of V, trained to match the stock layers.

Off by default, and zero before training, so that nothing changes. Agent Attention, section 4, on merged tokens: a
merged token or agent has the mean of the positions it stands for.
"""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from agentsd.attention import log_size_bias
from agentsd.config import AgentSDConfig
from agentsd.patch import Layer, Patch, applied, disabled, patch_of
from agentsd.processor import AgentSDProcessor, Block, Counts, Plan, _heads, _key, _out, _query, counts

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention

SIDE = 7


def positions(grid: tuple[int, int], like: Tensor) -> Tensor:
    """Where the tokens of a grid lie on the 7×7 map: their bilinear weights, N×49."""
    points = torch.eye(SIDE * SIDE, dtype=like.dtype, device=like.device).view(1, -1, SIDE, SIDE)
    return F.interpolate(points, size=grid, mode="bilinear")[0].flatten(1).T


class Refinement(nn.Module):
    """What one self-attention layer learns: B1 and B2, a 7×7 map of agents by a 7×7 map of tokens each, and DWC.

    Agents have maps as tokens have, so that the refinement fits any image size and any stride.

    Args:
        num_heads: H.
        dim: channels C.
    """

    def __init__(self, num_heads: int, dim: int) -> None:
        super().__init__()
        self.b1 = nn.Parameter(torch.zeros(num_heads, SIDE**2, SIDE**2))
        self.b2 = nn.Parameter(torch.zeros(num_heads, SIDE**2, SIDE**2))
        self.dwc = nn.Parameter(torch.zeros(dim, 1, 3, 3))

    def bias(self, agents: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """B1 (B×H×n×M) and B2 (B×H×M×n) of n agents and M tokens, given their positions, B×n×49 and B×M×49."""
        B1 = agents[:, None] @ self.b1.to(agents) @ tokens[:, None].mT
        B2 = tokens[:, None] @ self.b2.to(agents).mT @ agents[:, None].mT
        return B1, B2

    def convolve(self, v: Tensor, grid: tuple[int, int]) -> Tensor:
        """Depthwise 3×3 convolution of the values on their grid, B×N×C."""
        image = v.transpose(1, 2).unflatten(2, grid)
        return F.conv2d(image, self.dwc.to(v), padding=1, groups=len(self.dwc)).flatten(2).transpose(1, 2)


class RefinedProcessor(AgentSDProcessor):
    """AgentSD's processor with a refinement in the phases of agent attention."""

    def __init__(self, inner: Any = None, block: Block | None = None, refinement: Refinement | None = None) -> None:
        super().__init__(inner, block)
        self.refinement = refinement

    def _agent(self, attn: "Attention", y: Tensor, plan: Plan, todo: Counts) -> Tensor:
        refinement, phase = self.refinement, plan.phase
        if refinement is None:
            return super()._agent(attn, y, plan, todo)
        where = positions(plan.grid, y).expand(len(y), -1, -1)
        merged = self.block.merged(plan) if todo.queries < plan.tokens else None
        f, tokens = (merged.merge(y), merged.merge(where)) if merged else (y, where)
        if phase.agents == "merge":
            groups = self.block.matched(plan).fold(plan.tokens - todo.agents)
            a, agents = groups.merge(y), groups.merge(where)
        else:
            sy, sx = phase.cell_on(plan.grid)
            cells = plan.grid[0] // sy, plan.grid[1] // sx
            a = F.adaptive_avg_pool2d(y.transpose(1, 2).unflatten(2, plan.grid), cells).flatten(2).transpose(1, 2)
            agents = positions(cells, y).expand(len(y), -1, -1)
        q, k, v, A = _query(attn, f), _key(attn, f), attn.to_v(f), _query(attn, a)
        B1, B2 = refinement.bias(agents, tokens)
        if phase.proportional and merged:
            B1 = B1 + log_size_bias(merged.sizes, f)
        V = _heads(attn, v)
        gathered = self.attend(A, k, V, attn_mask=B1)
        out = self.attend(q, A, gathered, attn_mask=B2, scale=q.shape[-1] ** (-0.5 * phase.k_scale2))
        out = out.add(V, alpha=phase.k_shortcut).transpose(1, 2).flatten(2)
        if merged:
            out, v = merged.unmerge(out), merged.unmerge(v)
        return _out(attn, _heads(attn, out + refinement.convolve(v, plan.grid)))


def fitting(refinements: dict[str, Refinement], patch: Patch) -> dict[str, Refinement]:
    """The refinements that do anything, once all are found to fit the layers that a patch covers.

    Raises:
        ValueError: a layer is not there, not covered, or of another size.
    """
    file, layers = patch.config.refine, {layer.name: layer.block.attn1 for layer in patch.covered}
    for name, refinement in refinements.items():
        if name not in layers:
            kind = type(patch.model).__name__
            raise ValueError(f"refine is {file!r}, with a layer {name}; {kind} is accelerated in {', '.join(layers)}")
        attn, size = layers[name], (len(refinement.b1), len(refinement.dwc))
        if size != (attn.heads, attn.to_v.out_features):
            raise ValueError(
                f"refine is {file!r}, with {size[0]} heads and {size[1]} channels for {name}, "
                f"which has {attn.heads} and {attn.to_v.out_features}"
            )
    return {name: part for name, part in refinements.items() if any(weight.any() for weight in part.parameters())}


def save_refinements(refinements: dict[str, Refinement], file: Path) -> None:
    """Write refinements as safetensors, in half precision: the file appears whole or not at all."""
    state = {f"{name}.{key}": value for name, part in refinements.items() for key, value in part.state_dict().items()}
    part = file.with_name(f".{file.name}.part")
    save_file({name: value.half().contiguous() for name, value in state.items()}, part, {"format": "agentsd.refine"})
    os.replace(part, file)


def load_refinements(file: str | Path) -> dict[str, Refinement]:
    """Read what `save_refinements` wrote.

    Raises:
        ValueError: the file is not there or does not hold refinements.
    """
    try:
        state = load_file(file)
    except FileNotFoundError:
        raise ValueError(f"refine is {str(file)!r}; there is no such file") from None
    except (OSError, SafetensorError) as reason:
        raise ValueError(f"refine is {str(file)!r}; it cannot be read as safetensors ({reason})") from None
    refinements = {}
    for name in sorted({key.rpartition(".")[0] for key in state}):
        parts = {key: state.get(f"{name}.{key}") for key in ("b1", "b2", "dwc")}
        if missing := [key for key, value in parts.items() if value is None]:
            raise ValueError(f"refine is {str(file)!r}; it holds no {missing[0]} for {name or 'any layer'}")
        refinement = Refinement(len(state[f"{name}.b1"]), len(state[f"{name}.dwc"]))
        try:
            refinement.load_state_dict({key: value.float() for key, value in parts.items() if value is not None})
        except RuntimeError:
            shapes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in parts.items() if value is not None)
            raise ValueError(f"refine is {str(file)!r}; {name} has {shapes}, not maps of 49×49 and 3×3") from None
        refinements[name] = refinement.requires_grad_(False)
    return refinements


@dataclass(frozen=True)
class Sample:
    """One call of a stock layer, and what the configuration would do there.

    Attributes:
        layer: the layer's name.
        plan: what the configuration would do.
        x: the block's input, B×N×C.
        y: the input of the attention.
        out: the stock layer's output.
    """

    layer: str
    plan: Plan
    x: Tensor
    y: Tensor
    out: Tensor


def collect(pipe: Any, config: AgentSDConfig, prompts: Sequence[str], **call: Any) -> list[Sample]:
    """Run a stock pipeline and note every call of the layers in which the configuration has agents.

    Args:
        pipe: a pipeline with a UNet.
        config: what is to be refined.
        prompts: one image each.
        **call: further arguments of the pipeline's call, such as `num_inference_steps`.
    """
    samples: list[Sample] = []
    with applied(pipe, config), disabled(pipe), ExitStack() as stack:
        patch = patch_of(pipe.unet)
        assert patch is not None
        plans: dict[int, Plan] = {}

        def plan(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            patch.enabled = True
            patch.before_call(module, args, kwargs)
            patch.enabled = False
            plans.clear()
            plans.update(patch.plans)
            patch.plans.clear()

        stack.callback(patch.model.register_forward_pre_hook(plan, with_kwargs=True).remove)
        for layer in patch.covered:
            for handle in _note(layer, plans, samples):
                stack.callback(handle.remove)
        for index, prompt in enumerate(prompts):
            pipe(prompt, generator=torch.Generator().manual_seed(index), output_type="latent", **call)
    return samples


def _note(layer: Layer, plans: dict[int, Plan], samples: list[Sample]) -> list[Any]:
    inputs: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...]) -> None:
        inputs[:] = [args[0]]

    def after(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        plan = plans.get(layer.level)
        if plan and counts(plan.phase, plan.ratio, plan.grid).attention == "agent":
            samples.append(Sample(layer.name, plan, inputs[0].detach(), args[0].detach(), out.detach()))

    return [layer.block.norm1.register_forward_pre_hook(before), layer.block.attn1.register_forward_hook(after)]


def error(attn: "Attention", refinement: Refinement | None, sample: Sample) -> Tensor:
    """Relative squared error of a layer's accelerated output against the stock output."""
    block = Block({1: sample.plan}, 1, ())
    block.x = sample.x
    out = RefinedProcessor(attn.processor, block, refinement)(attn, sample.y)
    return (out - sample.out).square().sum() / sample.out.square().sum()


def distill(
    unet: nn.Module, samples: Sequence[Sample], steps: int = 200, rate: float = 0.01, seed: int = 0
) -> dict[str, Refinement]:
    """Train a refinement for every layer of the samples; the stock UNet stays as it is.

    Args:
        unet: the stock UNet that the samples are from.
        samples: what `collect` returned.
        steps: optimiser steps for each layer, one sample each.
        rate: learning rate of Adam, which falls to zero.
        seed: order of the samples.
    """
    generator = torch.Generator().manual_seed(seed)
    refinements = {}
    for name in dict.fromkeys(sample.layer for sample in samples):
        of_layer = [sample for sample in samples if sample.layer == name]
        attn: Any = unet.get_submodule(name)
        refinement = Refinement(attn.heads, attn.to_v.out_features).to(of_layer[0].y.device)
        optimizer = torch.optim.Adam(refinement.parameters(), rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            sample = of_layer[int(torch.randint(len(of_layer), (), generator=generator))]
            grads = torch.autograd.grad(error(attn, refinement, sample), list(refinement.parameters()))
            for parameter, grad in zip(refinement.parameters(), grads, strict=True):
                parameter.grad = grad
            optimizer.step()
            schedule.step()
        refinements[name] = refinement
    return refinements
