"""The attribute checker: a small convolutional network that reads a picture of a scene back into a `Scene`."""

from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from agentsd.demo.scenes import COLOURS, PLACES, SHAPES, SIZES, TEXTURES, Scene, Thing

SIZE = 128
ATTRIBUTES = ("shape", "colour", "size", "place", "background", "texture")


class AttributeChecker(nn.Module):
    """For each place a shape or none, a colour and a size; for the background a colour and a texture."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        channels = [3, width, width, 2 * width, 3 * width, 3 * width]
        layers: list[nn.Module] = []
        for inner, outer in pairwise(channels):
            layers += [nn.Conv2d(inner, outer, 3, 2, 1), nn.GroupNorm(8, outer), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.squeeze = nn.Linear(channels[-1] * 16, 64)
        self.thing_heads = nn.Linear(64, len(PLACES) * (1 + len(SHAPES) + len(COLOURS) + len(SIZES)))
        self.ground_heads = nn.Linear(64, len(COLOURS) + len(TEXTURES))

    def features(self, images: Tensor) -> Tensor:
        """B×3×H×W pictures in [0, 1] → B×64 features."""
        images = F.interpolate(images, (SIZE, SIZE), mode="bilinear", antialias=True)
        return self.squeeze(self.trunk(images - 0.5).flatten(1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Logits: shape B×5×6 (last: none), colour B×5×8, size B×5×2 per place; background colour B×8, texture B×4."""
        hidden = F.relu(self.features(images))
        things = self.thing_heads(hidden).unflatten(1, (len(PLACES), -1))
        shape, colour, size = things.split([1 + len(SHAPES), len(COLOURS), len(SIZES)], dim=-1)
        ground, texture = self.ground_heads(hidden).split([len(COLOURS), len(TEXTURES)], dim=-1)
        return shape, colour, size, ground, texture

    @torch.no_grad()
    def read(self, images: Tensor) -> list[Scene]:
        """The scene that each of B×3×H×W pictures in [0, 1] shows."""
        shape, colour, size, ground, texture = (logits.argmax(-1).tolist() for logits in self(images))
        scenes = []
        for index in range(len(images)):
            things = [
                Thing(SHAPES[s], list(COLOURS)[c], list(SIZES)[z], place)
                for s, c, z, place in zip(shape[index], colour[index], size[index], PLACES, strict=True)
                if s < len(SHAPES)
            ]
            scenes.append(Scene(tuple(things), list(COLOURS)[ground[index]], TEXTURES[texture[index]]))
        return scenes

    @classmethod
    def load(cls, path: str | Path | None = None) -> "AttributeChecker":
        """The trained checker of the package, or the one in `path`."""
        from agentsd.demo import CHECKER

        model = cls()
        model.load_state_dict(load_file(path or CHECKER))
        return model.float().eval()


def _rights(asked: Thing, seen: Thing) -> dict[str, bool]:
    """For each attribute that is asked for, whether it is right."""
    wanted = {name: value for name in ATTRIBUTES[:4] if (value := getattr(asked, name)) is not None}
    return {name: getattr(seen, name) == value for name, value in wanted.items()}


def score(asked: Scene, seen: Scene) -> dict[str, list[bool]]:
    """Compare what a prompt asks for with what a picture shows.

    Each thing asked for is matched with the thing seen that agrees in most of its attributes.

    Returns:
        For each attribute the prompt names, whether it is right, once per thing; and `all`: nothing is wrong, missing
        or extra.
    """
    result: dict[str, list[bool]] = {name: [] for name in ATTRIBUTES}
    left = list(seen.things)
    for thing in sorted(asked.things, key=lambda thing: thing.place is None):
        match = max(left, key=lambda other: sum(_rights(thing, other).values()), default=Thing())
        if match in left:
            left.remove(match)
        for name, right in _rights(thing, match).items():
            result[name].append(right)
    if asked.colour:
        result["background"].append(seen.colour == asked.colour)
    if asked.texture:
        result["texture"].append(seen.texture == asked.texture)
    result["all"] = [not left and all(all(rights) for rights in result.values())]
    return result
