"""Captioned scenes: the data on which the embedded model is trained, and the grammar of its prompts.

A scene is one or two shapes, each with a colour, a size and a place, on a coloured background with a texture.
`sample` draws scenes, `caption` puts one into words, `parse` reads the words back, `render` draws pictures with
anti-aliased edges.
"""

import math
import random
import re
from dataclasses import dataclass

import torch
from torch import Tensor

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.15, 0.15),
    "green": (0.15, 0.63, 0.27),
    "blue": (0.16, 0.35, 0.88),
    "yellow": (0.97, 0.84, 0.16),
    "purple": (0.55, 0.22, 0.75),
    "orange": (0.97, 0.52, 0.10),
    "white": (0.97, 0.97, 0.97),
    "black": (0.07, 0.07, 0.07),
}
SHAPES = ("circle", "square", "triangle", "star", "ring")
SIZES: dict[str, float] = {"small": 0.115, "large": 0.215}
PLACES: dict[str, tuple[float, float]] = {
    "left": (0.26, 0.5),
    "right": (0.74, 0.5),
    "top": (0.5, 0.26),
    "bottom": (0.5, 0.74),
    "center": (0.5, 0.5),
}
TEXTURES = ("plain", "striped", "checkered", "gradient")
FILLERS = ("a", "an", "the", "and", "on", "in", "with", "background")
VOCABULARY = (*FILLERS, *SIZES, *COLOURS, *SHAPES, *PLACES, *TEXTURES)

# One colour of each shape, and one of each texture, never appear together in training: they measure generalisation.
HELD_OUT_SHAPES = {("red", "star"), ("green", "ring"), ("blue", "triangle"), ("yellow", "square"), ("purple", "circle")}
HELD_OUT_TEXTURES = {("orange", "striped"), ("blue", "checkered"), ("green", "gradient")}

_OPPOSITE = (("left", "right"), ("top", "bottom"))


@dataclass(frozen=True)
class Thing:
    """One shape of a scene; None is what a prompt leaves open."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Scene:
    """Up to two things on a background; None is what a prompt leaves open."""

    things: tuple[Thing, ...] = ()
    colour: str | None = None
    texture: str | None = None

    @property
    def held_out(self) -> bool:
        """Whether it shows a combination that training never shows."""
        return (self.colour, self.texture) in HELD_OUT_TEXTURES or any(
            (thing.colour, thing.shape) in HELD_OUT_SHAPES for thing in self.things
        )


def _draw(rng: random.Random) -> Scene:
    background = rng.choice(list(COLOURS))
    colours = [colour for colour in COLOURS if colour != background]
    count = rng.choices((1, 2), (0.35, 0.65))[0]
    sizes = [rng.choice(list(SIZES)) for _ in range(count)]
    if count == 1:
        places = [rng.choice(list(PLACES))]
    elif sizes == ["small", "small"] and rng.random() < 0.5:
        places = rng.sample(list(PLACES), 2)
    else:
        places = rng.sample(rng.choice(_OPPOSITE), 2)
    things = tuple(
        Thing(rng.choice(SHAPES), rng.choice(colours), size, place) for size, place in zip(sizes, places, strict=True)
    )
    return Scene(things, background, rng.choice(TEXTURES))


def sample(rng: random.Random, held_out: bool = False) -> Scene:
    """A random scene, fully specified, with (`held_out`) or without a combination that is kept out of training."""
    while (scene := _draw(rng)).held_out is not held_out:
        pass
    return scene


def article(words: str) -> str:
    """Words after a or an."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def caption(scene: Scene) -> str:
    """All of a fully specified scene in words."""
    things = []
    for thing in scene.things:
        where = "in" if thing.place == "center" else "on"
        things.append(article(f"{thing.size} {thing.colour} {thing.shape} {where} the {thing.place}"))
    ground = scene.colour if scene.texture == "plain" else f"{scene.texture} {scene.colour}"
    return f"{' and '.join(things)} on {article(str(ground))} background"


def held_out_prompts(count: int, seed: int = 1) -> list[str]:
    """Prompts that state everything, each with a combination that training never showed."""
    rng = random.Random(f"held out/{seed}")
    return [caption(sample(rng, held_out=True)) for _ in range(count)]


def words(prompt: str) -> list[str]:
    """The words of a prompt, in lower case."""
    return re.findall(r"[^\W_]+", prompt.lower())


def unknown_words(prompt: str) -> list[str]:
    """The words of `prompt` that the embedded model was never shown, each once, in order."""
    return list(dict.fromkeys(word for word in words(prompt) if word not in VOCABULARY))


def parse(prompt: str) -> Scene:
    """What a prompt asks for; whatever it leaves open is None. A background named without a texture is plain."""
    things: list[Thing] = []
    ground: tuple[str | None, str | None] = (None, None)
    size = colour = texture = None
    for word in words(prompt):
        if word in SIZES:
            size = word
        elif word in COLOURS:
            colour = word
        elif word in TEXTURES:
            texture = word
        elif word in SHAPES:
            things.append(Thing(word, colour, size))
            size = colour = None
        elif word in PLACES and things:
            things[-1] = Thing(things[-1].shape, things[-1].colour, things[-1].size, word)
        elif word == "background":
            ground = (colour, texture or "plain")
            size = colour = texture = None
    return Scene(tuple(things), *ground)


