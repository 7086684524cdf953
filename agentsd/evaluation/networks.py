"""The networks that look at images: loaded by well-kept libraries, from a file, a folder or the hub."""

import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agentsd.demo.checker import SIZE, AttributeChecker
from agentsd.pipelines import one_line


@dataclass(frozen=True)
class Weights:
    """Where the weights of a network are, if not where its library looks by itself: a file, a folder or a hub id.

    `inception` serves `pytorch-fid` too: both packages' downloads are the same file.
    """

    inception: Path | None = None
    lpips: Path | None = None
    clip: str | None = None
    dinov2: str | None = None


@dataclass(frozen=True)
class Network:
    """One of `protocols.NETWORKS` with the hash of its weights.

    `extract` makes B×size features of B×3×H×W bytes, and B×classes logits or None.
    """

    name: str
    size: int
    sha256: str
    extract: Callable[[Tensor], tuple[Tensor, Tensor | None]] = field(repr=False)

    @property
    def tag(self) -> str:
        """Name and weights in short."""
        return f"{self.name} {self.sha256[:16]}"


def load_network(name: str, weights: Weights, hub: str, device: torch.device) -> Network:
    """A network for features by its name, `hub` being the id of `dinov2` where `weights` does not say.

    Raises:
        ValueError: its library or its weights are not there.
    """
    load = {"inception": _inception, "pytorch-fid": _pytorch_fid, "dinov2": _dinov2, "checker": _checker}[name]
    model, size, features = load(weights, hub)
    model = model.to(device)

    def extract(images: Tensor) -> tuple[Tensor, Tensor | None]:
        found = features(images.to(device))
        return found if isinstance(found, tuple) else (found, None)

    return Network(name, size, state_hash(model), extract)


# A model, the number of its features, and its features (and logits) of bytes.
Loaded = tuple[nn.Module, int, Callable[[Tensor], Any]]


def _inception(weights: Weights, _: str) -> Loaded:
    require("torch_fidelity")
    from torch_fidelity.utils import create_feature_extractor

    path = weights.inception
    options = {"cuda": False, "verbose": False, "feature_extractor_weights_path": path and str(path)}
    with _loading("the weights of FID's Inception", path, "--inception-weights"):
        model = create_feature_extractor("inception-v3-compat", ["2048", "logits_unbiased"], **options)
    return model, 2048, model


def _pytorch_fid(weights: Weights, _: str) -> Loaded:
    require("pytorch_fid")
    from pytorch_fid.inception import FID_WEIGHTS_URL, InceptionV3

    path = weights.inception
    with _loading("the weights of FID's Inception", path, "--inception-weights"), _in_torch_hub(path, FID_WEIGHTS_URL):
        model = InceptionV3().eval()
    return model, 2048, lambda images: model(images.float() / 255)[0].flatten(1)


