"""diffusers' guiders that skip or perturb layers of a UNet (PAG, SLG, Auto Guidance), on an accelerated one."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers.guiders import AutoGuidance, PerturbedAttentionGuidance, SkipLayerGuidance
from diffusers.hooks import HookRegistry
from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.hooks.layer_skip import LayerSkipConfig, apply_layer_skip
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor

import agentsd
from agentsd.hosts.diffusers_unet import AgentSDProcessor
from families import unet

EARLY, LATE = 901, 101
# A layer that preset `paper` accelerates.
FQN = "up_blocks.1.attentions.0.transformer_blocks"


@pytest.fixture
def net() -> Any:
    return copy.deepcopy(unet())


def call(net: Any, timestep: int = EARLY) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    sample, text = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 5, 32, generator=generator)
    with torch.no_grad():
        return net(sample, timestep, text).sample


@contextmanager
def skipped(net: Any, **options: bool) -> Iterator[None]:
    """A layer with the hooks that a guider puts on it."""
    off = {"skip_attention": False, "skip_attention_scores": False, "skip_ff": False}
    apply_layer_skip(net, LayerSkipConfig(indices=[0], fqn=FQN, **off | options))
    try:
        yield
    finally:
        HookRegistry.check_if_exists_or_initialize(net).remove_hook("layer_skip_hook", recurse=True)


def test_the_processor_is_registered_with_what_a_stock_one_returns_when_skipped(net: Any) -> None:
    agentsd.apply(net)
    assert AttentionProcessorRegistry.get(AgentSDProcessor) == AttentionProcessorRegistry.get(AttnProcessor2_0)


@pytest.mark.parametrize(
    "options",
    [
        {"skip_attention": True},
        {"skip_attention_scores": True},
        {"skip_ff": True},
        {"skip_attention": True, "skip_ff": True},
    ],
    ids="+".join,
)
@pytest.mark.parametrize("timestep", [EARLY, LATE])
def test_a_skipped_layer_is_skipped_and_comes_back(net: Any, options: dict[str, bool], timestep: int) -> None:
    plain = call(net, timestep)
    with skipped(net, **options):
        stock = call(net, timestep)
    agentsd.apply(net)
    accelerated = call(net, timestep)
    with skipped(net, **options):
        ours = call(net, timestep)
        assert ours.isfinite().all()
        assert not torch.equal(ours, accelerated)
        assert not torch.equal(ours, stock)
        with agentsd.disabled(net):
            assert torch.equal(call(net, timestep), stock)
    assert torch.equal(call(net, timestep), accelerated)
    assert torch.equal(call(agentsd.remove(net), timestep), plain)


def test_perturbed_scores_are_those_of_the_stock_layer(net: Any) -> None:
    """The perturbed layer passes its values through for every token, as stock; merged tokens would not."""
    seen: list[Tensor] = []
    attn = net.get_submodule(FQN)[0].attn1
    tokens = torch.randn(2, 256, 16, generator=torch.Generator().manual_seed(1))
    agentsd.apply(net)
    attn.register_forward_hook(lambda *_: seen.append(attn.processor.state.x))
    with skipped(net, skip_attention_scores=True):
        call(net)
        attn.processor.state.x = tokens
        assert torch.equal(attn(tokens), attn.to_out[0](attn.to_v(tokens)))
    attn.processor.state.x = tokens
    assert not torch.equal(attn(tokens), attn.to_out[0](attn.to_v(tokens)))
    assert seen


@pytest.mark.parametrize(
    "guider",
    [
        PerturbedAttentionGuidance(perturbed_guidance_config=LayerSkipConfig([0], FQN, False, True, False)),
        SkipLayerGuidance(skip_layer_config=LayerSkipConfig([0], FQN)),
        AutoGuidance(auto_guidance_config=LayerSkipConfig([0], FQN)),
    ],
    ids=lambda guider: type(guider).__name__,
)
def test_guiders_prepare_call_and_clean_up(net: Any, guider: Any) -> None:
    agentsd.apply(net)
    accelerated = call(net)
    guider.set_state(step=1, num_inference_steps=10, timestep=torch.tensor(EARLY))
    outputs = []
    for _ in range(guider.num_conditions):
        guider.prepare_models(net)
        outputs.append(call(net))
        guider.cleanup_models(net)
    assert any(not torch.equal(out, accelerated) for out in outputs)
    assert torch.equal(outputs[0], accelerated)
    assert torch.equal(call(net), accelerated)
