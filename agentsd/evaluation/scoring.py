"""From images to scores: every metric of a protocol, for every method, with its interval and its distance to stock."""

import io
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from agentsd.evaluation import metrics
from agentsd.evaluation.files import content_hash, pictures, read_batches, write_bytes
from agentsd.evaluation.generation import Timing
from agentsd.evaluation.metrics import Estimate, Statistics, resamples
from agentsd.evaluation.networks import (
    Network,
    Weights,
    load_checker_distance,
    load_clip,
    load_lpips,
    load_network,
    needs,
)
from agentsd.evaluation.protocols import Protocol, Reference, Scores, reference_scenes

MS_SSIM_SIDE = 176  # five halvings and a window of 11
PICTURED = 24


@dataclass(frozen=True)
class Column:
    """A score in the tables.

    Attributes:
        key: its name in JSON.
        label: its name in tables.
        better: `less`, `more`, or empty where neither is.
        digits: after the point.
        about: one sentence.
    """

    key: str
    label: str
    better: str
    digits: int
    about: str


def columns(scores: Scores) -> list[Column]:
    """The scores of a protocol, in the order of the tables; a folder may lack some."""
    found = []
    names = {
        "inception": ("FID", "KID ×1000", "Inception"),
        "pytorch-fid": ("FID (pytorch-fid)", "", "Inception, as pytorch-fid feeds it"),
        "dinov2": ("FD-DINOv2", "KD-DINOv2 ×1000", "DINOv2"),
        "checker": ("Fréchet distance (checker)", "kernel distance (checker) ×1000", "the embedded attribute checker"),
    }
    for network in scores.features:
        first, second, where = names[network]
        about = f"to the reference in features of {where}"
        found.append(Column(f"{network}_frechet", first, "less", 2, f"Fréchet distance {about}"))
        if second:
            found.append(Column(f"{network}_kernel", second, "less", 3, f"kernel distance {about}"))
        if network == "inception":
            found.append(Column("inception_score", "IS", "more", 2, "inception score"))
        if network in ("inception", "dinov2"):
            found += [
                Column(f"{network}_precision", f"precision ({where})", "more", 3, "share within the reference"),
                Column(f"{network}_recall", f"recall ({where})", "more", 3, "share of the reference that is covered"),
            ]
    if "clip" in scores.adherence:
        found.append(Column("clip", "CLIP score", "more", 2, f"100 × cosine of image and prompt, {scores.clip}"))
    if "attributes" in scores.adherence:
        about = "images in which the attribute checker finds all that is asked for, and nothing else"
        found.append(Column("attributes_all", "all right, %", "more", 1, about))
    labels = {
        "psnr": Column("psnr", "PSNR, dB", "more", 1, "to the stock image of the same seed, median"),
        "ssim": Column("ssim", "SSIM", "more", 4, "to the stock image of the same seed"),
        "ms-ssim": Column("ms-ssim", "MS-SSIM", "more", 4, "to the stock image of the same seed"),
        "lpips": Column("lpips", f"LPIPS ({scores.lpips})", "less", 4, "to the stock image of the same seed"),
        "checker": Column(
            "checker",
            "checker distance",
            "less",
            4,
            "LPIPS's formula on the attribute checker's layers, to the stock image",
        ),
    }
    found += [labels[name] for name in scores.pairs]
    if "psnr" in scores.pairs:
        found.append(Column("psnr_worst", "worst PSNR, dB", "more", 1, "of any image to its stock image"))
    if "attributes" in scores.adherence:
        from agentsd.demo.checker import ATTRIBUTES

        for name in ATTRIBUTES:
            about = f"share of what is asked for that the attribute checker reads: {name}"
            found.append(Column(f"attributes_{name}", f"{name}, %", "more", 1, about))
    return found


@dataclass
class Pictured:
    """What is known of the images of one method, one by one."""

    features: dict[str, Tensor] = field(default_factory=dict)
    logits: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, list[float]] = field(default_factory=dict)
    wholes: dict[str, list[float]] = field(default_factory=dict)


