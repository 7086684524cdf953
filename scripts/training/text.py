"""Stage `text`: the text encoder learns to tell what the words put at each place, before any picture is drawn."""

import random
from typing import Any

import scenes
import torch
import torch.nn.functional as F
from loop import Run, fit
from networks import LENGTH, WIDTH, make_text_encoder, make_tokenizer
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

# Where a thing can be: at a place, or in a closeup.
SLOTS = (*scenes.PLACES, scenes.CLOSEUP)


def labels(chosen: list[scenes.Scene], closeups: list[bool]) -> tuple[Tensor, ...]:
    """Object and size in each slot, colour and texture of the background; -1 where it does not matter."""
    names = torch.full((len(chosen), len(SLOTS)), len(scenes.OBJECTS))
    sizes = torch.full_like(names, -1)
    for index, scene in enumerate(chosen):
        for thing in scene.things:
            slot = SLOTS.index(scenes.CLOSEUP if closeups[index] else str(thing.place))
            names[index, slot] = list(scenes.OBJECTS).index(str(thing.name))
            sizes[index, slot] = list(scenes.SIZES).index(str(thing.size))
    colours = torch.tensor([list(scenes.COLOURS).index(str(scene.colour)) for scene in chosen])
    textures = torch.tensor([scenes.TEXTURES.index(str(scene.texture)) for scene in chosen])
    return names, sizes, colours, textures


def sample(rng: random.Random, count: int, share: float = 0.5) -> tuple[list[scenes.Scene], list[bool]]:
    """Scenes, and which of them are closeups: these have one thing only."""
    chosen = [scenes.sample(rng) for _ in range(count)]
    closeups = [rng.random() < share for _ in chosen]
    single = [
        scenes.Scene(scene.things[:1], scene.colour, scene.texture) if closeup else scene
        for scene, closeup in zip(chosen, closeups, strict=True)
    ]
    return single, closeups


def encode(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """Token ids, B×LENGTH."""
    return tokenizer(prompts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt").input_ids


class TextTask(nn.Module):
    """One query a slot and one for the background read the text encoder's states by attention."""

    def __init__(self, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.reader = nn.ModuleDict(
            {
                "queries": nn.Embedding(len(SLOTS) + 1, WIDTH),
                "attention": nn.MultiheadAttention(WIDTH, 4, batch_first=True),
                "things": nn.Linear(WIDTH, 1 + len(scenes.OBJECTS) + len(scenes.SIZES)),
                "ground": nn.Linear(WIDTH, len(scenes.COLOURS) + len(scenes.TEXTURES)),
            }
        )

    def forward(self, tokens: Tensor, *targets: Tensor) -> dict[str, Tensor]:
        """The sum of the attributes' cross-entropies."""
        encoder: Any = self.text_encoder
        reader: Any = self.reader
        states = encoder(tokens)[0]
        queries = reader["queries"].weight.expand(len(states), -1, -1)
        read, _ = reader["attention"](queries, states, states, need_weights=False)
        things = reader["things"](read[:, :-1]).float()
        ground = reader["ground"](read[:, -1]).float()
        logits = (
            *things.split([1 + len(scenes.OBJECTS), len(scenes.SIZES)], dim=-1),
            *ground.split([len(scenes.COLOURS), len(scenes.TEXTURES)], dim=-1),
        )
        pairs = [(g.flatten(0, -2), t.flatten()) for g, t in zip(logits, targets, strict=True)]
        names, target = pairs[0]
        there = target < len(scenes.OBJECTS)
        right = (names.argmax(-1) == target)[there].float().mean()
        return {"loss": sum(F.cross_entropy(g, t, ignore_index=-1) for g, t in pairs), "objects": right}


def tokenizer(run: Run) -> CLIPTokenizer:
    """The tokenizer of the run, made by its first process."""
    folder = run.folder / "model" / "tokenizer"
    if run.main and not (folder / "tokenizer_config.json").exists():
        make_tokenizer(folder)
    run.wait()
    return CLIPTokenizer.from_pretrained(folder)


def train(run: Run, steps: int, seed: int = 0, count: int = 96) -> None:
    """Train the text encoder and write it to `text_encoder`."""
    words = tokenizer(run)
    torch.manual_seed(seed)
    task = TextTask(make_text_encoder(words))

    def batch(step: int) -> tuple[Tensor, ...]:
        rng = random.Random(f"{seed}/text/{step}/{run.rank}")
        chosen, closeups = sample(rng, count // run.world, 0.25)
        prompts = [scenes.caption(scene, rng, closeup) for scene, closeup in zip(chosen, closeups, strict=True)]
        return encode(words, prompts), *labels(chosen, closeups)

    average = fit(run, "text", task, steps, batch, lambda done: 2e-3 * (1 - done))
    if run.main and not run.stopping:
        task.load_state_dict(average.weights)
        task.text_encoder.save_pretrained(run.folder / "text_encoder")
