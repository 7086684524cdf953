"""The training recipe: the grammar of its scenes, what it holds out, and training that resumes bit-identically."""

import random
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

TRAINING = Path(__file__).resolve().parents[2] / "scripts" / "training"
sys.path.insert(0, str(TRAINING))

import fetch_emoji  # noqa: E402
import optim  # noqa: E402
import scenes  # noqa: E402
from loop import Run, fit  # noqa: E402
from networks import LENGTH, make_tokenizer, make_unet  # noqa: E402
from sample import self_attentions, zeroed  # noqa: E402


@pytest.fixture
def drawn() -> list[scenes.Scene]:
    rng = random.Random(0)
    return [scenes.sample(rng) for _ in range(300)]


def test_full_captions_are_read_back(drawn: list[scenes.Scene]) -> None:
    assert all(scenes.parse(scenes.caption(scene)) == scene for scene in drawn)


def test_captions_with_parts_left_out_say_nothing_else(drawn: list[scenes.Scene]) -> None:
    rng = random.Random(1)
    for scene in drawn:
        prompt = scenes.caption(scene, rng)
        read = scenes.parse(prompt)
        assert not scenes.unknown_words(prompt)
        assert [thing.name for thing in read.things] == [thing.name for thing in scene.things]
        for seen, thing in zip(read.things, scene.things, strict=True):
            assert seen.size in (None, thing.size)
            assert seen.place in (None, thing.place)
        assert (read.colour, read.texture) in ((None, None), (scene.colour, scene.texture))


def test_closeups_say_so_and_name_no_place() -> None:
    scene = scenes.Scene((scenes.Thing("owl", "large", "left"),), "red", "striped")
    assert scenes.caption(scene, closeup=True) == "closeup of a large owl on a striped red background"


def test_unknown_words_are_named_once() -> None:
    assert scenes.unknown_words("a dragon and a Dragon on a red background") == ["dragon"]


def test_held_out_combinations_are_never_sampled(drawn: list[scenes.Scene]) -> None:
    for scene in drawn:
        assert (scene.texture, scene.colour) not in scenes.HELD_OUT_TEXTURES
        for thing in scene.things:
            assert (thing.name, thing.place) not in scenes.HELD_OUT_PLACES
            assert (thing.name, scene.colour) not in scenes.HELD_OUT_COLOURS


def test_held_out_scenes_can_be_asked_for() -> None:
    rng = random.Random(2)
    assert all(scenes.sample(rng, held_out=True).held_out for _ in range(30))


def test_held_out_names_are_words_of_the_grammar() -> None:
    assert all(name in scenes.OBJECTS and place in scenes.PLACES for name, place in scenes.HELD_OUT_PLACES)
    assert all(name in scenes.OBJECTS and colour in scenes.COLOURS for name, colour in scenes.HELD_OUT_COLOURS)
    assert all(kind in scenes.TEXTURES and colour in scenes.COLOURS for kind, colour in scenes.HELD_OUT_TEXTURES)


def test_every_object_has_a_picture_with_alpha_and_nothing_else_is_there() -> None:
    assert {path.stem for path in scenes.EMOJI.glob("*.webp")} == set(scenes.OBJECTS)
    sprites = scenes._sprites(64)
    assert sprites.shape == (len(scenes.OBJECTS), 4, 64, 64)
    assert (sprites[:, 3].amin((1, 2)) == 0).all()
    assert (sprites[:, 3].amax((1, 2)) > 0.99).all()


@pytest.mark.parametrize("size", [64, 128, 256])
def test_things_fill_most_of_the_side_that_their_size_names(size: int) -> None:
    things = [scenes.Thing("ball", kind, "center") for kind in scenes.SIZES]
    images, masks = scenes.render([scenes.Scene((thing,), "blue", "plain") for thing in things], size)
    assert images.shape == (2, 3, size, size)
    assert 0 <= images.min() <= images.max() <= 1
    widths = (masks > 0.5).any(2).sum(-1).flatten() / size
    filled = widths / torch.tensor(list(scenes.SIZES.values()))
    assert ((filled > 0.75) & (filled < 1)).all()


def test_a_closeup_is_a_window_at_twice_the_scale() -> None:
    scene = scenes.Scene((scenes.Thing("ball", "small", "left"),), "blue", "plain")
    _, whole = scenes.render([scene], 256)
    _, window = scenes.render([scene], 128, closeups=[True])
    # A window of half the side with half the pixels shows the ball in as many pixels as the whole picture does.
    assert whole.sum().item() == pytest.approx(window.sum().item(), rel=0.02)