class Scorer:
    """Loads what a protocol's scores need, once, and says so in one sentence where it is not there.

    Args:
        scores: what to measure.
        weights: where the networks' weights are.
        device: where they compute.
        cache: folder for features and reference statistics, by the hash of what they are of.
        batch: pictures at once.
        quiet: no progress bar.

    Raises:
        ValueError: a library or weights are not there.
    """

    def __init__(
        self,
        scores: Scores,
        weights: Weights,
        device: torch.device,
        cache: Path,
        batch: int = 32,
        quiet: bool = False,
    ) -> None:
        self.scores, self.device, self.cache, self.batch, self.quiet = scores, device, cache, batch, quiet
        if scores.features:
            with needs("torch_fidelity", "eval"):
                import torch_fidelity  # noqa: F401
        if scores.pairs:
            with needs("torchmetrics", "eval"):
                import torchmetrics  # noqa: F401
        self.networks = [load_network(name, weights, scores.dinov2, device) for name in scores.features]
        self.clip = load_clip(weights.clip or scores.clip, device) if "clip" in scores.adherence else None
        self.distances: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
        for name in scores.pairs:
            if name == "lpips":
                self.distances[name] = load_lpips(scores.lpips, weights.lpips, device)
            elif name == "checker":
                self.distances[name] = load_checker_distance(weights.checker, device)
            else:
                self.distances[name] = partial(metrics.pair_distances, name)
        self.checker = None
        if "attributes" in scores.adherence:
            from agentsd.demo.checker import AttributeChecker

            self.checker = AttributeChecker.load(weights.checker).to(device)

    def check_number(self, images: int) -> None:
        """Raise ValueError if there are fewer images than features and nobody has allowed it."""
        for network in self.networks:
            if images <= network.size and not self.scores.allow_singular:
                raise ValueError(
                    f"{images} images are too few for a Fréchet distance in {network.size} features of {network.name}: "
                    "the covariance is singular; take more, or allow_singular (--allow-singular)"
                )

    @torch.inference_mode()
    def look(
        self, paths: Sequence[Path], stock: Sequence[Path] | None, prompts: Sequence[str] | None, title: str
    ) -> Pictured:
        """Everything that is measured of each image, or of each with its stock image."""
        found = Pictured()
        left = []
        for network in self.networks:
            file = self.cache / f"{content_hash(paths, network.tag)}.npz"
            if not _load_features(file, network, found):
                left.append((network, file))
        if not left and stock is None and prompts is None:
            return found
        collected: dict[str, list[tuple[Tensor, Tensor | None]]] = {network.name: [] for network, _ in left}
        others: Iterator[Tensor | None] = iter(read_batches(stock, self.batch)) if stock else iter(lambda: None, 0)
        with tqdm(total=len(paths), unit="image", desc=title, disable=self.quiet) as bar:
            for number, (images, other) in enumerate(zip(read_batches(paths, self.batch), others, strict=False)):
                for network, _ in left:
                    features, logits = network.extract(images)
                    collected[network.name].append((features.cpu(), None if logits is None else logits.cpu()))
                if other is not None:
                    self._pair(found, images, other, paths[number * self.batch])
                if prompts is not None:
                    part = list(prompts[number * self.batch : number * self.batch + len(images)])
                    self._read(found, images, part)
                bar.update(len(images))
        for network, file in left:
            parts = collected[network.name]
            found.features[network.name] = torch.cat([features for features, _ in parts])
            if parts[0][1] is not None:
                found.logits[network.name] = torch.cat([logits for _, logits in parts if logits is not None])
            _save_features(file, network, found)
        return found

    def _pair(self, found: Pictured, images: Tensor, stock: Tensor, path: Path) -> None:
        if images.shape != stock.shape:
            raise ValueError(
                f"{path} has {images.shape[3]}×{images.shape[2]} pixels, its stock image {stock.shape[3]}×"
                f"{stock.shape[2]}; pairs must have the same size"
            )
        for name, distance in self.distances.items():
            if name != "ms-ssim" or min(images.shape[2:]) >= MS_SSIM_SIDE:
                found.values.setdefault(name, []).extend(distance(images, stock).tolist())

    def _read(self, found: Pictured, images: Tensor, prompts: list[str]) -> None:
        if self.clip is not None:
            found.values.setdefault("clip", []).extend(self.clip(images, prompts).tolist())
        if self.checker is not None:
            from agentsd.demo.checker import score
            from agentsd.demo.scenes import parse

            seen = self.checker.read(images.to(self.device).float() / 255)
            for prompt, scene in zip(prompts, seen, strict=True):
                for name, rights in score(parse(prompt), scene).items():
                    found.values.setdefault(f"attributes_{name}", []).append(100 * sum(rights))
                    found.wholes.setdefault(f"attributes_{name}", []).append(len(rights))

    @torch.inference_mode()
    def reference(
        self, network: Network, reference: Reference, where: Path | None, protocol: Protocol | None
    ) -> Statistics:
        """The reference in the features of a network.

        Raises:
            ValueError: there is none where it should be, or it is another network's.
        """
        if reference.source == "scenes":
            assert protocol is not None
            return self._of_scenes(network, protocol)
        if where is None:
            raise ValueError(
                "the reference is missing: --reference names a folder of pictures or an .npz of statistics"
            )
        if where.suffix == ".npz":
            return read_statistics(where, network)
        paths = pictures(where, reference.per_class, reference.number)
        tag = f"{network.tag} {reference.size} {reference.convert}"
        file = self.cache / f"{content_hash(paths, tag)}.npz"
        found = Pictured()
        if not _load_features(file, network, found):
            parts = []
            with tqdm(total=len(paths), unit="image", desc=f"reference, {network.name}", disable=self.quiet) as bar:
                for images in read_batches(paths, self.batch, reference.size, reference.convert):
                    parts.append(network.extract(images)[0].cpu())
                    bar.update(len(images))
            found.features[network.name] = torch.cat(parts)
            _save_features(file, network, found)
        return Statistics.of(found.features[network.name])

    def _of_scenes(self, network: Network, protocol: Protocol) -> Statistics:
        from agentsd.demo import scenes

        drawn = reference_scenes(protocol)
        file = self.cache / f"{content_hash([], network.tag, repr(drawn), str(protocol.reference.seed))}.npz"
        found = Pictured()
        if not _load_features(file, network, found):
            parts = []
            for start in tqdm(range(0, len(drawn), 32), unit="batch", desc="reference scenes", disable=self.quiet):
                images, _ = scenes.render(drawn[start : start + 32], seed=(protocol.reference.seed << 20) + start)
                parts.append(network.extract((images * 255).round().to(torch.uint8))[0].cpu())
            found.features[network.name] = torch.cat(parts)
            _save_features(file, network, found)
        return Statistics.of(found.features[network.name])


