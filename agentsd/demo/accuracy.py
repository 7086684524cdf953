"""Prompt-following as numbers: draw prompts with held-out combinations and read the pictures back."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from agentsd import drawing
from agentsd.demo import scenes
from agentsd.demo.checker import ATTRIBUTES, AttributeChecker, score
from agentsd.results import write_image


def held_out_prompts(count: int, seed: int = 1) -> list[str]:
    """Prompts that state everything, each with a combination that training never showed."""
    rng = random.Random(f"held out/{seed}")
    return [scenes.caption(scenes.sample(rng, held_out=True)) for _ in range(count)]


def checker_accuracy(checker: AttributeChecker, count: int = 2000, seed: int = 1) -> dict[str, float]:
    """Share of each attribute that the checker reads rightly from rendered scenes it was not trained on."""
    rng = random.Random(f"checker/{seed}")
    drawn = [scenes.sample(rng, held_out=index % 2 == 1) for index in range(count)]
    rights: list[dict[str, list[bool]]] = []
    for start in range(0, count, 50):
        part = drawn[start : start + 50]
        images, _ = scenes.render(part, seed=rng.getrandbits(40))
        rights += [score(asked, seen) for asked, seen in zip(part, checker.read(images), strict=True)]
    return shares(rights)


def shares(rights: Sequence[dict[str, list[bool]]]) -> dict[str, float]:
    """Per attribute the share that is right, and of pictures in which everything is (`all`)."""
    pooled = {name: [right for row in rights for right in row[name]] for name in (*ATTRIBUTES, "all")}
    return {name: sum(values) / len(values) for name, values in pooled.items() if values}


def draw(
    pipe: Any, prompts: list[str], steps: int = 25, guidance: float = 4.0, batch: int = 4, folder: Path | None = None
) -> Tensor:
    """One picture per prompt, seeded by its index and rounded to 8 bits: B×3×H×W in [0, 1].

    With `folder`, each is a PNG file there, and those that are there already are not drawn again.
    """
    images: list[Image.Image] = []
    for start in tqdm(range(0, len(prompts), batch), desc="pictures", unit="batch"):
        numbers = range(start, min(start + batch, len(prompts)))
        files = [folder / f"{number:05d}.png" for number in numbers] if folder else []
        if files and all(file.exists() for file in files):
            images += [Image.open(file).convert("RGB") for file in files]
            continue
        part = [prompts[number] for number in numbers]
        made = drawing.draw(pipe, part, numbers, num_inference_steps=steps, guidance_scale=guidance).images
        images += made
        for file, image in zip(files, made, strict=False):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_image(file, image)
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]).float() / 255


def measure(images: Tensor, prompts: list[str], checker: AttributeChecker) -> dict[str, float]:
    """Share of each attribute asked for that the pictures show."""
    return shares([score(scenes.parse(p), seen) for p, seen in zip(prompts, checker.read(images), strict=True)])
