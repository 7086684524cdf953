"""Any size, any batch, several pipelines: what an accelerated image may depend on, and what not."""

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import agentsd
from agentsd import KV, Agent, AgentSDConfig, Phase
from agentsd.hosts.diffusers_unet import find_layers
from families import FAMILIES, unet
from operations import called

PROMPT, OTHER_PROMPT = "a red circle", "two blue stars"
EARLY, LATE = 801, 101
PAPER = AgentSDConfig()
BOTH_LEVELS = AgentSDConfig(
    phases=(
        Phase(until=0.5, attention=Agent(stride=(2, 4)), levels=(1, 2)),
        Phase(attention=KV(stride=(4, 2)), levels=(1, 2)),
    )
)


def build(config: AgentSDConfig | str | None = PAPER, dtype: torch.dtype = torch.float32) -> Any:
    pipe = FAMILIES["SD 1.x text-to-image"].build().to(dtype)
    return pipe if config is None else agentsd.apply(pipe, config)


def draw(pipe: Any, size: tuple[int, int] = (64, 64), seed: int = 0, **options: Any) -> Tensor:
    """Latents after three steps, of which the first is in the phase of agent attention."""
    options = {"prompt": PROMPT, "guidance_scale": 3.0, "generator": torch.Generator().manual_seed(seed)} | options
    with torch.no_grad():
        shape = {"height": size[0], "width": size[1]}
        return called(pipe, **shape, num_inference_steps=3, output_type="latent", **options).images


@contextmanager
def keys_seen(net: Any) -> Iterator[dict[str, int]]:
    """How many keys each self-attention layer computes."""
    seen: dict[str, int] = {}
    handles = []
    for layer in find_layers(net):

        def hook(module: Any, args: tuple[Any, ...], name: str = layer.name) -> None:
            seen[f"unet.{name}"] = args[0].shape[1]

        handles.append(layer.block.attn1.to_k.register_forward_pre_hook(hook))
    yield seen
    for handle in handles:
        handle.remove()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 3), st.sampled_from([PAPER, BOTH_LEVELS]))
def test_every_latent_size_is_accelerated_as_described(
    height: int, width: int, batch: int, config: AgentSDConfig
) -> None:
    """Portrait, panorama, odd grids after downsampling, grids smaller than a cell."""
    net = agentsd.apply(copy.deepcopy(unet()), config)
    generator = torch.Generator().manual_seed(height * 41 + width)
    sample = torch.randn(batch, 4, height, width, generator=generator)
    context = torch.randn(batch, 5, 32, generator=generator)
    for phase, timestep in enumerate((EARLY, LATE)):
        with torch.no_grad(), keys_seen(net) as seen:
            out = net(sample, timestep, context).sample
        assert out.shape == sample.shape
        assert out.isfinite().all()
        assert seen == {row.name: row.plans[phase].keys for row in agentsd.describe(net).layers}


SIZES = [(64, 64), (128, 64), (40, 168), (72, 56), (8, 8), (8, 256), (104, 88)]


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_every_size_that_diffusers_accepts_gives_an_image(size: tuple[int, int]) -> None:
    pipe = build(None)
    stock = draw(pipe, size)
    image = draw(agentsd.apply(pipe), size)
    assert image.isfinite().all()
    # One cell of 4×4 tokens is the least that agents need; 2×2 tokens are merged to no fewer than one.
    assert not torch.equal(image, stock)
    assert torch.equal(draw(agentsd.remove(pipe), size), stock)


def test_sizes_one_after_another_do_not_meet() -> None:
    alone = {size: draw(build(), size) for size in SIZES[:5]}
    pipe = build()
    for size in (*alone, *reversed(alone)):
        assert torch.equal(draw(pipe, size), alone[size])


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def near(image: Tensor, expected: Tensor) -> None:
    """Equal but for the order of additions in float64, which a batch changes."""
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-9)


def test_each_image_of_a_batch_is_the_one_it_is_alone() -> None:
    pipe = build(dtype=torch.float64)
    alone = torch.cat([draw(pipe, seed=seed) for seed in range(9)])
    for batch in range(1, 10):
        near(draw(pipe, num_images_per_prompt=batch, generator=generators(batch)), alone[:batch])


def test_each_prompt_of_several_gives_the_image_it_gives_alone() -> None:
    pipe = build(dtype=torch.float64)
    prompts = [PROMPT, OTHER_PROMPT, ""]
    alone = [draw(pipe, seed=seed, prompt=prompts[seed // 2]) for seed in range(6)]
    near(draw(pipe, prompt=prompts, num_images_per_prompt=2, generator=generators(6)), torch.cat(alone))


def test_guidance_off_is_the_prompt_alone() -> None:
    """Without guidance the batch is half as large, and its images are those that guidance of 1 would mix."""
    pipe = build(dtype=torch.float64)
    image = draw(pipe, guidance_scale=1.0)
    near(draw(pipe, guidance_scale=1.0 + 1e-12), image)
    assert not torch.equal(image, draw(agentsd.remove(pipe), guidance_scale=1.0))


def test_guidance_in_two_calls_gives_the_image_of_one() -> None:
    pipe = build(dtype=torch.float64)
    expected = draw(pipe)
    text, blank = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pipe.scheduler.set_timesteps(3)
    with torch.no_grad():
        for timestep in pipe.scheduler.timesteps:
            without, given_text = (pipe.unet(x, timestep, part).sample for part in (blank, text))
            x = pipe.scheduler.step(without + 3 * (given_text - without), timestep, x).prev_sample
    near(x, expected)


def at_each_step(function: Callable[[], object]) -> dict[str, Any]:
    def callback(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        function()
        return values

    return {"callback_on_step_end": callback}


def test_a_run_inside_a_run_of_another_pipeline_changes_neither() -> None:
    """Between two steps of one pipeline another one draws, with another configuration and another size."""
    one, other = build(PAPER), build(BOTH_LEVELS)
    alone = draw(one), draw(other, (40, 88), seed=1)
    inner: list[Tensor] = []
    image = draw(one, **at_each_step(lambda: inner.append(draw(other, (40, 88), seed=1))))
    assert torch.equal(image, alone[0])
    assert len(inner) == 3
    assert all(torch.equal(each, alone[1]) for each in inner)


@pytest.mark.parametrize("twin", [False, True], ids=["built apart", "a copy"])
def test_two_threads_at_once_draw_what_each_draws_alone(twin: bool) -> None:
    """The threads wait for each other after every step, so that their steps alternate."""
    one = build(PAPER)
    other = agentsd.apply(copy.deepcopy(one) if twin else build(None), BOTH_LEVELS)
    sizes = {0: (64, 64), 1: (40, 88)}
    pipes = {0: one, 1: other}
    images: dict[tuple[str, int], Tensor] = {}

    def work(name: str, which: int, **options: Any) -> None:
        images[name, which] = draw(pipes[which], sizes[which], seed=which, **options)

    for which in pipes:
        thread = threading.Thread(target=work, args=("alone", which))
        thread.start()
        thread.join()
    barrier = threading.Barrier(2, timeout=60)
    threads = [
        threading.Thread(target=work, args=("together", which), kwargs=at_each_step(barrier.wait)) for which in pipes
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for which in pipes:
        assert torch.equal(images["together", which], images["alone", which])