def read_statistics(path: Path, network: Network) -> Statistics:
    """Mean and covariance from an .npz file as pytorch-fid writes it.

    Raises:
        ValueError: it is none, or of another network.
    """
    try:
        with np.load(path) as file:
            mean, covariance = np.array(file["mu"], np.float64), np.array(file["sigma"], np.float64)
    except (ValueError, KeyError, EOFError, BadZipFile, OSError) as error:
        if isinstance(error, OSError) and error.strerror:
            raise
        raise ValueError(
            f"{path} does not hold statistics: it must have mu and sigma, as pytorch-fid writes them"
        ) from None
    if mean.shape != (network.size,) or covariance.shape != (network.size, network.size):
        raise ValueError(f"{path} is of {mean.size} features; {network.name} has {network.size}: another network's")
    return Statistics(mean, covariance)


def _load_features(file: Path, network: Network, found: Pictured) -> bool:
    try:
        with np.load(file) as there:
            found.features[network.name] = torch.from_numpy(there["features"])
            if "logits" in there:
                found.logits[network.name] = torch.from_numpy(there["logits"])
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return False
    return True


def _save_features(file: Path, network: Network, found: Pictured) -> None:
    stream = io.BytesIO()
    arrays = {"features": found.features[network.name].numpy()}
    if network.name in found.logits:
        arrays["logits"] = found.logits[network.name].numpy()
    np.savez(stream, allow_pickle=False, **arrays)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(file, stream.getvalue())


