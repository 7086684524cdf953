"""Distances between sets of images, their intervals, and distances between pairs.

The values come from torch-fidelity and torchmetrics; what is here is the resampling that says how far to trust them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
Counts = NDArray[np.int64]  # resamples×images: how often each image is in each resample
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A value of the images, and the same of each resample of them (none where there is no interval)."""

    value: float
    resampled: Array = field(default_factory=lambda: np.empty(0))

    def interval(self) -> tuple[float, float] | None:
        """Where the value would lie with other images of the same kind and number, in 95 of 100 cases.

        Resampling raises distances as having fewer images does, so its quantiles are taken around its own mean.
        """
        if not len(self.resampled):
            return None
        low, high = np.quantile(self.resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) - self.resampled.mean()
        return self.value + float(low), self.value + float(high)

    def minus(self, other: "Estimate") -> "Estimate":
        """The difference to another one, whose resamples are the same images'."""
        return Estimate(self.value - other.value, self.resampled - other.resampled)

    def times(self, factor: float) -> "Estimate":
        return Estimate(factor * self.value, factor * self.resampled)


def resamples(images: int, count: int, seed: int = 0) -> Counts:
    """How often each image is in each resample, count×images: the same for every method, for the same seeds make
    their images."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(images, np.full(images, 1 / images), size=count)


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of reference features, and the features where they are known."""

    mean: Array
    covariance: Array
    features: Tensor | None = None

    @classmethod
    def of(cls, features: Tensor) -> "Statistics":
        """Of n×d features, by torch-fidelity."""
        from torch_fidelity.metric_fid import fid_features_to_statistics

        found = fid_features_to_statistics(features.double())
        return cls(found["mu"], found["sigma"], features)


def frechet_distance(features: Tensor, reference: Statistics) -> float:
    """The Fréchet distance of two Gaussians with the moments of the features, by torch-fidelity (FID)."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    second = {"mu": reference.mean, "sigma": reference.covariance}
    return next(iter(fid_statistics_to_metric(fid_features_to_statistics(features.double()), second, False).values()))


def frechet(features: Tensor, reference: Statistics, counts: Counts, device: torch.device) -> Estimate:
    """The Fréchet distance of n×d features to a reference, of the images and of each resample.

    `tr √(Σ Σ_r)` is the sum of the singular values of `√w (x − mean) √Σ_r / √(n − 1)`, whose squares are eigenvalues
    of the smaller of its two Gram matrices.
    """
    center, covariance = (torch.from_numpy(array).to(device) for array in (reference.mean, reference.covariance))
    values, vectors = torch.linalg.eigh(covariance)
    every = features.double().to(device)
    turned = every @ (vectors * values.clamp_min(0).sqrt() @ vectors.T)

    def resampled(row: Tensor) -> float:
        drawn = row > 0
        weights, x, y = row[drawn].double()[:, None], every[drawn], turned[drawn]
        count = weights.sum()
        mean = (weights * x).sum(0) / count
        spread = (weights * (x - mean).square()).sum() / (count - 1)
        z = weights.sqrt() * (y - (weights * y).sum(0) / count) / (count - 1).sqrt()
        gram = z @ z.T if len(z) < z.shape[1] else z.T @ z
        root = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().sum()
        return float((mean - center).square().sum() + spread + covariance.trace() - 2 * root)

    found = [resampled(row) for row in torch.from_numpy(counts).to(device)]
    return Estimate(frechet_distance(features, reference), np.array(found))


def kernel(features: Tensor, reference: Tensor, counts: Counts, subsets: int, subset_size: int) -> Estimate:
    """The squared maximum mean discrepancy of n×d features to a reference with KID's polynomial kernel.

    The value is torch-fidelity's mean over subsets; the resamples are of all images.
    """
    from torch_fidelity.metric_kid import kernel_poly, kid_features_to_metric

    features, reference, n = features.double(), reference.double(), len(features)
    size = min(subset_size, n, len(reference))
    found = kid_features_to_metric(features, reference, kid_subsets=subsets, kid_subset_size=size, verbose=False)
    x, r, weights = features.numpy(), reference.numpy(), counts.astype(np.float64)
    inner, cross = kernel_poly(x, x), kernel_poly(x, r).mean(1)
    # An image that is drawn twice is no pair with itself; what depends on the reference alone is the same for all.
    pairs = ((weights @ inner) * weights).sum(1) - weights**2 @ inner.diagonal()
    resampled = pairs / np.maximum(n**2 - (weights**2).sum(1), 1) - 2 * weights @ cross / n
    return Estimate(float(found["kernel_inception_distance_mean"]), resampled)


def inception_score(logits: Tensor, splits: int) -> float:
    """By torch-fidelity."""
    from torch_fidelity.metric_isc import isc_features_to_metric

    return float(isc_features_to_metric(logits, splits=min(splits, len(logits)))["inception_score_mean"])


def precision_recall(features: Tensor, reference: Tensor, neighbours: int) -> tuple[float, float]:
    """Share of the images within the reference's manifold, and the other way round (Kynkäänniemi et al., 2019)."""
    from torch_fidelity.metric_prc import prc_features_to_metric

    k = min(neighbours, len(features) - 1, len(reference) - 1)
    found = prc_features_to_metric(features.double(), reference.double(), prc_neighborhood=k, verbose=False)
    return found["precision"], found["recall"]


def mean(values: Sequence[float] | Array, counts: Counts) -> Estimate:
    """The mean of a number for each image."""
    return share(values, np.ones(len(values)), counts)


def share(parts: Sequence[float] | Array, totals: Sequence[float] | Array, counts: Counts) -> Estimate:
    """The sum of one number for each image over the sum of another: what is right of what was asked."""
    part, total = np.asarray(parts, np.float64), np.asarray(totals, np.float64)
    return Estimate(float(part.sum() / total.sum()), (counts @ part) / (counts @ total))


def median(values: Sequence[float] | Array, counts: Counts) -> Estimate:
    """The median of a number for each image."""
    numbers = np.asarray(values, np.float64)
    resampled = [float(np.median(np.repeat(numbers, row))) for row in counts]
    value = float(np.median(numbers))
    return Estimate(value, np.array(resampled)) if np.isfinite(resampled).all() else Estimate(value)


def pair_distances(name: str, images: Tensor, stock: Tensor) -> Tensor:
    """PSNR in dB (infinite for equal pictures), SSIM or MS-SSIM of B×3×H×W bytes, by torchmetrics: B values."""
    from torchmetrics.functional import image as measures

    options: dict[str, Any] = {"data_range": 1.0, "reduction": "none"}
    first, second = images.float() / 255, stock.float() / 255
    if name == "psnr":
        return measures.peak_signal_noise_ratio(first, second, **options, dim=(1, 2, 3))
    ssim = measures.structural_similarity_index_measure
    measure = ssim if name == "ssim" else measures.multiscale_structural_similarity_index_measure
    return measure(first, second, **options).reshape(-1)
