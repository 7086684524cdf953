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
from agentsd import KV, Agent, AgentSDConfig, Merge, Phase, StepCache, View
from agentsd.hosts.diffusers_unet import find_layers
from agentsd.views import colour

PROMPT, STEPS = "a red circle", 6
LAYER = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
CONFIG = AgentSDConfig(
    phases=(
        Phase(until=0.4, attention=Agent(ratio=0.4, stride=4)),
        Phase(until=0.7, attention=Merge(ratio=0.4, stride=2)),
        Phase(until=1.0, attention=KV(stride=4, kv_ratio=0.8)),
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

    def groups(self, merged: int) -> list[list[int]]:
        """The groups by the definition: the `merged` most similar sources join the destination they resemble most."""
        unit = self.x / self.x.norm(dim=1, keepdim=True)
        destinations = self.view.destination_tokens.tolist()
        best = {}
        for token in set(range(len(unit))) - set(destinations):
            cosines = [float(unit[token] @ unit[other]) for other in destinations]
            best[token] = max(cosines), int(np.argmax(cosines))
        order = sorted(best, key=lambda token: -best[token][0])
        groups = [[token] for token in destinations]
        for token in order[:merged]:
            groups[best[token][1]].append(token)
        return groups + [[token] for token in order[merged:]]

    def heads(self, projection: Any, tokens: Tensor) -> Tensor:
        """H×N×d."""
        return projection(tokens).unflatten(-1, (self.attn.heads, -1)).transpose(0, 1)

    def weights(self) -> Tensor:
        """n×N weights by the formulas of the methods, in float64."""
        tokens, destinations = len(self.y), self.view.destination_tokens
        if self.attention == "agent":
            shown, keys = self.groups(tokens - 16), self.groups(int(0.4 * tokens))
        else:
            shown = keys = self.groups(int((0.4 if self.attention == "merge" else 0.8) * tokens))
        looks = torch.stack([self.y[group].mean(0) for group in shown[: len(destinations)]])
        if self.attention == "kv":
            looks = self.y[destinations]
        q = self.heads(self.attn.to_q, looks)
        k = self.heads(self.attn.to_k, torch.stack([self.y[group].mean(0) for group in keys]))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        if self.attention == "kv":
            scores = scores + torch.tensor([len(group) for group in keys]).double().log()
        shares = scores.exp() / scores.exp().sum(-1, keepdim=True)
        out = torch.zeros(len(destinations), tokens, dtype=torch.float64)
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
    destinations = view.destination_tokens.tolist()
    shown = [sorted(group) for group in looked[attention].shown]
    assert found[: len(destinations)] == shown[: len(destinations)]
    assert sorted(found[len(destinations) :]) == sorted(shown[len(destinations) :])
    assert all(view.index[token] == number for number, token in enumerate(destinations))
    for agent in range(len(destinations)):
        weights = view.attention_map(agent)
        assert weights.shape == view.grid
        assert weights.dtype == torch.float64
        assert weights.sum().item() == pytest.approx(1, abs=1e-12)
        torch.testing.assert_close(weights.flatten(), truth[agent], rtol=1e-9, atol=0)
    assert truth.std(0).max() > 1e-4, "agents that all look alike would prove nothing"


def test_every_cell_has_one_destination_and_every_agent_one_group(looked: dict[str, Looked]) -> None:
    view = looked["agent"].view
    cells = {(token // 16 // 4, token % 16 // 4) for token in view.destination_tokens.tolist()}
    assert len(cells) == len(view.destination_tokens) == 16
    assert len(view.index.unique()) == len(view.destination_tokens)


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
    destinations = view.destination_tokens.tolist()
    assert [pixel(view.destinations, token) for token in destinations] == [
        colour(number) for number in range(len(destinations))
    ]
    others = {pixel(view.destinations, token) for token in set(range(256)) - set(destinations)}
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
    assert view.nearest(0, 0) == int(view.index[view.destination_tokens[0]])
    row, column = divmod(int(view.destination_tokens[middle]), 16)
    distance = (((view.destination_tokens // 16) - row) ** 2 + ((view.destination_tokens % 16) - column) ** 2).float()
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
        (None, {"layer": 3}, r"layer unet.up_blocks.0\S+ is unmodified in step 1"),
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


def test_controlnets_and_sdxl_are_shown_too() -> None:
    image = families.picture(0)
    pipe = families.sd("StableDiffusionControlNetPipeline", lambda: {"controlnet": families.controlnet()})()
    agentsd.apply(pipe, phases=(Phase(attention=Agent(stride=4)),))
    rows = [row.name for row in agentsd.describe(pipe).layers]
    layer = next(index for index, name in enumerate(rows) if name.startswith("controlnet"))
    view = agentsd.visualize(pipe, PROMPT, 1, layer, num_inference_steps=2, image=image)
    assert (view.layer, view.attention) == (rows[layer], "agent")
    assert view.attention_map(15).sum().item() == pytest.approx(1, abs=1e-5)

    pipe = agentsd.apply(families.sdxl("StableDiffusionXLPipeline")(), "faithful")
    view = agentsd.visualize(pipe, PROMPT, 1, 0, num_inference_steps=2)
    assert (view.attention, view.grid, len(view.destination_tokens)) == ("kv", (16, 16), 64)


def test_steps_differ_and_layers_that_a_cached_step_skips_cannot_be_seen() -> None:
    pipe = families.sd("StableDiffusionPipeline")()
    cached = StepCache(interval=2, layers=2)
    agentsd.apply(pipe, phases=(Phase(attention=KV(stride=4)),), steps=cached)
    first, second = (agentsd.visualize(pipe, PROMPT, step, 0, num_inference_steps=3) for step in range(2))
    for view in (first, second):
        assert torch.equal(view.index[view.destination_tokens], torch.arange(16))
    assert not torch.equal(second.destination_tokens, first.destination_tokens)
    assert not torch.equal(second.attention_map(3), first.attention_map(3))
    agentsd.apply(pipe, phases=(Phase(attention=KV(stride=2), levels=(1, 2)),), steps=cached)
    deep = next(row.name for row in agentsd.describe(pipe).layers if row.level == 2)
    assert agentsd.visualize(pipe, PROMPT, 0, deep, num_inference_steps=2).grid == (8, 8)
    with pytest.raises(ValueError, match="is not computed in step 1"):
        agentsd.visualize(pipe, PROMPT, 1, deep, num_inference_steps=2)


def test_the_pipelines_progress_bar_is_as_it_was() -> None:
    pipe = agentsd.apply(families.sd("StableDiffusionPipeline")(), CONFIG)
    pipe.set_progress_bar_config(desc="mine", disable=True)
    agentsd.visualize(pipe, PROMPT, 0, 0, num_inference_steps=1)
    assert pipe._progress_bar_config == {"desc": "mine", "disable": True}


def test_a_compiled_block_is_looked_into() -> None:
    pipe = agentsd.apply(families.sd("StableDiffusionPipeline")(), CONFIG)
    find_layers(pipe.unet)[0].block.compile(backend="eager")
    call = {"num_inference_steps": 2, "guidance_scale": 1.0}
    pipe(PROMPT, **call)
    assert agentsd.visualize(pipe, PROMPT, 0, 0, **call).attention == "merge"