def score(
    sets: dict[str, list[Path]],
    scorer: Scorer,
    *,
    prompts: Sequence[str] | None = None,
    reference: Reference | None = None,
    where: Path | None = None,
    protocol: Protocol | None = None,
) -> dict[str, Any]:
    """Score sets of images of the same prompts and seeds.

    Args:
        sets: name of the method → its images; the first is stock, which the others are compared with.
        scorer: measures.
        prompts: one for each image.
        reference: what the images are compared with as a whole.
        where: folder or statistics of a reference of real images.
        protocol: for a reference of rendered scenes.

    Returns:
        `columns`, and for each method its `scores` and its most different `pictures`; ready for JSON.

    Raises:
        ValueError: sets do not match, or a picture is not as the others.
    """
    scores, names = scorer.scores, list(sets)
    number = len(sets[names[0]])
    for name, paths in sets.items():
        if len(paths) != number:
            raise ValueError(f"{name} has {len(paths)} images, {names[0]} {number}; there must be as many of each")
    if prompts is not None and len(prompts) != number:
        raise ValueError(f"there are {len(prompts)} prompts and {number} images; there must be as many of each")
    scorer.check_number(number)
    counts = resamples(number, scores.bootstrap)
    shown = columns(scores)
    estimates: dict[str, dict[str, Estimate]] = {name: {} for name in names}
    looked: dict[str, Pictured] = {}
    used = prompts if scores.adherence else None
    for position, name in enumerate(names):
        stock = sets[names[0]] if position and scores.pairs else None
        looked[name] = scorer.look(sets[name], stock, used, name)
    for network in scorer.networks:
        assert reference is not None
        known = scorer.reference(network, reference, where, protocol)
        if network.name == "checker":
            known = _standardised(network, known, looked)
        frechet = metrics.Frechet(known, counts, scorer.device)
        for name in tqdm(names, desc=f"{network.name}: intervals", disable=scorer.quiet):
            features = looked[name].features[network.name]
            estimates[name] |= _distances(network.name, features, known, frechet, counts, scores)
            if network.name in looked[name].logits:
                value = metrics.inception_score(looked[name].logits[network.name], scores.splits)
                estimates[name]["inception_score"] = Estimate(value, np.empty(0))
    for name in names:
        for key, values in looked[name].values.items():
            if key == "psnr":
                estimates[name]["psnr"] = metrics.median(values, counts)
                estimates[name]["psnr_worst"] = Estimate(min(values), np.empty(0))
            else:
                wholes = looked[name].wholes.get(key)
                estimates[name][key] = metrics.share(values, wholes, counts) if wholes else metrics.mean(values, counts)
    shown = [column for column in shown if any(column.key in found for found in estimates.values())]
    rows = [
        {
            "method": name,
            "images": number,
            "scores": {
                column.key: _as_json(estimates[name][column.key], estimates[names[0]].get(column.key), position > 0)
                for column in shown
                if column.key in estimates[name]
            },
            "pictures": _most_different(looked[name], number),
        }
        for position, name in enumerate(names)
    ]
    return {
        "columns": [asdict(column) for column in shown],
        "methods": rows,
        "networks": {network.name: network.sha256 for network in scorer.networks},
    }


