"""How long the calls of a run took, and how much faster than stock each method is."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Timing:
    """One call of a pipeline: seconds for each image, and bytes of memory where the device counts them."""

    method: str
    indices: tuple[int, ...]
    seconds: float
    memory: int | None
    warm: bool


def timings(run_folder: Path) -> list[Timing]:
    """Every call that the processes of a run have logged, without lines that a kill has cut off."""
    found = []
    for file in sorted(run_folder.glob("timings-*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                values = json.loads(line)
            except ValueError:
                continue
            found.append(Timing(**values | {"indices": tuple(values["indices"])}))
    return found


def speeds(found: Sequence[Timing], methods: Sequence[str], stock: str, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Median seconds (and bytes) for an image, and the median ratio to stock on the same batches, with an interval.

    A method's first batch in a process counts only where there is no other.
    """
    warm = {timing.method for timing in found if timing.warm}
    by_batch: dict[str, dict[tuple[int, ...], Timing]] = {}
    for timing in found:
        if timing.warm or timing.method not in warm:
            by_batch.setdefault(timing.method, {})[timing.indices] = timing
    rng = np.random.default_rng(seed)
    result: dict[str, dict[str, Any]] = {}
    for method in methods:
        if not (batches := by_batch.get(method)):
            continue
        row: dict[str, Any] = {
            "seconds": statistics.median(timing.seconds for timing in batches.values()),
            "batches": len(batches),
        }
        if memory := [timing.memory for timing in batches.values() if timing.memory is not None]:
            row["memory"] = statistics.median(memory)
        base = by_batch.get(stock, {})
        if len(ratios := np.array([base[key].seconds / batches[key].seconds for key in batches if key in base])):
            drawn = np.median(rng.choice(ratios, (1000, len(ratios))), axis=1)
            row["speed"] = float(np.median(ratios))
            row["speed_interval"] = np.quantile(drawn, [0.025, 0.975]).tolist()
        result[method] = row
    return result