def _dinov2(weights: Weights, hub: str) -> Loaded:
    """The class token of 16×16 patches, as FD-DINOv2 takes it (Stein et al., NeurIPS 2023)."""
    from transformers import Dinov2Model

    model = _from_pretrained(Dinov2Model, weights.dinov2 or hub, "DINOv2", "--dinov2")
    side = 16 * model.config.patch_size
    mean, std = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))

    def features(images: Tensor) -> Tensor:
        x = F.interpolate(images.float() / 255, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        return model((x - mean.to(x)) / std.to(x)).last_hidden_state[:, 0]

    return model, model.config.hidden_size, features


def _checker(*_: Any) -> Loaded:
    model = AttributeChecker.load()
    return model, model.squeeze.out_features, lambda images: model.features(images.float() / 255)


def load_lpips(net: str, path: Path | None, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS of torchmetrics: B×3×H×W bytes twice → B distances; `path` holds torchvision's weights of `net`."""
    require("torchmetrics", "torchvision")
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
    from torchvision import models

    kinds = {"alex": models.AlexNet_Weights, "vgg": models.VGG16_Weights, "squeeze": models.SqueezeNet1_1_Weights}
    what, url = f"the weights of LPIPS's network {net}", kinds[net].DEFAULT.url
    with _loading(what, path, "--lpips-weights"), _in_torch_hub(path, url):
        metric = LearnedPerceptualImagePatchSimilarity(net_type=net, reduction="none", normalize=True).to(device)

    def distance(images: Tensor, stock: Tensor) -> Tensor:
        metric.reset()
        metric.update(images.to(device).float() / 255, stock.to(device).float() / 255)
        return metric.compute().reshape(-1)

    return distance


@contextmanager
def _loading(what: str, path: Path | None, option: str) -> Iterator[None]:
    """Context in which weights that are not there, are others, or run code when loaded are a ValueError."""
    if path is not None:
        if not path.is_file():
            raise ValueError(f"{option} {path} is not a file")
        try:
            torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # unpickling raises many kinds
            raise ValueError(f"{path} is not a file of weights ({one_line(error)})") from None
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise _absent(what, path, f"{option} names the file", error) from None


def _absent(what: str, path: Path | None, how: str, error: Exception) -> ValueError:
    if path is not None:
        return ValueError(f"{path} does not hold {what} ({one_line(error)})")
    reason = re.sub(r"[<>]", "", one_line(error))
    return ValueError(f"{what} is not on this machine and could not be downloaded ({reason}); {how}")


@contextmanager
def _in_torch_hub(path: Path | None, url: str) -> Iterator[None]:
    """Context in which torch's hub has already downloaded `url`, and it was the file `path`."""
    if path is None:
        yield
        return
    before = torch.hub.get_dir()
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / "checkpoints" / os.path.basename(urlparse(url).path)
        link.parent.mkdir()
        link.symlink_to(path.resolve())
        torch.hub.set_dir(folder)
        try:
            yield
        finally:
            torch.hub.set_dir(before)


def load_checker_distance(device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS's formula on the attribute checker's layers, all weighted alike: B×3×H×W bytes twice → B distances.

    Squared differences of features of unit length over the channels, averaged over the positions and summed over the
    layers (Zhang et al., CVPR 2018, equation 1 with w = 1).
    """
    model = AttributeChecker.load().to(device)

    def layers(images: Tensor) -> list[Tensor]:
        x = F.interpolate(images.to(device).float() / 255, (SIZE, SIZE), mode="bilinear", antialias=True) - 0.5
        found = []
        for module in model.trunk:
            x = module(x)
            if isinstance(module, nn.ReLU):
                found.append(F.normalize(x, dim=1))
        return found

    def distance(images: Tensor, stock: Tensor) -> Tensor:
        pairs = zip(layers(images), layers(stock), strict=True)
        return torch.stack([(a - b).square().sum(1).mean((1, 2)) for a, b in pairs]).sum(0)

    return distance


def load_clip(source: str, device: torch.device) -> Callable[[Tensor, list[str]], Tensor]:
    """The CLIP score (Hessel et al., EMNLP 2021, without its factor 2.5): images and prompts → 100·max(cos, 0)."""
    from transformers import AutoProcessor, CLIPModel

    model = _from_pretrained(CLIPModel, source, "CLIP", "--clip").to(device)
    processor = _from_pretrained(AutoProcessor, source, "CLIP's processor", "--clip")
    length = model.config.text_config.max_position_embeddings

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        inputs = processor(
            text=prompts, images=list(images), return_tensors="pt", padding=True, truncation=True, max_length=length
        )
        out = model(**inputs.to(device))
        image, text = (F.normalize(x, dim=-1) for x in (out.image_embeds, out.text_embeds))
        return 100 * (image * text).sum(-1).clamp_min(0)

    return score


def _from_pretrained(kind: Any, source: str, what: str, option: str) -> Any:
    try:
        loaded = kind.from_pretrained(source)
    except Exception as error:  # the hub's client and safetensors raise many kinds
        folder = Path(source) if Path(source).is_dir() else None
        named = what if folder else f"{what} {source}"
        raise _absent(named, folder, f"{option} names a folder or a hub id", error) from None
    return loaded.eval().requires_grad_(False) if isinstance(loaded, nn.Module) else loaded


def state_hash(model: nn.Module) -> str:
    """The SHA-256 of a model's weights, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def require(*packages: str) -> None:
    """Raise ValueError, which says what to install, unless these packages of agentsd[eval] are installed."""
    for package in packages:
        if find_spec(package) is None:
            name = package.replace("_", "-")
            raise ValueError(f"this needs the package {name}: pip install 'agentsd[eval]'")