def _standardised(network: Network, known: Statistics, looked: dict[str, Pictured]) -> Statistics:
    """Centre features on the reference's mean and scale them by one number, its mean standard deviation.

    The checker's features have a scale of no meaning, and the kernel distance depends on it; so a Fréchet distance of
    1 is the variance of one feature of the reference.
    """
    scale = float(np.sqrt(known.covariance.diagonal().mean()))
    mean = torch.from_numpy(known.mean)
    for found in looked.values():
        found.features[network.name] = (found.features[network.name].double() - mean) / scale
    if known.features is None:
        return Statistics(known.mean * 0, known.covariance / scale**2)
    return Statistics.of((known.features.double() - mean) / scale)


def _distances(
    network: str,
    features: Tensor,
    known: Statistics,
    frechet: metrics.Frechet,
    counts: Any,
    scores: Scores,
) -> dict[str, Estimate]:
    found = {f"{network}_frechet": frechet(features)}
    if known.features is not None and network != "pytorch-fid":
        kernel = metrics.Kernel(known.features, counts, scores.kid_subsets, scores.kid_subset_size)(features)
        found[f"{network}_kernel"] = Estimate(1000 * kernel.value, 1000 * kernel.resampled)
        if network != "checker":
            precision, recall = metrics.precision_recall(features, known.features, scores.neighbours)
            found[f"{network}_precision"] = Estimate(precision, np.empty(0))
            found[f"{network}_recall"] = Estimate(recall, np.empty(0))
    return found


def _as_json(estimate: Estimate, stock: Estimate | None, compare: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"value": _number(estimate.value)}
    if interval := estimate.interval():
        found["interval"] = list(interval)
    if compare and stock is not None and len(stock.resampled) and len(estimate.resampled):
        difference = estimate.minus(stock)
        low, high = difference.interval() or (0.0, 0.0)
        found["difference"] = {"value": difference.value, "interval": [low, high], "noise": low <= 0 <= high}
    return found


def _number(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _most_different(looked: Pictured, number: int) -> list[dict[str, Any]]:
    """The images furthest from their stock images; the first ones where nothing is compared."""
    for key, most in (("lpips", True), ("checker", True), ("psnr", False), ("ssim", False)):
        if key in looked.values:
            values = looked.values[key]
            order = sorted(range(number), key=lambda index: -values[index] if most else values[index])
            psnr = looked.values.get("psnr")
            return [
                {"index": i, key: _number(values[i])} | ({"psnr": _number(psnr[i])} if psnr else {})
                for i in order[:PICTURED]
            ]
    return [{"index": index} for index in range(min(number, PICTURED))]


def speeds(found: Sequence[Timing], methods: Sequence[str], stock: str, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Median seconds (and bytes) for an image, and the median ratio to stock on the same batches, with an interval.

    A method's first batch in a process counts only where there is no other.
    """
    warm = {timing.method for timing in found if timing.warm}
    kept = [timing for timing in found if timing.warm or timing.method not in warm]
    by_batch: dict[str, dict[tuple[int, ...], float]] = {}
    for timing in kept:
        by_batch.setdefault(timing.method, {})[timing.indices] = timing.seconds
    rng = np.random.default_rng(seed)
    result: dict[str, dict[str, Any]] = {}
    for method in methods:
        own = by_batch.get(method)
        if not own:
            continue
        memory = [timing.memory for timing in kept if timing.method == method and timing.memory is not None]
        result[method] = {"seconds": statistics.median(own.values()), "batches": len(own)}
        if memory:
            result[method]["memory"] = statistics.median(memory)
        ratios = np.array([base / own[key] for key, base in by_batch.get(stock, {}).items() if key in own])
        if len(ratios):
            drawn = np.median(rng.choice(ratios, (1000, len(ratios))), axis=1)
            result[method]["speed"] = float(np.median(ratios))
            result[method]["speed_interval"] = [float(value) for value in np.quantile(drawn, [0.025, 0.975])]
    return result
