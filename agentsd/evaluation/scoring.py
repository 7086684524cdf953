"""From images to scores: every metric of a protocol, for every method, with its interval and its distance to stock."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from agentsd.evaluation import metrics
from agentsd.evaluation.columns import columns
from agentsd.evaluation.metrics import Estimate, Statistics, resamples
from agentsd.evaluation.networks import Network
from agentsd.evaluation.protocols import Reference
from agentsd.evaluation.scorer import Features, Scorer

SHOWN = 24


def score(
    sets: dict[str, list[Path]],
    scorer: Scorer,
    *,
    prompts: Sequence[str] | None = None,
    reference: Reference | None = None,
    where: Path | None = None,
) -> dict[str, Any]:
    """Score sets of images of the same prompts and seeds.

    Args:
        sets, scorer: name of the method → its images, the first stock's; and what measures them.
        prompts: one for each image.
        reference, where: what the set of images is compared with, and the folder or statistics of real images.

    Returns:
        `columns`, and for each method its `scores` and its most different `pictures`; ready for JSON.

    Raises:
        ValueError: sets do not match, or a picture is not as the others.
    """
    stock = next(iter(sets))
    number = len(sets[stock])
    for name, paths in sets.items():
        if len(paths) != number:
            raise ValueError(f"{name} has {len(paths)} images, {stock} {number}; there must be as many of each")
    scorer.check_number(number)
    counts = resamples(number, scorer.scores.bootstrap)
    found: dict[str, dict[str, Estimate]] = {name: {} for name in sets}
    closeness: dict[str, dict[str, list[float]]] = {}
    for name, paths in sets.items():
        numbers = scorer.numbers(paths, None if name == stock else sets[stock], prompts, name)
        closeness[name] = {key: numbers[key] for key in scorer.distances if key in numbers}
        for key, values in numbers.items():
            if key.startswith("attributes_"):
                right, asked = zip(*values, strict=True)
                found[name][key] = metrics.share(right, asked, counts)
            else:
                found[name][key] = (metrics.median if key == "psnr" else metrics.mean)(values, counts)
        if "psnr" in numbers:
            found[name]["psnr_worst"] = Estimate(min(numbers["psnr"]))
    for network in scorer.networks:
        assert reference is not None
        known = scorer.reference(network, reference, where)
        features = {name: scorer.features(network, paths, name) for name, paths in sets.items()}
        for name, distances in _distances(network, features, known, scorer, counts).items():
            found[name] |= distances
    shown = [column for column in columns(scorer.scores) if any(column.key in row for row in found.values())]
    rows = []
    for name, estimates in found.items():
        base = {} if name == stock else found[stock]
        keys = [column.key for column in shown if column.key in estimates]
        scores = {key: described(estimates[key], base.get(key)) for key in keys}
        pictures = _most_different(closeness[name], number)
        rows.append({"method": name, "images": number, "scores": scores, "pictures": pictures})
    return {"columns": [asdict(column) for column in shown], "methods": rows}


def _distances(
    network: Network, features: dict[str, Features], known: Statistics, scorer: Scorer, counts: Any
) -> dict[str, dict[str, Estimate]]:
    """The scores of each method in the features of one network."""
    scores, name = scorer.scores, network.name
    if name == "checker":
        known, features = _standardised(known, features)
    result = {}
    for method, seen in tqdm(features.items(), desc=f"{name}: intervals", disable=scorer.quiet):
        found = {f"{name}_frechet": metrics.frechet(seen.values, known, counts, scorer.device)}
        if known.features is not None and name != "pytorch-fid":
            distance = metrics.kernel(seen.values, known.features, counts, scores.kid_subsets, scores.kid_subset_size)
            found[f"{name}_kernel"] = distance.times(1000)
            if name != "checker":
                precision, recall = metrics.precision_recall(seen.values, known.features, scores.neighbours)
                found |= {f"{name}_precision": Estimate(precision), f"{name}_recall": Estimate(recall)}
        if seen.logits is not None:
            found["inception_score"] = Estimate(metrics.inception_score(seen.logits, scores.splits))
        result[method] = found
    return result


def _standardised(known: Statistics, features: dict[str, Features]) -> tuple[Statistics, dict[str, Features]]:
    """Centre features on the reference's mean and scale them by one number, its mean standard deviation.

    The checker's features have a scale of no meaning, and the kernel distance depends on it; so a Fréchet distance of
    1 is the variance of one feature of the reference.
    """
    scale = float(np.sqrt(known.covariance.diagonal().mean()))
    mean = torch.from_numpy(known.mean)
    moved = {name: Features((seen.values.double() - mean) / scale, seen.logits) for name, seen in features.items()}
    if known.features is None:
        return Statistics(known.mean * 0, known.covariance / scale**2), moved
    return Statistics.of((known.features.double() - mean) / scale), moved


def described(estimate: Estimate, stock: Estimate | None) -> dict[str, Any]:
    """A value with its interval, and its difference to stock's, which is `noise` where the interval holds 0."""
    found: dict[str, Any] = {"value": _finite(estimate.value)}
    if interval := estimate.interval():
        found["interval"] = list(interval)
    if stock is not None and len(stock.resampled) and len(estimate.resampled):
        difference = estimate.minus(stock)
        low, high = difference.interval() or (0.0, 0.0)
        found["difference"] = {"value": difference.value, "interval": [low, high], "noise": low <= 0 <= high}
    return found


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _most_different(closeness: dict[str, list[float]], number: int) -> list[dict[str, Any]]:
    """The images furthest from their stock images; the first ones where nothing is compared."""
    for key, sign in (("lpips", -1), ("checker", -1), ("psnr", 1), ("ssim", 1)):
        if values := closeness.get(key):
            order = sorted(range(number), key=lambda index: sign * values[index])
            keys = [key, *(["psnr"] if "psnr" in closeness else [])]
            return [{"index": i} | {name: _finite(closeness[name][i]) for name in keys} for i in order[:SHOWN]]
    return [{"index": index} for index in range(min(number, SHOWN))]