def test_the_same_seed_draws_the_same_picture(drawn: list[scenes.Scene]) -> None:
    first, again, other = (scenes.render(drawn[:4], 64, seed)[0] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_download_with_another_checksum_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def pack(*words: object, cwd: str, **_: object) -> None:
        (Path(cwd) / "package.tgz").write_bytes(b"something else")

    monkeypatch.setattr(fetch_emoji.subprocess, "run", pack)
    with pytest.raises(SystemExit, match="SHA-256"):
        fetch_emoji.download()


def test_every_word_is_one_token(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path)
    assert all(len(tokenizer.tokenize(word)) == 1 for word in scenes.VOCABULARY)
    rng = random.Random(5)
    prompts = [scenes.caption(scenes.sample(rng)) for _ in range(50)]
    assert max(len(ids) for ids in tokenizer(prompts).input_ids) <= LENGTH


class Regression(nn.Module):
    """A tiny task with a matrix for Muon and a bias for AdamW."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(16, 16)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.net(x) - y).square().mean()}


def regression_batch(step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
    return x, x.flip(1)


def train(folder: Path, steps: int, until: int | None = None) -> dict[str, Tensor]:
    """Weights after `steps`, or after an interruption at `until`, and their moving average."""
    run = Run(folder, precision="no")
    torch.manual_seed(0)
    task = Regression()

    def batch(step: int) -> tuple[Tensor, Tensor]:
        run.stopping = until is not None and step + 1 >= until
        return regression_batch(step)

    average = fit(run, "regression", task, steps, batch, lambda done: 1e-2 * (1 - done), warmup=2)
    return {**task.state_dict(), **{f"average.{name}": value for name, value in average.weights.items()}}


def test_a_resumed_training_is_bit_identical(tmp_path: Path) -> None:
    straight = train(tmp_path / "straight", 4)
    train(tmp_path / "resumed", 4, until=2)
    state = torch.load(tmp_path / "resumed" / "checkpoints" / "regression.pt", weights_only=True)
    assert state["step"] == 2
    resumed = train(tmp_path / "resumed", 4)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_muon_steps_are_semi_orthogonal() -> None:
    for shape in ((16, 48), (48, 16)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        values = torch.linalg.svdvals(optim.orthogonalize(matrix).float())
        assert 0.5 < values.min() <= values.max() < 1.3


def test_first_and_last_layers_and_biases_are_left_to_adamw() -> None:
    module = nn.ModuleDict({"conv_in": nn.Conv2d(32, 32, 3), "hidden": nn.Conv2d(32, 32, 3)})
    groups = {group["matrices"]: group["params"] for group in optim.groups(module)}
    assert [id(p) for p in groups[True]] == [id(module["hidden"].weight)]
    assert len(groups[False]) == 3


def test_every_grid_has_self_attention_that_can_be_set_to_zero() -> None:
    unet = make_unet((32, 32, 32), (1, 1, 1), (1, 1, 2))
    levels = self_attentions(unet)
    assert {level: len(named) for level, named in levels.items()} == {0: 3, 1: 3, 2: 8}
    call = torch.randn(1, 4, 16, 16), torch.tensor([500]), torch.randn(1, 3, 128)
    with torch.no_grad():
        stock = unet(*call).sample
        with zeroed([module for _, module in levels[0]]):
            assert not torch.allclose(unet(*call).sample, stock)
        assert torch.equal(unet(*call).sample, stock)


def test_second_convolutions_below_the_finest_grid_see_one_cell_and_stay_so() -> None:
    unet = make_unet((32, 32, 32), (1, 1, 1), (1, 1, 1))
    optimizer = optim.Muon(optim.groups(unet), lr=0.1)
    unet(torch.randn(1, 4, 16, 16), torch.tensor([500]), torch.randn(1, 3, 128)).sample.square().mean().backward()
    optimizer.step()
    narrow = unet.mid_block.resnets[0].conv2.weight.detach()
    assert narrow[:, :, 1, 1].abs().min() > 0
    assert narrow.abs().sum() == pytest.approx(narrow[:, :, 1, 1].abs().sum().item(), rel=1e-5)
    assert unet.down_blocks[0].resnets[0].conv2.weight[:, :, 0, 0].abs().min() > 0
