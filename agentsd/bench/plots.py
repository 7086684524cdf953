"""Plots of measurements."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentsd.bench.layers import exponent
from agentsd.results import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# title, unit, key in the result, factor of what is stored
_RUNS = ("mean UNet call of a 50-step schedule", "s", "schedule", 1), ("peak memory", "GiB", "memory", 2**-30)
_LAYERS = ("one self-attention layer", "ms", "layers", 1000), ("memory of a call", "MiB", "memory", 2**-20)


def draw(result: dict[str, Any], output: Path) -> Path:
    """Plot a result of agentsd-bench beside its JSON file; returns the picture's path."""
    picture = output.with_suffix(".png")
    save_figure(_bars(result["parts"]) if "parts" in result else _panels(result), picture)
    return picture


def _panels(result: dict[str, Any]) -> "Figure":
    from matplotlib.figure import Figure

    layers = "layers" in result
    found = [(title, unit, _lines(result, key, scale)) for title, unit, key, scale in (_LAYERS if layers else _RUNS)]
    panels = [panel for panel in found if panel[2]]
    figure = Figure(figsize=(6.4 * len(panels), 5.4 if layers else 4.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, (title, unit, lines) in zip(axes[0], panels, strict=True):
        if all(len(values) == 1 for values in lines.values()):
            colors = ["0.4" if name.startswith(("stock", "floor")) else "C0" for name in lines]
            axis.barh(list(lines), [value for values in lines.values() for value in values.values()], color=colors)
            axis.set_xlabel(unit)
            axis.invert_yaxis()
        else:
            for name, values in lines.items():
                style = {"stock": "k-", "floor": "k:"}.get(name.split(" (")[0].split(":")[0], "-")
                axis.plot(list(values), list(values.values()), style, marker="o", label=name)
            axis.set(xlabel="tokens" if layers else "latent cells a side", ylabel=unit)
            if layers:
                _logarithmic(axis, list(next(iter(lines.values()))))
            else:
                axis.legend()
        axis.set_title(title)
        axis.grid(alpha=0.3)
    return figure


def _lines(result: dict[str, Any], key: str, scale: float) -> dict[str, dict[int, float]]:
    """Values by name and place: the number of tokens, or the side of the latents."""
    if "layers" in result:
        rows = result.get(key, {})
        return {f"{n} (exponent {exponent(r):.2f})": {int(k): v * scale for k, v in r.items()} for n, r in rows.items()}
    lines: dict[str, dict[int, float]] = {}
    for run in result["runs"]:
        for method, value in run[key].items():
            lines.setdefault(method, {})[run["setting"]["latent"][1]] = value * scale
    return lines


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
