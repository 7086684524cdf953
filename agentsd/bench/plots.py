"""Plots of measurements."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentsd.bench.layers import exponent
from agentsd.results import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# title, name of the horizontal axis, of the vertical axis, values by line and place
Panel = tuple[str, str, str, dict[str, dict[int, float]]]


def draw(result: dict[str, Any], output: Path) -> Path:
    """Plot a result of agentsd-bench beside its JSON file; returns the picture's path."""
    picture = output.with_suffix(".png")
    save_figure(_bars(result["parts"]) if "parts" in result else _panels(result), picture)
    return picture


def _panels(result: dict[str, Any]) -> "Figure":
    from matplotlib.figure import Figure

    layers = "layers" in result
    panels = _layers(result) if layers else _runs(result)
    figure = Figure(figsize=(6.4 * len(panels), 5.4 if layers else 4.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, (title, across, unit, lines) in zip(axes[0], panels, strict=True):
        if all(len(values) == 1 for values in lines.values()):
            colors = ["0.4" if name.startswith(("stock", "floor")) else "C0" for name in lines]
            axis.barh(list(lines), [value for values in lines.values() for value in values.values()], color=colors)
            axis.set_xlabel(unit)
            axis.invert_yaxis()
        else:
            for name, values in lines.items():
                style = {"stock": "k-", "floor": "k:"}.get(name.split(" (")[0].split(":")[0], "-")
                axis.plot(list(values), list(values.values()), style, marker="o", label=name)
            axis.set(xlabel=across, ylabel=unit)
            if layers:
                _logarithmic(axis, list(next(iter(lines.values()))))
            else:
                axis.legend()
        axis.set_title(title)
        axis.grid(alpha=0.3)
    return figure


def _runs(result: dict[str, Any]) -> list[Panel]:
    panels: list[Panel] = []
    kinds = ("mean UNet call of a 50-step schedule", "s", "schedule", 1), ("peak memory", "GiB", "memory", 2**-30)
    for title, unit, key, scale in kinds:
        lines: dict[str, dict[int, float]] = {}
        for run in result["runs"]:
            for method, value in run[key].items():
                lines.setdefault(method, {})[run["setting"]["latent"][1]] = value * scale
        panels += [(title, "latent cells a side", unit, lines)] if lines else []
    return panels


def _layers(result: dict[str, Any]) -> list[Panel]:
    kinds = ("one self-attention layer", "ms", "layers", 1000), ("memory of a call", "MiB", "memory", 2**-20)
    return [
        (
            title,
            "tokens",
            unit,
            {
                f"{name} (exponent {exponent(row):.2f})": {int(n): value * scale for n, value in row.items()}
                for name, row in result[key].items()
            },
        )
        for title, unit, key, scale in kinds
        if key in result
    ]


def _logarithmic(axis: "Axes", counts: list[int]) -> None:
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False, fontsize=9)
    axis.set(xscale="log", yscale="log")
    axis.set_xticks(counts, [f"{n:,}" for n in counts])
    axis.minorticks_off()
    axis.yaxis.set_major_formatter("{x:,g}")


def _bars(kinds: dict[str, dict[str, float]]) -> "Figure":
    """Stacked bars: where the time of each kind of call goes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 0.6 * len(kinds) + 1.8), layout="constrained")
    axis, left = figure.subplots(), [0.0] * len(kinds)
    for part in next(iter(kinds.values())):
        values = [1000 * parts[part] for parts in kinds.values()]
        axis.barh(list(kinds), values, left=left, label=part, color="0.85" if part.startswith("rest") else None)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axis.invert_yaxis()
    axis.set(xlabel="ms per UNet call")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure
