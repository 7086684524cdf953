"""Plots of measurements."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentsd.results import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Lines = dict[str, dict[int, float]]


def draw(result: dict[str, Any], output: Path) -> Path:
    """Plot a result of agentsd-bench beside its JSON file; returns the picture's path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    picture = output.with_suffix(".png")
    if "parts" in result:
        return _bars(result["parts"], picture)
    layers = "layers" in result
    panels = _layers(result) if layers else _runs(result)
    size = (6.4 * len(panels), 5.4 if layers else 4.4)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for axis, (title, across, unit, lines) in zip(axes[0], panels, strict=True):
        if all(len(values) == 1 for values in lines.values()):
            for name, values in lines.items():
                axis.barh(
                    name, next(iter(values.values())), color="0.4" if name.startswith(("stock", "floor")) else None
                )
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
    save_figure(figure, picture)
    return picture


def _runs(result: dict[str, Any]) -> list[tuple[str, str, str, Lines]]:
    def lines(key: str, scale: float) -> Lines:
        found: Lines = {}
        for run in result["runs"]:
            for method, value in run[key].items():
                found.setdefault(method, {})[run["setting"]["latent"][1]] = value * scale
        return found

    panels = [("mean UNet call of a 50-step schedule", "latent cells a side", "s", lines("schedule", 1))]
    if any(run["memory"] for run in result["runs"]):
        panels.append(("peak memory", "latent cells a side", "GiB", lines("memory", 2**-30)))
    return panels


def _layers(result: dict[str, Any]) -> list[tuple[str, str, str, Lines]]:
    def lines(values: dict[str, dict[str, float]], exponents: dict[str, float], scale: float) -> Lines:
        return {
            f"{name} (exponent {exponents[name]:.2f})": {int(n): value * scale for n, value in row.items()}
            for name, row in values.items()
        }

    panels = [("one self-attention layer", "tokens", "ms", lines(result["layers"], result["exponents"], 1000))]
    if "memory" in result:
        memory = lines(result["memory"], result["memory_exponents"], 2**-20)
        panels.append(("memory of a call", "tokens", "MiB", memory))
    return panels


def _logarithmic(axis: "Axes", counts: list[int]) -> None:
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False, fontsize=9)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(counts, [f"{n:,}" for n in counts])
    axis.minorticks_off()
    axis.yaxis.set_major_formatter("{x:,g}")


def _bars(kinds: dict[str, dict[str, float]], picture: Path) -> Path:
    """Stacked bars: where the time of each kind of call goes."""
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(9.6, 0.6 * len(kinds) + 1.8), layout="constrained")
    names, left = list(kinds), [0.0] * len(kinds)
    for part in next(iter(kinds.values())):
        values = [1000 * kinds[name][part] for name in names]
        axis.barh(names, values, left=left, label=part, color="0.85" if part.startswith("rest") else None)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axis.invert_yaxis()
    axis.set(xlabel="ms per UNet call")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    save_figure(figure, picture)
    return picture
