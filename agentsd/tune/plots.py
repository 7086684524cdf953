"""The front of the predictions and the configurations verified, as a plot."""

from pathlib import Path
from typing import Any

from agentsd.results import save_figure


def draw_front(result: dict[str, Any], path: Path) -> None:
    """Plot a result of agentsd-tune."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7.2, 4.8), dpi=110, layout="constrained")
    front = [(speedup, error) for speedup, error, _ in result["front"] if error]
    axis.plot(*zip(*front, strict=True), "-", color="0.6", lw=1, marker=".", ms=3, label="predicted front")
    tuned = [one for one in result["verified"] if one["predicted"]]
    for one in tuned:
        (speedup, error), measured = one["predicted"], (one["speedup"], one["error"])
        axis.plot([speedup, measured[0]], [error, measured[1]], "-", color="C0", lw=0.6)
    speedups, errors = [one["speedup"] for one in tuned], [one["error"] for one in tuned]
    axis.plot(speedups, errors, "o", color="C0", label="verified by whole images")
    for index, one in enumerate(one for one in result["verified"] if not one["predicted"]):
        axis.plot(one["speedup"], one["error"], "s", color=f"C{index + 2}", label=f"preset {one['name']}")
    best = next(one for one in tuned if one["name"] == result["chosen"])
    axis.plot(best["speedup"], best["error"], "*", color="C1", ms=16, label="chosen")
    if result["target"]["speedup"] is not None:
        axis.axvline(result["target"]["speedup"], color="k", ls=":", label="target")
    else:
        axis.axhline(result["target"]["error"], color="k", ls=":", label="target")
    axis.set(yscale="log", xlabel="speed of whole images, stock = 1", ylabel="root-mean-square error to stock, of 1")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    save_figure(figure, path)
