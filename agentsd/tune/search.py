"""The front of all combinations: choices whose times and errors add up."""

from collections.abc import Sequence
from typing import NamedTuple

# (part, level or "steps", name of the candidate), for everything that is not stock.
Choice = tuple[tuple[int, int | str, str], ...]


class Point(NamedTuple):
    """A choice and what it costs.

    Attributes:
        time: in stock UNet calls.
        error: expected squared error of the image.
    """

    time: float
    error: float
    choice: Choice = ()


def pareto(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats in both time and error, fastest first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: p[:2]):
        if not best or point.error < best[-1].error:
            best.append(point)
    return best


def sums(groups: Sequence[Sequence[Point]]) -> list[Point]:
    """The front of all sums of one point of each group."""
    front = [Point(0.0, 0.0)]
    for group in groups:
        front = pareto([Point(a.time + b.time, a.error + b.error, a.choice + b.choice) for a in front for b in group])
    return front


def search(parts: Sequence[Sequence[Sequence[Sequence[Point]]]]) -> list[Point]:
    """The front of all combinations, exactly.

    Args:
        parts: for each part of the schedule its alternatives, each of them groups of which one point each is taken.
    """
    return sums([pareto([point for groups in part for point in sums(groups)]) for part in parts])
