"""Plots of measurements."""

from pathlib import Path
from typing import Any


def draw(result: dict[str, Any], output: Path) -> Path:
    """Plot a result of agentsd-bench beside its JSON file; returns the picture's path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels: list[tuple[str, str, str, dict[str, dict[int, float]]]] = []
    if "layers" in result:
        times = {
            f"{name} (N^{result['exponents'][name]:.2f})": {int(n): 1000 * t for n, t in values.items()}
            for name, values in result["layers"].items()
        }
        panels.append(("one self-attention layer", "tokens", "ms", times))
        if "memory" in result:
            taken = {
                f"{name} (exponent {result['memory_exponents'][name]:.2f})": {
                    int(n): b / 2**20 for n, b in values.items()
                }
                for name, values in result["memory"].items()
            }
            panels.append(("memory of a call", "tokens", "MiB", taken))
    elif "parts" in result:
        return _bars(result["parts"], output)
    else:
        panels.append(
            ("mean UNet call of a 50-step schedule", "latent cells a side", "s", _lines(result, "schedule", 1))
        )
        if any(run["memory"] for run in result["runs"]):
            panels.append(("peak memory", "latent cells a side", "GiB", _lines(result, "memory", 2**-30)))
    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(6.4 * len(panels), 5.4 if "layers" in result else 4.4),
        squeeze=False,
        layout="constrained",
    )
    for axis, (title, across, unit, lines) in zip(axes[0], panels, strict=True):
        several = any(len(values) > 1 for values in lines.values())
        for name, values in lines.items():
            if several:
                style = {"stock": "k-", "floor": "k:"}.get(name.split(" (")[0], "-")
                axis.plot(list(values), list(values.values()), style, marker="o", label=name)
            else:
                axis.barh(name, next(iter(values.values())), color="0.4" if name in ("stock", "floor") else None)
        axis.set_title(title)
        if several:
            axis.set_ylabel(unit)
            axis.set_xlabel(across)
            if "layers" in result:
                axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False, fontsize=9)
                axis.set_xscale("log")
                axis.set_yscale("log")
                counts = list(next(iter(lines.values())))
                axis.set_xticks(counts, [f"{n:,}" for n in counts])
                axis.minorticks_off()
                axis.yaxis.set_major_formatter("{x:,g}")
            else:
                axis.legend()
        else:
            axis.set_xlabel(unit)
            axis.invert_yaxis()
        axis.grid(alpha=0.3)
    picture = output.with_suffix(".png")
    figure.savefig(picture, dpi=110)
    plt.close(figure)
    return picture


def _bars(kinds: dict[str, dict[str, float]], output: Path) -> Path:
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
    picture = output.with_suffix(".png")
    figure.savefig(picture, dpi=110)
    plt.close(figure)
    return picture


def _lines(result: dict[str, Any], key: str, scale: float) -> dict[str, dict[int, float]]:
    lines: dict[str, dict[int, float]] = {}
    for run in result["runs"]:
        for method, value in run[key].items():
            lines.setdefault(method, {})[run["setting"]["latent"][1]] = value * scale
    return lines


def draw_front(result: dict[str, Any], output: Path) -> Path:
    """Plot a result of agentsd-tune beside its configuration; returns the picture's path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7.2, 4.8), layout="constrained")
    front = [(speedup, error) for speedup, error, _ in result["front"] if error]
    axis.plot(*zip(*front, strict=True), "-", color="0.6", lw=1, marker=".", ms=3, label="predicted front")
    own = [one for one in result["verified"] if one["predicted"]]
    for one in own:
        (faster, error), measured = one["predicted"], (one["speedup"], one["error"])
        axis.plot([faster, measured[0]], [error, measured[1]], "-", color="C0", lw=0.6)
    axis.plot([o["speedup"] for o in own], [o["error"] for o in own], "o", color="C0", label="verified by whole images")
    for index, one in enumerate(one for one in result["verified"] if not one["predicted"]):
        axis.plot(one["speedup"], one["error"], "s", color=f"C{index + 2}", label=f"preset {one['name']}")
    best = next(one for one in own if one["name"] == result["chosen"])
    axis.plot(best["speedup"], best["error"], "*", color="C1", ms=16, label="chosen")
    if result["target"]["speedup"] is not None:
        axis.axvline(result["target"]["speedup"], color="k", ls=":", label="target")
    else:
        axis.axhline(result["target"]["error"], color="k", ls=":", label="target")
    axis.set(yscale="log", xlabel="speed of whole images, stock = 1", ylabel="root-mean-square error to stock, of 1")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    picture = output.with_suffix(".png")
    figure.savefig(picture, dpi=110)
    plt.close(figure)
    return picture
