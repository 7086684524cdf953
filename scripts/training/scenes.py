"""Captioned scenes of emoji: the data on which the embedded model is trained, and the grammar of its prompts.

A scene is one or two objects, each with a size and a place, on a coloured background with a texture. `sample` draws
scenes, `caption` puts one into words, `parse` reads the words back, `render` draws pictures of whole scenes or of
windows of them.
"""

import math
import random
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

EMOJI = Path(__file__).parent / "emoji"
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
# The word of each object, and the code points of its emoji.
OBJECTS: dict[str, str] = {
    "apple": "1f34e",
    "ball": "26bd",
    "balloon": "1f388",
    "bee": "1f41d",
    "burger": "1f354",
    "butterfly": "1f98b",
    "cactus": "1f335",
    "car": "1f697",
    "castle": "1f3f0",
    "crab": "1f980",
    "croissant": "1f950",
    "cupcake": "1f9c1",
    "donut": "1f369",
    "flamingo": "1f9a9",
    "fox": "1f98a",
    "frog": "1f438",
    "ghost": "1f47b",
    "guitar": "1f3b8",
    "house": "1f3e0",
    "mushroom": "1f344",
    "owl": "1f989",
    "panda": "1f43c",
    "penguin": "1f427",
    "pig": "1f437",
    "pizza": "1f355",
    "pumpkin": "1f383",
    "robot": "1f916",
    "rocket": "1f680",
    "snowman": "26c4",
    "strawberry": "1f353",
    "sunflower": "1f33b",
    "tree": "1f333",
    "turtle": "1f422",
    "unicorn": "1f984",
    "watermelon": "1f349",
    "whale": "1f433",
}
SIZES: dict[str, float] = {"small": 0.3, "large": 0.5}
PLACES: dict[str, tuple[float, float]] = {
    "left": (0.27, 0.5),
    "right": (0.73, 0.5),
    "top": (0.5, 0.27),
    "bottom": (0.5, 0.73),
    "center": (0.5, 0.5),
}
TEXTURES = ("plain", "striped", "checkered", "gradient")
CLOSEUP = "closeup"
FILLERS = ("a", "an", "the", "and", "on", "in", "of", "with", "background", CLOSEUP)
VOCABULARY = (*FILLERS, *SIZES, *COLOURS, *OBJECTS, *PLACES, *TEXTURES)

# Combinations that never appear in training: they measure generalisation.
HELD_OUT_PLACES = {("panda", "left"), ("rocket", "bottom"), ("penguin", "top"), ("car", "right"), ("owl", "center")}
HELD_OUT_COLOURS = {
    ("fox", "purple"),
    ("robot", "green"),
    ("pizza", "blue"),
    ("snowman", "orange"),
    ("unicorn", "yellow"),
}
HELD_OUT_TEXTURES = {("striped", "orange"), ("checkered", "blue"), ("gradient", "green")}

# What words do not say: the largest shift, relative change of size and turn (radians) of an object.
SHIFT, STRETCH, TURN = 0.02, 0.05, 0.07
_OPPOSITE = (("left", "right"), ("top", "bottom"))


@dataclass(frozen=True)
class Thing:
    """One object of a scene; None is what a prompt leaves open."""

    name: str | None = None
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
        return (self.texture, self.colour) in HELD_OUT_TEXTURES or any(
            (thing.name, thing.place) in HELD_OUT_PLACES or (thing.name, self.colour) in HELD_OUT_COLOURS
            for thing in self.things
        )


def _draw(rng: random.Random) -> Scene:
    count = rng.choices((1, 2), (0.4, 0.6))[0]
    sizes = [rng.choice(list(SIZES)) for _ in range(count)]
    if count == 1:
        places = [rng.choice(list(PLACES))]
    elif sizes == ["small", "small"] and rng.random() < 0.5:
        places = rng.sample(list(PLACES)[:4], 2)
    else:
        places = rng.sample(rng.choice(_OPPOSITE), 2)
    names = rng.sample(list(OBJECTS), count)
    things = tuple(Thing(*thing) for thing in zip(names, sizes, places, strict=True))
    return Scene(things, rng.choice(list(COLOURS)), rng.choice(TEXTURES))