def _wave(x: Tensor, pixel: float) -> Tensor:
    """A square wave of period 1 between 0 and 1 whose edges are one pixel wide."""
    return ((x.frac() + 1).frac().sub(0.5).abs().sub(0.25).div(pixel) + 0.5).clamp(0, 1)


def _distance(shape: str, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Signed distance to the outline, negative inside."""
    if shape == "circle":
        return torch.hypot(x, y) - radius
    if shape == "ring":
        return (torch.hypot(x, y) - 0.78 * radius).abs() - 0.22 * radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.86 * radius
    if shape == "triangle":
        slanted = (math.sqrt(3) * x.abs() - y) / 2
        return torch.maximum(slanted, y) - 0.56 * radius
    # A star of five points: fold the plane onto half a point, then the distance to that one edge.
    outer, inner = 1.12 * radius, 0.47 * radius
    angle = torch.atan2(x, -y)
    half = math.pi / 5
    folded = (angle + half).remainder(2 * half).sub(half).abs()
    length = torch.hypot(x, y)
    px, py = length * folded.cos() - outer, length * folded.sin()
    ex, ey = inner * math.cos(half) - outer, inner * math.sin(half)
    return (px * -ey + py * ex) / -torch.hypot(ex, ey)


def _colours(names: list[str | None]) -> Tensor:
    return torch.tensor([COLOURS[str(name)] for name in names])[:, :, None, None]


def render(scenes: list[Scene], size: int = 256, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw scenes.

    Args:
        scenes: fully specified scenes.
        size: width and height in pixels.
        seed: decides what words do not say: the exact place, size and turn of each thing, phase and direction of the
            texture.

    Returns:
        Pictures B×3×size×size in [0, 1], and B×1×size×size masks of the things.
    """
    generator = torch.Generator().manual_seed(seed)
    pixel = 1 / size
    axis = (torch.arange(size) + 0.5) * pixel
    y, x = axis[:, None], axis[None, :]

    def jitter(low: float, high: float) -> Tensor:
        return torch.rand(len(scenes), 1, 1, generator=generator) * (high - low) + low

    base = _colours([scene.colour for scene in scenes])
    grey = base.mean(1, keepdim=True)
    light = torch.where(grey > 0.9, base * 0.7, base * 0.5 + 0.5 * torch.where(grey < 0.1, 0.6, 1.0))
    turn = torch.randint(0, 4, (len(scenes), 1, 1), generator=generator) * (math.pi / 4)
    along = (x - 0.5) * turn.cos() + (y - 0.5) * turn.sin()
    period, phase_x, phase_y = jitter(0.15, 0.17), jitter(0, 1), jitter(0, 1)
    stripes = _wave(along / period + phase_x, pixel / 0.16)
    cells = period * 1.5
    across = _wave(x / cells + phase_x, pixel / 0.24)
    down = _wave(y / cells + phase_y, pixel / 0.24)
    checks = across * (1 - down) + (1 - across) * down
    ramp = (along / 1.42 + 0.5) * torch.where(jitter(-1, 1) > 0, 1.0, -1.0)
    ramp = torch.where(ramp < 0, 1 + ramp, ramp).expand(-1, size, size)
    kinds = torch.tensor([TEXTURES.index(str(scene.texture)) for scene in scenes])[:, None, None]
    mix = torch.where(kinds == 1, stripes, torch.where(kinds == 2, checks, torch.zeros(())))[:, None]
    image = base + (light - base) * mix
    low, high = torch.where(grey < 0.1, base, base * 0.45), torch.where(grey > 0.9, base, light)
    image = torch.where(kinds[:, None] == 3, low + (high - low) * ramp[:, None], image)

    mask = torch.zeros(len(scenes), 1, size, size)
    for slot in range(max(len(scene.things) for scene in scenes)):
        dx, dy, scale, tilt = jitter(-0.03, 0.03), jitter(-0.03, 0.03), jitter(0.94, 1.06), jitter(-0.12, 0.12)
        for index, scene in enumerate(scenes):
            if slot >= len(scene.things):
                continue
            thing = scene.things[slot]
            centre_x, centre_y = PLACES[str(thing.place)]
            u, v = x - centre_x - dx[index], y - centre_y - dy[index]
            u, v = u * tilt[index].cos() + v * tilt[index].sin(), v * tilt[index].cos() - u * tilt[index].sin()
            cover = (0.5 - _distance(str(thing.shape), u, v, SIZES[str(thing.size)] * scale[index]) / pixel).clamp(0, 1)
            colour = torch.tensor(COLOURS[str(thing.colour)])[:, None, None]
            image[index] += (colour - image[index]) * cover
            mask[index, 0] = torch.maximum(mask[index, 0], cover)
    return image, mask
