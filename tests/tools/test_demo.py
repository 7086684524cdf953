"""The embedded model: its scenes, its checker and its weights."""

import math
import random
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from agentsd.demo import MODEL, VOCABULARY, scenes, unknown_words
from agentsd.demo.checker import AttributeChecker, score
from agentsd.demo.scenes import Scene, Thing, held_out_prompts

TRAINING = Path(__file__).resolve().parents[2] / "scripts" / "training"
ACCURACY = runpy.run_path(str(TRAINING / "accuracy.py"))
described = runpy.run_path(str(TRAINING / "demo.py"))["described"]
checker_accuracy, draw, measure = (ACCURACY[name] for name in ("checker_accuracy", "draw", "measure"))

PROMPT = "a large red circle on the left, a small blue star on the right, on a striped green background"


@pytest.fixture(scope="module")
def pipe() -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(MODEL, use_safetensors=True)


@given(st.integers(0, 10**6))
def test_words_of_a_scene_read_back_as_the_scene(seed: int) -> None:
    scene = scenes.sample(random.Random(seed))
    text = scenes.caption(scene)
    assert scenes.parse(text) == scene
    assert not unknown_words(text)
    shortened = scenes.parse(described(scene, random.Random(seed)))
    for whole, part in zip(scene.things, shortened.things, strict=True):
        for name in ("shape", "colour", "size", "place"):
            assert getattr(part, name) in (None, getattr(whole, name))
    assert shortened.colour in (None, scene.colour)
    assert shortened.texture in (None, scene.texture)


@pytest.mark.parametrize(
    ("prompt", "scene"),
    [
        (
            PROMPT,
            Scene(
                (Thing("circle", "red", "large", "left"), Thing("star", "blue", "small", "right")), "green", "striped"
            ),
        ),
        ("A Ring", Scene((Thing("ring"),))),
        ("a white square in the center", Scene((Thing("square", "white", None, "center"),))),
        ("a star and a small black triangle on the top on an orange background",
         Scene((Thing("star"), Thing("triangle", "black", "small", "top")), "orange", "plain")),
        ("on a gradient blue background", Scene((), "blue", "gradient")),
        ("a green ring on the bottom, on a checkered background",
         Scene((Thing("ring", "green", None, "bottom"),), None, "checkered")),
        ("", Scene()),
    ],
)  # fmt: skip
def test_the_grammar_as_documented(prompt: str, scene: Scene) -> None:
    assert scenes.parse(prompt) == scene


def test_unknown_words_are_named_once_in_order() -> None:
    assert unknown_words("A cat, a red circle and another cat on the Moon!") == ["cat", "another", "moon"]


def test_training_scenes_never_show_what_is_held_out() -> None:
    rng = random.Random(0)
    drawn = [scenes.sample(rng) for _ in range(3000)]
    shown = {(thing.colour, thing.shape) for scene in drawn for thing in scene.things}
    assert not shown & scenes.HELD_OUT_SHAPES
    assert len(shown) == len(scenes.COLOURS) * len(scenes.SHAPES) - len(scenes.HELD_OUT_SHAPES)
    assert not {(scene.colour, scene.texture) for scene in drawn} & scenes.HELD_OUT_TEXTURES
    assert all(scenes.parse(prompt).held_out for prompt in held_out_prompts(50))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("circle", lambda r: math.pi * r**2),
        ("ring", lambda r: math.pi * (r**2 - (0.56 * r) ** 2)),
        ("square", lambda r: (1.72 * r) ** 2),
        ("triangle", lambda r: 3 * math.sqrt(3) * (0.56 * r) ** 2),
        ("star", lambda r: 5 * 1.12 * r * 0.47 * r * math.sin(math.pi / 5)),
    ],
)
def test_shapes_have_the_area_that_geometry_says(shape: str, area: Any) -> None:
    scene = Scene((Thing(shape, "red", "small", "center"),), "white", "plain")
    _, masks = scenes.render([scene] * 64, 256, seed=5)
    radius = scenes.SIZES["small"] * 256
    sizes = masks.sum((1, 2, 3)) / area(radius)
    assert 0.94**2 * 0.98 <= sizes.min() <= sizes.max() <= 1.06**2 * 1.02
    assert sizes.mean() == pytest.approx(1, abs=0.04)


def test_pictures_depend_on_the_seed_alone_and_are_anti_aliased() -> None:
    rng = random.Random(3)
    drawn = [scenes.sample(rng) for _ in range(6)]
    torch.manual_seed(1)
    image, mask = scenes.render(drawn, 128, seed=9)
    torch.manual_seed(2)
    assert torch.equal(scenes.render(drawn, 128, seed=9)[0], image)
    assert not torch.equal(scenes.render(drawn, 128, seed=10)[0], image)
    assert 0 <= image.min() <= image.max() <= 1
    edge = ((mask > 0.02) & (mask < 0.98)).float().mean()
    assert 0.002 < edge < 0.1
    large, _ = scenes.render(drawn, 256, seed=9)
    assert (F.avg_pool2d(large, 2) - image).abs().mean() < 0.01