def sample(rng: random.Random, held_out: bool = False) -> Scene:
    """A random scene, fully specified, with (`held_out`) or without a combination that is kept out of training."""
    while (scene := _draw(rng)).held_out is not held_out:
        pass
    return scene


def _article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def caption(scene: Scene, rng: random.Random | None = None, closeup: bool = False) -> str:
    """The scene in words.

    Args:
        scene: the scene, fully specified or not.
        rng: leaves some parts out and joins the others in different ways; None says everything.
        closeup: whether a window around the one thing is shown: then its place in the picture is not said.
    """

    def keep(probability: float) -> bool:
        return rng is None or rng.random() < probability

    parts = []
    for thing in scene.things:
        words = [thing.size] if thing.size and keep(0.88) else []
        words.append(str(thing.name))
        text = _article(" ".join(words))
        if thing.place and not closeup and keep(0.88):
            text += f" in the {thing.place}" if thing.place == "center" else f" on the {thing.place}"
        parts.append(text)
    joiner = ", " if rng is not None and rng.random() < 0.3 else " and "
    text = joiner.join(parts)
    if scene.colour and scene.texture and keep(0.92):
        plain = scene.texture == "plain" and (rng is None or rng.random() < 0.8)
        ground = scene.colour if plain else f"{scene.texture} {scene.colour}"
        text += (", on " if rng is not None and rng.random() < 0.3 else " on ") + _article(ground) + " background"
    return f"{CLOSEUP} of {text}" if closeup else text


def words(prompt: str) -> list[str]:
    """The words of a prompt, in lower case."""
    return re.findall(r"[^\W_]+", prompt.lower())


def unknown_words(prompt: str) -> list[str]:
    """The words of `prompt` that the model was never shown, each once, in order."""
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
        elif word in OBJECTS:
            things.append(Thing(word, size))
            size = None
        elif word in PLACES and things:
            things[-1] = Thing(things[-1].name, things[-1].size, word)
        elif word == "background":
            ground = (colour, texture or "plain")
            size = colour = texture = None
    return Scene(tuple(things), *ground)


@cache
def _sprites(pixels: int) -> Tensor:
    """The objects' pictures with colours multiplied by alpha, N×4×pixels×pixels."""
    pictures = []
    for name in OBJECTS:
        picture = np.asarray(Image.open(EMOJI / f"{name}.webp").convert("RGBA"), np.float32) / 255
        picture[..., :3] *= picture[..., 3:]
        pictures.append(torch.from_numpy(picture).permute(2, 0, 1))
    sharp = torch.stack(pictures)
    return F.interpolate(sharp, (pixels, pixels), mode="bicubic", antialias=True).clamp(0, 1)


def _wave(x: Tensor, pixel: Tensor) -> Tensor:
    """A square wave of period 1 between 0 and 1 whose edges are one pixel wide."""
    return ((x.frac() + 1).frac().sub(0.5).abs().sub(0.25).div(pixel) + 0.5).clamp(0, 1)


def _colours(names: list[str | None]) -> Tensor:
    return torch.tensor([COLOURS[str(name)] for name in names])[:, :, None, None]


