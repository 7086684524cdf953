"""What only a CUDA device can show: the same numbers, the same images again, no waiting for the device, CUDA graphs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import agentsd
from agentsd import AgentSDConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TIMESTEPS = torch.tensor([999, 799, 599, 399, 199])
PRESETS = AgentSDConfig.presets()


def inputs(channels: int = 32, cells: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 4, cells, cells, generator=generator), torch.randn(2, 5, channels, generator=generator)


def run(unet: Any, sample: Tensor, text: Tensor, timesteps: Tensor = TIMESTEPS) -> list[Tensor]:
    weight = next(unet.parameters())
    sample, text, timesteps = sample.to(weight), text.to(weight), timesteps.to(weight.device)
    with torch.no_grad():
        return [unet(sample, t, text).sample.clone() for t in timesteps]


def relative(ours: Tensor, exact: Tensor) -> float:
    return ((ours.double().cpu() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_equals_float64_on_the_cpu(tiny_unet: Callable[..., Any], preset: str, dtype: torch.dtype) -> None:
    exact = run(agentsd.apply(tiny_unet().double(), preset), *inputs())
    stock = [
        relative(a, b)
        for a, b in zip(
            run(tiny_unet().to("cuda", dtype), *inputs()), run(tiny_unet().double(), *inputs()), strict=True
        )
    ]
    ours = run(agentsd.apply(tiny_unet().to("cuda", dtype), preset), *inputs())
    # Half precision also moves tokens between destinations that are as similar.
    slack = 2 if dtype == torch.float32 else 10
    assert max(relative(a, b) for a, b in zip(ours, exact, strict=True)) < slack * max(stock) + 1e-5


@pytest.mark.parametrize("preset", PRESETS)
def test_the_same_again(tiny_unet: Callable[..., Any], preset: str) -> None:
    unet = agentsd.apply(tiny_unet().cuda().half(), preset)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = run(unet, *inputs()), run(unet, *inputs())
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("preset", PRESETS)
def test_half_precision_is_finite_at_the_shapes_of_sd21(preset: str) -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("cuda"):
        net = UNet2DConditionModel(
            sample_size=96, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
        )
    unet = agentsd.apply(net.half().eval(), preset)
    assert all(torch.isfinite(out).all() for out in run(unet, *inputs(1024, 96)))


@pytest.mark.parametrize("preset", PRESETS)
def test_no_synchronisation_in_a_step(tiny_unet: Callable[..., Any], preset: str) -> None:
    unet = agentsd.apply(tiny_unet().cuda().half(), preset)
    sample, text = (tensor.cuda().half() for tensor in inputs())
    timesteps = TIMESTEPS.cuda()
    with torch.no_grad():
        unet(sample, timesteps[0], text)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for timestep in timesteps:
                unet(sample, timestep, text)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_without_recompiling(tiny_unet: Callable[..., Any], mode: str) -> None:
    unet = agentsd.apply(tiny_unet().cuda().requires_grad_(False))
    eager = run(unet, *inputs())
    torch._dynamo.reset()
    unet.compile(fullgraph=True, mode=mode)
    run(unet, *inputs())
    with torch._dynamo.config.patch(error_on_recompile=True):
        again = run(unet, *inputs(), TIMESTEPS.clone())
        run(unet, *(tensor.flip(1) for tensor in inputs()))
    assert max(relative(a, b.double().cpu()) for a, b in zip(again, eager, strict=True)) < 1e-3
