"""What the acceleration does to each layer, as numbers and as a table."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from agentsd.config import AgentSDConfig, Phase
from agentsd.patch import Layer, Patch, find_layers, level_grid, networks, other_self_attention, patch_of, stock_module
from agentsd.processor import AgentSDProcessor, Counts, counts, obstacle
from agentsd.reuse import Reuse

_STOCK = Phase(attention="stock")


@dataclass(frozen=True)
class LayerReport:
    """One self-attention layer.

    Attributes:
        name: module name, behind the class of its network.
        level: 1 is the latent grid, 2 half of it …
        grid: height and width of the token grid.
        tokens: number of tokens.
        phases: what each phase does here.
        channels: width of the attention.
        note: why the layer is left alone, if it is although the configuration covers it.
        refined: whether `refine` has a refinement of its agent attention.
    """

    name: str
    level: int
    grid: tuple[int, int]
    tokens: int
    phases: tuple[Counts, ...]
    channels: int
    note: str = ""
    refined: bool = False


@dataclass(frozen=True)
class Report:
    """The result of `describe`; prints as a table."""

    config: AgentSDConfig | None
    layers: tuple[LayerReport, ...]
    others: tuple[str, ...] = ()
    reuse: tuple[str, ...] = ()

    def _shares(self) -> list[float]:
        ends = [phase.until for phase in self.config.phases] if self.config else [1.0]
        return [end - start for start, end in zip([0.0, *ends], ends, strict=False)]

    def saved(self, layer: LayerReport | None = None) -> float:
        """Share of the attention products' multiply-adds saved over the schedule, by one layer or by all."""
        layers = self.layers if layer is None else (layer,)
        stock = sum(2 * row.tokens**2 * row.channels for row in layers)
        done = sum(
            share * what.work() * row.channels
            for row in layers
            for share, what in zip(self._shares(), row.phases, strict=True)
        )
        return 1 - done / stock

    def __str__(self) -> str:
        if self.config is None:
            return f"not applied; {len(self.layers)} spatial self-attention layers"
        starts = [0.0, *(phase.until for phase in self.config.phases)]
        heads = [f"{start:g}–{phase.until:g}" for start, phase in zip(starts, self.config.phases, strict=False)]
        table = [["layer", "level", "grid", "tokens", *heads, "saved"]]
        for row in self.layers:
            cells = (
                [f"left alone: {row.note}"] * len(row.phases)
                if row.note
                else [_words(what, row) for what in row.phases]
            )
            grid = f"{row.grid[0]}×{row.grid[1]}"
            table.append([row.name, str(row.level), grid, str(row.tokens), *cells, f"{self.saved(row):.0%}"])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table
        ]
        lines.insert(1, "  ".join("─" * width for width in widths))
        lines.append(f"saved of all self-attention products over the schedule: {self.saved():.0%}")
        lines += self.reuse
        lines += [f"self-attention of {name} is left alone" for name in self.others]
        return "\n".join(lines)


def _words(what: Counts, row: LayerReport) -> str:
    words = {
        "agent": f"agent: {what.queries} tokens, {what.agents} agents{', refined' if row.refined else ''}",
        "merge": f"merge: {what.queries} tokens",
        "kv": f"kv: {what.keys} agents",
        "stock": "stock: too few tokens to pay" if what.few else "stock",
    }
    return " + ".join([words[what.attention], *(f"{part} merged" for part in what.also)])


def _row(prefix: str, layer: Layer, sample: tuple[int, int], patch: Patch | None) -> LayerReport:
    grid = level_grid(sample, layer.level)
    attn = layer.block.attn1
    phases = [parts.get(layer.level) for parts in patch.parts.values()] if patch else [None]
    inner = attn.processor.inner if isinstance(attn.processor, AgentSDProcessor) else attn.processor
    reason = obstacle(attn, inner) or (patch.left_alone.get(layer.name) if patch else None)
    note = reason or "" if any(phases) else ""
    done = tuple(
        counts(phase, patch.config.ratio_of(phase), grid) if patch and phase and not note else counts(_STOCK, 0.0, grid)
        for phase in phases
    )
    name, tokens = f"{prefix}.{layer.name}", grid[0] * grid[1]
    refined = patch is not None and layer.name in patch.refinements
    return LayerReport(name, layer.level, grid, tokens, done, attn.inner_dim, note, refined)


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
    nets = [stock_module(net) for net in networks(model)]
    patches = [patch_of(net) for net in nets]
    config = next((patch.config for patch in patches if patch), None)
    sample = next((patch.sample for patch in patches if patch and patch.sample), None) or _sample_size(nets[0])
    controls = [net for net in nets if "ControlNet" in type(net).__name__]
    rows: list[LayerReport] = []
    for net, patch in zip(nets, patches, strict=True):
        prefix = "controlnet" if net in controls else "unet"
        if net in controls[1:]:
            prefix += f"_{controls.index(net)}"
        rows += [_row(prefix, layer, sample, patch) for layer in find_layers(net)]
    others = tuple(sorted({name for net in nets for name in other_self_attention(net)}))
    if config:
        rows = [_padded(row, len(config.phases)) for row in rows]
    return Report(config, tuple(rows), others, tuple(_reuse(next((p.reuse for p in patches if p and p.reuse), None))))


def _reuse(reuse: Reuse | None) -> Iterator[str]:
    """Sentences on what is kept from call to call."""
    if reuse is None:
        return
    start = 0.0
    for phase in reuse.config.phases:
        if phase in reuse.cuts:
            layers = reuse.cuts[phase]
            span = phase.reuse_span
            far = "" if span is None else f", and any over {span:g} of the schedule after the last whole one"
            yield (
                f"{start:g}–{phase.until:g}: one UNet call in {phase.reuse_interval} is whole{far}; the others compute "
                f"the outermost {layers if layers > 1 else ''} {'layers' if layers > 1 else 'layer'} of each side"
            ).replace("  ", " ")
        start = phase.until
    if reuse.config.cross_reuse_from is not None:
        yield f"{reuse.config.cross_reuse_from:g}–1: the outputs of the cross-attentions are held"
    yield f"held between calls: at most {reuse.bytes / 2**20:.2g} MiB so far"


def _padded(row: LayerReport, phases: int) -> LayerReport:
    """A network that is left stock beside accelerated ones has one column for each of their phases."""
    if len(row.phases) == phases:
        return row
    return LayerReport(row.name, row.level, row.grid, row.tokens, row.phases[:1] * phases, row.channels, row.note)
