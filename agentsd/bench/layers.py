"""One self-attention layer of SD 1.5's finest grid against the number of tokens."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from agentsd.bench.architectures import Setting
from agentsd.bench.latency import interleaved
from agentsd.config import KV, Agent, AgentSDConfig, Merge, Phase
from agentsd.hosts.diffusers_unet import AgentSDProcessor
from agentsd.layer import BlockState
from agentsd.ops.attention import sdpa
from agentsd.planning import Planner

# The layers that `measure_layers` can measure beside accelerated ones.
STOCK, MODULE = "stock", "module"
TOKENS = tuple(4**n for n in range(5, 9))
_TECHNIQUES: dict[str, Agent | KV | Merge] = {
    "agent, stride 4": Agent(),
    "kv, 256 agents": KV(stride=4, max_agents=256),
    "kv, stride 4": KV(stride=4),
    "kv, stride 8": KV(stride=8),
    "merge, stride 2": Merge(),
}
LAYERS: dict[str, AgentSDConfig | str] = {
    "stock": STOCK,
    **{name: AgentSDConfig(phases=(Phase(attention=technique),)) for name, technique in _TECHNIQUES.items()},
    "agentsd.nn, 49 agents": MODULE,
}


def layer_call(kind: AgentSDConfig | str, count: int, setting: Setting) -> Callable[[], Any]:
    """A call of one layer on `count` tokens: `STOCK`, `MODULE` (agentsd.nn, 49 agents) or a configuration's."""
    from diffusers.models.attention import BasicTransformerBlock

    from agentsd.nn import AgentAttention

    side = round(count**0.5)
    grid, dtype = (side, side), getattr(torch, setting.dtype)
    # Smooth, as the tokens of a picture are.
    coarse = torch.randn(setting.batch, 320, 16, 16, generator=torch.Generator().manual_seed(count))
    image = nn.functional.interpolate(coarse, size=grid, mode="bilinear")
    x = image.flatten(2).transpose(1, 2).to(setting.device, dtype).contiguous()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == MODULE:
            module = AgentAttention(320, 8, 49, grid=grid).to(setting.device, dtype).eval()
            return lambda: module(x)
        block = BasicTransformerBlock(320, 8, 40, cross_attention_dim=768).to(setting.device, dtype).eval()
    if isinstance(kind, str):
        return lambda: block.attn1(x)
    plan = Planner(kind, [1]).plan(1, grid, 1000, 1000, setting.device)
    state = BlockState({1: plan} if plan else {}, 1)
    processor = AgentSDProcessor(block.attn1.processor, state)
    processor.attend = sdpa if setting.fused else processor.attend
    block.attn1.set_processor(processor)

    def call() -> None:
        state.remember(block.norm1, (x,))
        block.attn1(x)

    return call


@torch.inference_mode()
def measure_layers(
    tokens: Sequence[int], layers: dict[str, AgentSDConfig | str], setting: Setting, repeats: int = 5
) -> dict[str, dict[int, float]]:
    """Median seconds of one layer, per number of tokens (square grids), all layers in turn in each repetition.

    Args:
        tokens: numbers of tokens, squares.
        layers: name → configuration whose first phase is measured, or one of `STOCK`, `MODULE`.
        setting: batch, dtype and device.
        repeats: repetitions after one warm-up.
    """
    medians: dict[str, dict[int, float]] = {name: {} for name in layers}
    for count in tokens:
        ready = {name: layer_call(kind, count, setting) for name, kind in layers.items()}
        for name, seconds in interleaved(ready, setting.device, repeats, title=f"layers, {count} tokens").items():
            medians[name][count] = statistics.median(seconds)
    return medians


def exponent(times: Mapping[Any, float], start: int = 4096) -> float:
    """The exponent of the growth with the number of tokens from `start` on: least squares in the logarithms."""
    points = [(math.log(int(n)), math.log(t)) for n, t in times.items() if int(n) >= start]
    return statistics.linear_regression(*zip(*points, strict=True)).slope
