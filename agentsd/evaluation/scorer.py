"""What is measured of pictures: features of networks, closeness to stock, and what the prompt asks for."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, repeat
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm.auto import tqdm

from agentsd.demo import checker
from agentsd.demo.checker import AttributeChecker
from agentsd.demo.scenes import Scene, parse, render
from agentsd.evaluation import metrics, networks
from agentsd.evaluation.metrics import Statistics
from agentsd.evaluation.networks import Network, Weights, require
from agentsd.evaluation.pictures import content_hash, list_pictures, read_batches
from agentsd.evaluation.protocols import Reference, Scores, reference_scenes
from agentsd.results import write_bytes

MS_SSIM_SIDE = 176  # five halvings and a window of 11


@dataclass(frozen=True)
class Features:
    """n×d features of n pictures, and n×classes logits where the network has them."""

    values: Tensor
    logits: Tensor | None = None


class Scorer:
    """Measures what the scores of a protocol need; every network is loaded once, at the start.

    Args:
        scores, weights, device: what to measure with which weights, and where.
        cache: folder for features, by the hash of what they are of.
        batch: pictures at once.
        quiet: no progress bar.

    Raises:
        ValueError: a library or weights are not there.
    """

    def __init__(
        self, scores: Scores, weights: Weights, device: torch.device, cache: Path, batch: int = 32, quiet: bool = False
    ) -> None:
        self.scores, self.device, self.cache, self.batch, self.quiet = scores, device, cache, batch, quiet
        require(*["torch_fidelity"] * bool(scores.features), *["torchmetrics"] * bool(scores.pairs))
        self.networks = [networks.load_network(name, weights, scores.dinov2, device) for name in scores.features]
        self.clip = networks.load_clip(weights.clip or scores.clip, device) if "clip" in scores.adherence else None
        self.distances: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
        for name in scores.pairs:
            if name == "lpips":
                self.distances[name] = networks.load_lpips(scores.lpips, weights.lpips, device)
            elif name == "checker":
                self.distances[name] = networks.load_checker_distance(device)
            else:
                self.distances[name] = partial(metrics.pair_distances, name)
        self.checker = AttributeChecker.load().to(device) if "attributes" in scores.adherence else None

    def check_number(self, images: int) -> None:
        """Raise ValueError if there are fewer images than features and nobody has allowed it."""
        for network in self.networks:
            if images <= network.size and not self.scores.allow_singular:
                raise ValueError(
                    f"{images} images are too few for a Fréchet distance in {network.size} features of {network.name}: "
                    "the covariance is singular; take more, or allow_singular (--allow-singular)"
                )

    def _bar(self, batches: Iterable[Tensor], title: str) -> Iterator[Tensor]:
        with tqdm(unit="image", desc=title, disable=self.quiet) as bar:
            for images in batches:
                yield images
                bar.update(len(images))

    @torch.inference_mode()
    def _features(self, network: Network, key: str, batches: Iterable[Tensor], title: str) -> Features:
        """Read features from the cache, or extract them and keep them there."""
        file = self.cache / f"{key}.safetensors"
        try:
            return Features(**load_file(file))
        except (OSError, SafetensorError):
            pass
        parts = [network.extract(images) for images in self._bar(batches, f"{title}: {network.name}")]
        found = {"values": torch.cat([values.cpu() for values, _ in parts])}
        if logits := [logits.cpu() for _, logits in parts if logits is not None]:
            found["logits"] = torch.cat(logits)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, save(found))
        return Features(**found)

    def features(self, network: Network, paths: Sequence[Path], title: str) -> Features:
        return self._features(network, content_hash(paths, network.tag), read_batches(paths, self.batch), title)

    def reference(self, network: Network, reference: Reference, where: Path | None) -> Statistics:
        """The reference in the features of a network.

        Raises:
            ValueError: there is none where it should be, or it is another network's.
        """
        batches: Iterable[Tensor]
        if reference.source == "scenes":
            scenes = reference_scenes(reference)
            key = content_hash([], network.tag, repr(scenes), str(reference.seed))
            batches = _rendered(scenes, reference.seed)
        elif where is None:
            raise ValueError(
                "the reference is missing: --reference names a folder of pictures or an .npz of statistics"
            )
        elif where.suffix == ".npz":
            return read_statistics(where, network)
        else:
            paths = list_pictures(where, reference.per_class, reference.number)
            key = content_hash(paths, f"{network.tag} {reference.size} {reference.convert}")
            batches = read_batches(paths, self.batch, reference.size, reference.convert)
        return Statistics.of(self._features(network, key, batches, "reference").values)

    @torch.inference_mode()
    def numbers(
        self, paths: Sequence[Path], stock: Sequence[Path] | None, prompts: Sequence[str] | None, title: str
    ) -> dict[str, list[Any]]:
        """What is measured of each picture: by name of the distance to its stock picture, `clip`, and attributes.

        Of an attribute it is how much is right, in per cent, of how much the prompt asks for.
        """
        distances = self.distances if stock is not None else {}
        clip, reader = (self.clip, self.checker) if prompts is not None else (None, None)
        found: dict[str, list[Any]] = defaultdict(list)
        if not (distances or clip or reader):
            return found
        others = read_batches(stock, self.batch) if stock is not None and distances else repeat(None)
        batches = self._bar(read_batches(paths, self.batch), title)
        for start, images, other in zip(count(0, self.batch), batches, others, strict=False):
            if other is not None:
                (height, width), sides = images.shape[2:], tuple(other.shape[2:])
                if (height, width) != sides:
                    raise ValueError(
                        f"{paths[start]} has {width}×{height} pixels, its stock image {sides[1]}×{sides[0]}; "
                        "pairs must have the same size"
                    )
                for name, distance in distances.items():
                    if name != "ms-ssim" or min(sides) >= MS_SSIM_SIDE:
                        found[name] += distance(images, other).tolist()
            asked = list(prompts[start : start + len(images)]) if prompts is not None else []
            if clip:
                found["clip"] += clip(images, asked).tolist()
            scenes = reader.read(images.to(self.device).float() / 255) if reader else []
            for prompt, scene in zip(asked, scenes, strict=False):
                for name, rights in checker.score(parse(prompt), scene).items():
                    found[f"attributes_{name}"].append((100 * sum(rights), len(rights)))
        return found


def _rendered(scenes: list[Scene], seed: int, batch: int = 32) -> Iterator[Tensor]:
    for start in range(0, len(scenes), batch):
        images, _ = render(scenes[start : start + batch], seed=(seed << 20) + start)
        yield (images * 255).round().to(torch.uint8)


def read_statistics(path: Path, network: Network) -> Statistics:
    """Mean and covariance from an .npz file as pytorch-fid writes it.

    Raises:
        ValueError: it is none, or of another network.
    """
    try:
        with np.load(path) as file:
            mean, covariance = np.array(file["mu"], np.float64), np.array(file["sigma"], np.float64)
    except (ValueError, KeyError, EOFError, BadZipFile):
        raise ValueError(
            f"{path} does not hold statistics: it must have mu and sigma, as pytorch-fid writes them"
        ) from None
    if mean.shape != (network.size,) or covariance.shape != (network.size, network.size):
        raise ValueError(f"{path} is of {mean.size} features; {network.name} has {network.size}: another network's")
    return Statistics(mean, covariance)