@pytest.mark.slow
def test_the_checker_reads_rendered_scenes() -> None:
    accuracy = checker_accuracy(AttributeChecker.load(), 600, seed=77)
    assert set(accuracy) == {"shape", "colour", "size", "place", "background", "texture", "all"}
    assert min(value for name, value in accuracy.items() if name != "all") >= 0.98


def test_scores_count_what_is_wrong_missing_and_extra() -> None:
    asked = scenes.parse(PROMPT)
    assert score(asked, asked)["all"] == [True]
    recoloured = Scene((Thing("circle", "blue", "large", "left"), asked.things[1]), "green", "striped")
    assert score(asked, recoloured) == {
        "shape": [True, True], "colour": [False, True], "size": [True, True], "place": [True, True],
        "background": [True], "texture": [True], "all": [False],
    }  # fmt: skip
    missing = Scene(asked.things[:1], "green", "striped")
    assert score(asked, missing)["shape"] == [True, False]
    extra = Scene((*asked.things, Thing("ring", "black", "small", "top")), "green", "striped")
    assert score(asked, extra)["shape"] == [True, True]
    assert score(asked, extra)["all"] == [False]
    assert score(Scene(), asked)["all"] == [False]


def test_the_folder_is_what_diffusers_loads_and_small(pipe: Any) -> None:
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".txt", ".safetensors"}
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert sum(path.stat().st_size for path in weights) <= 16 * 2**20
    assert all(tensor.dtype == torch.float16 for path in weights for tensor in load_file(path).values())
    assert type(pipe.unet).__name__ == "UNet2DConditionModel"
    assert pipe.unet.config.sample_size == 64
    assert pipe.vae_scale_factor == 4


def test_the_layers_are_those_of_stable_diffusion_in_small(pipe: Any) -> None:
    import agentsd

    report = agentsd.describe(pipe)
    assert {row.grid for row in report.layers} == {(64, 64), (32, 32), (16, 16), (8, 8)}
    assert sum(row.tokens == 4096 for row in report.layers) == 3


def test_each_word_is_one_token(pipe: Any) -> None:
    for word in VOCABULARY:
        assert len(pipe.tokenizer(word).input_ids) == 3, word
    longest = max((scenes.caption(scenes.sample(random.Random(i))) for i in range(500)), key=len)
    assert len(pipe.tokenizer(longest).input_ids) <= pipe.tokenizer.model_max_length
    assert len(pipe.tokenizer("a zebra").input_ids) == 8


@pytest.mark.slow
def test_the_autoencoder_keeps_the_picture(pipe: Any) -> None:
    rng = random.Random(11)
    images, _ = scenes.render([scenes.sample(rng, held_out=i % 2 == 1) for i in range(12)], seed=4)
    with torch.no_grad():
        again = pipe.vae.decode(pipe.vae.encode(images * 2 - 1).latents).sample / 2 + 0.5
    psnr = -10 * (again.clamp(0, 1) - images).square().mean((1, 2, 3)).log10()
    assert psnr.min() > 30


@pytest.mark.slow
def test_the_model_draws_what_it_is_asked(pipe: Any) -> None:
    prompts = held_out_prompts(8, seed=5)
    images = draw(pipe, prompts, steps=15, batch=2)
    accuracy = measure(images, prompts, AttributeChecker.load())
    assert accuracy["background"] >= 0.8
    assert accuracy["texture"] >= 0.8
    assert accuracy["colour"] >= 0.7
    assert accuracy["place"] >= 0.7


@pytest.mark.slow
def test_pictures_that_are_there_are_not_drawn_again(pipe: Any, tmp_path: Path) -> None:
    prompts = held_out_prompts(4, seed=6)
    first = draw(pipe, prompts, steps=1, batch=2, folder=tmp_path)
    times = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert sorted(times) == ["00000.png", "00001.png", "00002.png", "00003.png"]
    (tmp_path / "00003.png").unlink()
    again = draw(pipe, prompts, steps=1, batch=2, folder=tmp_path)
    assert torch.equal(again, first)
    assert all((tmp_path / name).stat().st_mtime_ns == times[name] for name in ("00000.png", "00001.png"))


@settings(max_examples=5, deadline=None)
@given(st.integers(1, 3))
def test_the_checker_takes_any_size(batch: int) -> None:
    images = torch.rand(batch, 3, 96, 160)
    assert len(AttributeChecker.load().read(images)) == batch
