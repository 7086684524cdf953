"""What the acceleration does to each layer, as numbers and as a table."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from agentsd.config import AgentSDConfig
from agentsd.hosts.diffusers_unet import (
    AgentSDProcessor,
    Patch,
    SelfAttentionLayer,
    find_layers,
    networks,
    obstacle,
    other_self_attention,
    patch_of,
)
from agentsd.planning import LayerPlan, layer_plan, level_grid
from agentsd.results import text_table
from agentsd.schedule import in_force


@dataclass(frozen=True)
class LayerReport:
    """One self-attention layer.

    Attributes:
        name: module name, behind the class of its network.
        level: 1 is the latent grid, 2 half of it …
        grid: height and width of the token grid.
        plans: what is done here until each of the configuration's `ends`.
        channels: width of the attention.
        skipped: why the layer is skipped, if it is although the configuration covers it.
    """

    name: str
    level: int
    grid: tuple[int, int]
    plans: tuple[LayerPlan, ...]
    channels: int
    skipped: str = ""

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Report:
    """The result of `describe`; prints as a table."""

    config: AgentSDConfig | None
    layers: tuple[LayerReport, ...]
    others: tuple[str, ...] = ()
    techniques: tuple[str, ...] = ()

    @property
    def ends(self) -> tuple[float, ...]:
        """Where what is done changes, as progress of the noise schedule."""
        return self.config.ends if self.config else (1.0,)

    def saved(self, layer: LayerReport | None = None) -> float:
        """Share of the attention products' multiply-adds saved over the schedule, by one layer or by all."""
        stock = done = 0.0
        for row in self.layers if layer is None else (layer,):
            stock += 2 * row.tokens**2 * row.channels
            for start, end, plan in zip((0.0, *self.ends), self.ends, row.plans, strict=False):
                done += (end - start) * plan.multiply_adds * row.channels
        return 1 - done / stock

    def table(self) -> list[list[str]]:
        """A header and one row per layer."""
        heads = [f"{start:g}–{end:g}" for start, end in zip((0.0, *self.ends), self.ends, strict=False)]
        rows = [["layer", "level", "grid", "tokens", *heads, "saved"]]
        for row in self.layers:
            cells = [f"skipped: {row.skipped}" if row.skipped else _words(plan) for plan in row.plans]
            grid = f"{row.grid[0]}×{row.grid[1]}"
            rows.append([row.name, str(row.level), grid, str(row.tokens), *cells, f"{self.saved(row):.0%}"])
        return rows

    def __str__(self) -> str:
        if self.config is None:
            return f"not applied; {len(self.layers)} spatial self-attention layers"
        header, *rows = self.table()
        saved = f"saved of all self-attention products over the schedule: {self.saved():.0%}"
        others = (f"self-attention of {name} is unmodified" for name in self.others)
        return "\n".join([text_table(header, rows), saved, *self.techniques, *others])


def _words(plan: LayerPlan) -> str:
    words = {
        "agent": f"agent: {plan.queries} tokens, {plan.agents} agents",
        "merge": f"merge: {plan.queries} tokens",
        "kv": f"kv: {plan.keys} agents",
        None: f"stock: {plan.note}" if plan.note else "stock",
    }
    return " + ".join([words[plan.attention], *(f"{part} merged" for part in plan.parts if part != "attn")])


def _row(
    prefix: str, layer: SelfAttentionLayer, sample: tuple[int, int], ends: tuple[float, ...], patch: Patch | None
) -> LayerReport:
    grid = level_grid(sample, layer.level)
    attn = layer.block.attn1
    inner = attn.processor.inner if isinstance(attn.processor, AgentSDProcessor) else attn.processor
    phases = patch.planner.phases[layer.level] if patch else ()
    covered = patch is not None and layer.level in patch.planner.covered
    skipped = (obstacle(attn, inner) or (patch.skipped.get(layer.name) if patch else None) or "") if covered else ""
    # Just before an end, what ends there is still in force.
    plans = tuple(layer_plan(None if skipped else in_force(phases, end - 1e-9), grid) for end in ends)
    return LayerReport(f"{prefix}.{layer.name}", layer.level, grid, plans, attn.inner_dim, skipped)


def _sample_size(net: nn.Module) -> tuple[int, int]:
    size = getattr(net.config, "sample_size", None) or 64
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def describe(model: Any) -> Report:
    """What the acceleration does to a model, layer by layer, at the size of its last call (before the first: its
    configured size).

    Args:
        model: a pipeline, UNet or ControlNet, accelerated or not.

    Returns:
        A report with one row per spatial self-attention layer; `print(describe(pipe))` shows it as a table.
    """
    nets = networks(model)
    patches = [patch_of(net) for net in nets]
    config = next((patch.config for patch in patches if patch), None)
    sample = next((patch.sample for patch in patches if patch and patch.sample), None) or _sample_size(nets[0])
    controls = [net for net in nets if "ControlNet" in type(net).__name__]
    rows: list[LayerReport] = []
    for net, patch in zip(nets, patches, strict=True):
        prefix = "controlnet" if net in controls else "unet"
        prefix += f"_{controls.index(net)}" if net in controls[1:] else ""
        rows += [_row(prefix, layer, sample, config.ends if config else (1.0,), patch) for layer in find_layers(net)]
    others = tuple(sorted({name for net in nets for name in other_self_attention(net)}))
    techniques = next((patch.techniques for patch in patches if patch and patch.techniques), [])
    return Report(config, tuple(rows), others, tuple(line for technique in techniques for line in technique.describe()))