def render(
    scenes: list[Scene],
    size: int = 256,
    seed: int = 0,
    closeups: list[bool] | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Draw scenes.

    Args:
        scenes: fully specified scenes.
        size: width and height in pixels.
        seed: decides what words do not say: the exact place, size and turn of each thing, phase, period and direction
            of the texture, and where in its window a closeup's thing is.
        closeups: for each scene whether a window of half the side around its first thing is shown, at twice the
            scale, instead of the whole scene.
        device: where to draw; random numbers are drawn on the CPU.

    Returns:
        Pictures B×3×size×size in [0, 1], and B×1×size×size masks of the things.
    """
    generator = torch.Generator().manual_seed(seed)

    def jitter(low: float, high: float) -> Tensor:
        return (torch.rand(len(scenes), 1, 1, generator=generator) * (high - low) + low).to(device)

    slots = max(len(scene.things) for scene in scenes)
    shifts = [(jitter(-SHIFT, SHIFT), jitter(-SHIFT, SHIFT)) for _ in range(slots)]
    side, left, top = torch.ones(len(scenes), 1, 1), torch.zeros(len(scenes), 1, 1), torch.zeros(len(scenes), 1, 1)
    wander = torch.rand(len(scenes), 2, generator=generator) * 0.1 - 0.05
    for index, closeup in enumerate(closeups or []):
        if closeup:
            place = PLACES[str(scenes[index].things[0].place)]
            side[index] = 0.5
            left[index], top[index] = (
                min(max(place[axis] + wander[index, axis].item() - 0.25, 0), 0.5) for axis in (0, 1)
            )
    side, left, top = side.to(device), left.to(device), top.to(device)
    axis = (torch.arange(size, device=device) + 0.5) / size
    pixel = side / size
    y, x = top + side * axis[:, None], left + side * axis[None, :]

    base = _colours([scene.colour for scene in scenes]).to(device)
    grey = base.mean(1, keepdim=True)
    light = torch.where(grey > 0.9, base * 0.7, base * 0.5 + 0.5 * torch.where(grey < 0.1, 0.6, 1.0))
    turn = torch.randint(0, 4, (len(scenes), 1, 1), generator=generator).to(device) * (math.pi / 4)
    along = (x - 0.5) * turn.cos() + (y - 0.5) * turn.sin()
    period, phase_x, phase_y = jitter(0.115, 0.135), jitter(0, 1), jitter(0, 1)
    stripes = _wave(along / period + phase_x, pixel / period)
    cells = period * 1.5
    across = _wave(x / cells + phase_x, pixel / cells)
    down = _wave(y / cells + phase_y, pixel / cells)
    checks = across * (1 - down) + (1 - across) * down
    ramp = (along / 1.42 + 0.5) * torch.where(jitter(-1, 1) > 0, 1.0, -1.0)
    ramp = torch.where(ramp < 0, 1 + ramp, ramp).expand(-1, size, size)
    kinds = torch.tensor([TEXTURES.index(str(scene.texture)) for scene in scenes], device=device)[:, None, None]
    mix = torch.where(kinds == 1, stripes, torch.where(kinds == 2, checks, torch.zeros((), device=device)))[:, None]
    image = base + (light - base) * mix
    low, high = torch.where(grey < 0.1, base, base * 0.45), torch.where(grey > 0.9, base, light)
    image = torch.where(kinds[:, None] == 3, low + (high - low) * ramp[:, None], image)

    mask = torch.zeros(len(scenes), 1, size, size, device=device)
    for slot in range(slots):
        scale, tilt = jitter(1 - STRETCH, 1 + STRETCH), jitter(-TURN, TURN)
        # One group for each number of pixels that an object covers, so that its picture is reduced without aliasing.
        groups: dict[int, list[int]] = {}
        for index, scene in enumerate(scenes):
            if slot < len(scene.things):
                covered = SIZES[str(scene.things[slot].size)] * size
                closeup = closeups is not None and closeups[index]
                groups.setdefault(round(covered * (2 if closeup else 1)), []).append(index)
        for pixels, members in groups.items():
            things = [scenes[index].things[slot] for index in members]
            centre = torch.tensor([PLACES[str(thing.place)] for thing in things], device=device)[:, :, None, None]
            width = torch.tensor([SIZES[str(thing.size)] for thing in things], device=device)[:, None, None]
            u = x[members] - centre[:, 0] - shifts[slot][0][members]
            v = y[members] - centre[:, 1] - shifts[slot][1][members]
            cos, sin = tilt[members].cos(), tilt[members].sin()
            reach = width * scale[members] / 2
            where = torch.stack([(u * cos + v * sin) / reach, (v * cos - u * sin) / reach], dim=-1)
            names = [list(OBJECTS).index(str(thing.name)) for thing in things]
            drawn = F.grid_sample(_sprites(pixels)[names].to(device), where, mode="bilinear", align_corners=False)
            image[members] = image[members] * (1 - drawn[:, 3:]) + drawn[:, :3]
            mask[members] = torch.maximum(mask[members], drawn[:, 3:])
    return image.clamp(0, 1), mask
