"""`agentsd.visualize`: what it shows is what the run does."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import agentsd
import families
from agentsd import AgentSDConfig, Phase, View
from agentsd.patch import find_layers
from agentsd.view import colour

PROMPT, STEPS = "a red circle", 6
LAYER = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
CONFIG = AgentSDConfig(
    ratio=0.4,
    phases=(
        Phase(until=0.4, attention="agent", stride=4, proportional=True),
        Phase(until=0.7, attention="merge", stride=2),
        Phase(until=1.0, attention="kv", stride=4, kv_ratio=0.8),
    ),
)
# Steps at t = 831, 499 and 1 of 1,000.
LOOKED_AT = {"agent": 1, "merge": 3, "kv": 5}


class Looked:
    """A view, and beside it what hooks of this test saw of the same layer in the same step."""

    def __init__(self, pipe: Any, attention: str) -> None:
        block = find_layers(pipe.unet)[0].block
        self.attn, inputs = block.attn1, {"x": [], "y": []}  # type: ignore[var-annotated]
        handles = [
            block.norm1.register_forward_pre_hook(lambda _, args: inputs["x"].append(args[0][-1])),
            block.attn1.register_forward_pre_hook(lambda _, args: inputs["y"].append(args[0][-1])),
        ]
        self.view = agentsd.visualize(
            pipe, PROMPT, LOOKED_AT[attention], LAYER, seed=3, num_inference_steps=STEPS, guidance_scale=3.0
        )
        for handle in handles:
            handle.remove()
        self.x, self.y = (inputs[name][LOOKED_AT[attention]] for name in "xy")
        self.attention = attention

    def groups(self, folded: int) -> list[list[int]]:
        """The groups by the definition: the `folded` most similar sources join the destination they resemble most."""
        unit = self.x / self.x.norm(dim=1, keepdim=True)
        places = self.view.places.tolist()
        best = {}
        for token in set(range(len(unit))) - set(places):
            cosines = [float(unit[token] @ unit[place]) for place in places]
            best[token] = max(cosines), int(np.argmax(cosines))
        order = sorted(best, key=lambda token: -best[token][0])
        groups = [[place] for place in places]
        for token in order[:folded]:
            groups[best[token][1]].append(token)
        return groups + [[token] for token in order[folded:]]

    def heads(self, projection: Any, tokens: Tensor) -> Tensor:
        """H×N×d."""
        return projection(tokens).unflatten(-1, (self.attn.heads, -1)).transpose(0, 1)

    def weights(self) -> Tensor:
        """n×N weights by the formulas of the methods, in float64."""
        tokens, places = len(self.y), self.view.places
        if self.attention == "agent":
            shown, keys = self.groups(tokens - 16), self.groups(int(0.4 * tokens))
        else:
            shown = keys = self.groups(int((0.4 if self.attention == "merge" else 0.8) * tokens))
        looks = torch.stack([self.y[group].mean(0) for group in shown[: len(places)]])
        if self.attention == "kv":
            looks = self.y[places]
        q = self.heads(self.attn.to_q, looks)
        k = self.heads(self.attn.to_k, torch.stack([self.y[group].mean(0) for group in keys]))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        if self.attention != "merge":
            scores = scores + torch.tensor([len(group) for group in keys]).double().log()
        shares = scores.exp() / scores.exp().sum(-1, keepdim=True)
        out = torch.zeros(len(places), tokens, dtype=torch.float64)
        for number, group in enumerate(keys):
            out[:, group] = shares.mean(0)[:, number, None] / len(group)
        self.shown = shown
        return out


@pytest.fixture(scope="module")
def pipe() -> Any:
    # The families share their text encoders and VAEs.
    pipe = copy.deepcopy(families.sd("StableDiffusionPipeline")()).to(torch.float64)
    forward = pipe.text_encoder.forward

    def in_float64(*args: Any, **kwargs: Any) -> Any:
        """Older text encoders make their masks in the default type."""
        torch.set_default_dtype(torch.float64)
        try:
            return forward(*args, **kwargs)
        finally:
            torch.set_default_dtype(torch.float32)

    pipe.text_encoder.forward = in_float64
    return agentsd.apply(pipe, CONFIG)


@pytest.fixture(scope="module")
def looked(pipe: Any) -> dict[str, Looked]:
    return {attention: Looked(pipe, attention) for attention in LOOKED_AT}


@pytest.mark.parametrize("attention", LOOKED_AT)
def test_groups_and_attention_are_those_of_the_definition(looked: dict[str, Looked], attention: str) -> None:
    view, truth = looked[attention].view, looked[attention].weights()
    assert (view.attention, view.layer, view.step, view.grid) == (attention, LAYER, LOOKED_AT[attention], (16, 16))
    found = [(view.index == number).nonzero().flatten().tolist() for number in range(int(view.index.max()) + 1)]
    places = view.places.tolist()
    shown = [sorted(group) for group in looked[attention].shown]
    assert found[: len(places)] == shown[: len(places)]
    assert sorted(found[len(places) :]) == sorted(shown[len(places) :])
    assert all(view.index[place] == number for number, place in enumerate(places))
    for agent in range(len(places)):
        weights = view.attention_map(agent)
        assert weights.shape == view.grid
        assert weights.dtype == torch.float64
        assert weights.sum().item() == pytest.approx(1, abs=1e-12)
        torch.testing.assert_close(weights.flatten(), truth[agent], rtol=1e-9, atol=0)
    assert truth.std(0).max() > 1e-4, "agents that all look alike would prove nothing"


def test_every_cell_has_one_destination_and_every_agent_one_group(looked: dict[str, Looked]) -> None:
    view = looked["agent"].view
    cells = {(place // 16 // 4, place % 16 // 4) for place in view.places.tolist()}
    assert len(cells) == len(view.places) == 16
    assert len(view.index.unique()) == len(view.places)


def test_the_image_is_that_of_an_ordinary_run_and_nothing_is_left_behind(pipe: Any, looked: dict[str, Looked]) -> None:
    call = {"num_inference_steps": STEPS, "guidance_scale": 3.0}
    image = pipe(PROMPT, **call, generator=torch.Generator().manual_seed(3)).images[0]
    assert [np.array_equal(image, one.view.image) for one in looked.values()] == [True] * 3

    def state() -> list[dict[Any, Any]]:
        attn = looked["agent"].attn
        return [dict(attn._forward_hooks), dict(attn._forward_pre_hooks), dict(vars(attn.processor))]

    before = state()
    with pytest.raises(ValueError, match="step is 2"):
        agentsd.visualize(pipe, PROMPT, 2, 0, num_inference_steps=2)
    agentsd.visualize(pipe, PROMPT, 0, 0, num_inference_steps=1)
    assert state() == before


def on_grey(view: View) -> View:
    return replace(view, image=Image.new("RGB", (64, 64), (128, 128, 128)))


def pixel(picture: Image.Image, token: int) -> tuple[int, ...]:
    """The middle of a token of a 16×16 grid."""
    row, column = divmod(token, 16)
    value = picture.getpixel((int((column + 0.5) * picture.width / 16), int((row + 0.5) * picture.height / 16)))
    assert isinstance(value, tuple)
    return value


def test_destinations_are_drawn_in_the_colours_of_their_groups(looked: dict[str, Looked]) -> None:
    view = on_grey(looked["merge"].view)
    places = view.places.tolist()
    assert [pixel(view.destinations, place) for place in places] == [colour(number) for number in range(len(places))]
    others = {pixel(view.destinations, token) for token in set(range(256)) - set(places)}
    assert others == {(70, 70, 70)}
    sizes = view.index.bincount()
    seen: dict[int, set[tuple[int, ...]]] = {}
    for token, group in enumerate(view.index.tolist()):
        seen.setdefault(group, set()).add(pixel(view.groups, token))
    assert all(len(colours) == 1 for colours in seen.values())
    assert {group for group, colours in seen.items() if colours == {(128, 128, 128)}} == set(
        (sizes == 1).nonzero().flatten().tolist()
    )
    assert len({colour(number) for number in range(256)}) == 256


def test_heat_is_hottest_where_the_agent_looks_most(looked: dict[str, Looked]) -> None:
    view = on_grey(looked["agent"].view)
    middle = view.nearest(40, 24)
    heat = np.asarray(view.heat(middle), dtype=float).sum(-1)
    weights = view.attention_map(middle).flatten()
    hottest, coldest = (
        float(heat[np.ix_(*(slice_of(divmod(int(token), 16)[axis]) for axis in (0, 1)))].max())
        for token in (weights.argmax(), weights.argmin())
    )
    assert hottest > 1.5 * coldest
    assert view.nearest(0, 0) == int(view.index[view.places[0]])
    row, column = divmod(int(view.places[middle]), 16)
    distance = (((view.places // 16) - row) ** 2 + ((view.places % 16) - column) ** 2).float()
    assert distance.argmin() == middle
    assert view.agents.size == (4 * 256 + 3 * 4, 3 * 256 + 2 * 4)


def slice_of(token: int) -> np.ndarray:
    return np.arange(token * 32, (token + 1) * 32)


def stock(pipe: Any) -> Any:
    return agentsd.remove(pipe)


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (stock, {}, "not accelerated"),
        (None, {"step": 6}, r"step is 6; it must be from 0 to 5"),
        (None, {"step": -1}, r"step is -1; it must be a whole number from 0"),
        (None, {"step": 1.0}, r"step is 1.0; it must be"),
        (None, {"prompt": ["a", "b"]}, "prompt is .*; it must be one text"),
        (None, {"layer": "unet.mid"}, f"layer is 'unet.mid'; it must be a name .* such as '{LAYER}', .* from 0 to 6"),
        (None, {"layer": 7}, "layer is 7; it must be .* from 0 to 6"),
        (None, {"layer": 3}, r"layer unet.up_blocks.0\S+ is stock in step 1"),
        (lambda pipe: pipe.unet.set_attention_slice(1), {"step": 3}, "SlicedAttnProcessor in step 3"),
    ],
)
def test_bad_input_gets_one_sentence(
    change: Callable[[Any], Any] | None, arguments: dict[str, Any], message: str
) -> None:
    pipe = agentsd.apply(families.sd("StableDiffusionPipeline")(), CONFIG)
    (change or (lambda pipe: pipe))(pipe)
    with pytest.raises(ValueError, match=message) as error:
        agentsd.visualize(pipe, **{"prompt": PROMPT, "step": 1, "layer": 0, "num_inference_steps": STEPS} | arguments)
    assert "\n" not in str(error.value)


def test_pooled_agents_and_controlnets_and_sdxl_are_shown_too() -> None:
    image = families.picture(0)
    pipe = families.sd("StableDiffusionControlNetPipeline", lambda: {"controlnet": families.controlnet()})()
    agentsd.apply(pipe, ratio=0.4, phases=(Phase(stride=4, agents="pool"),))
    rows = [row.name for row in agentsd.describe(pipe).layers]
    layer = next(index for index, name in enumerate(rows) if name.startswith("controlnet"))
    view = agentsd.visualize(pipe, PROMPT, 1, layer, num_inference_steps=2, image=image)
    assert view.layer == rows[layer]
    assert torch.equal(view.index.view(16, 16)[::4, ::4].flatten(), torch.arange(16))
    assert torch.equal(view.index.view(4, 4, 4, 4), view.index.view(4, 4, 4, 4)[:, :1, :, :1].expand(4, 4, 4, 4))
    assert view.attention_map(15).sum().item() == pytest.approx(1, abs=1e-5)

    pipe = agentsd.apply(families.sdxl("StableDiffusionXLPipeline")(), "faithful")
    view = agentsd.visualize(pipe, PROMPT, 1, 0, num_inference_steps=2)
    assert (view.attention, view.grid, len(view.places)) == ("kv", (16, 16), 64)


def test_groups_that_are_held_and_layers_that_are_not_computed() -> None:
    pipe = families.sd("StableDiffusionPipeline")()
    agentsd.apply(pipe, phases=(Phase(attention="kv", stride=4, match_interval=2, reuse_interval=2),))
    first, second, third = (agentsd.visualize(pipe, PROMPT, step, 0, num_inference_steps=3) for step in range(3))
    for view in (first, second, third):
        assert torch.equal(view.index[view.places], torch.arange(16))
    assert torch.equal(second.index, first.index)
    assert torch.equal(second.places, first.places)
    assert not torch.equal(second.attention_map(3), first.attention_map(3))
    assert not torch.equal(third.places, first.places)
    agentsd.apply(pipe, phases=(Phase(attention="kv", stride=2, levels=(1, 2), reuse_interval=2),))
    deep = next(row.name for row in agentsd.describe(pipe).layers if row.level == 2)
    assert agentsd.visualize(pipe, PROMPT, 0, deep, num_inference_steps=2).grid == (8, 8)
    with pytest.raises(ValueError, match="is not computed in step 1"):
        agentsd.visualize(pipe, PROMPT, 1, deep, num_inference_steps=2)


def test_a_compiled_block_is_looked_into() -> None:
    pipe = agentsd.apply(families.sd("StableDiffusionPipeline")(), CONFIG)
    find_layers(pipe.unet)[0].block.compile(backend="eager")
    call = {"num_inference_steps": 2, "guidance_scale": 1.0}
    pipe(PROMPT, **call)
    assert agentsd.visualize(pipe, PROMPT, 0, 0, **call).attention == "merge"
