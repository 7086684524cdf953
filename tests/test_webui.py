"""The extension for AUTOMATIC1111 and Forge, on thin hosts that call it as they do, with real tensors."""

from functools import partial

import pytest
import torch

from agentsd.integrations import ldm
from ldm_host import KV, VARIANTS, build, by_diffusers, grid_at, inputs, layer_calls


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("xl", [False, True])
def test_hooks_on_modules_do_what_the_processor_for_diffusers_does(xl: bool, name: str) -> None:
    config, unet = VARIANTS[name], build(xl=xl)
    x, context = inputs(20, 12)
    before = unet(x, torch.tensor([900, 900]), context)
    ldm.apply(unet, KV)
    ldm.apply(unet, config)
    for timestep in (900, 300):
        times = torch.full((2,), float(timestep))
        for layer, metric, n, out in layer_calls(unet, "attn1", partial(unet, x, times, context)):
            expected = by_diffusers(unet, config, layer, metric, n, grid_at(x, layer), timestep)
            assert (out - expected).abs().max() < 1e-9
    ldm.remove(unet)
    ldm.remove(unet)
    assert torch.equal(unet(x, torch.tensor([900, 900]), context), before)
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in unet.modules())
