"""Training under the patch: gradients are right, and a LoRA learns."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import agentsd
from agentsd import KV, Agent, AgentSDConfig, Merge, Phase

TECHNIQUES = {
    "agent": Agent(stride=2, ratio=0.1),
    "merge": Merge(ratio=0.5, proportional=True, parts=("attn", "crossattn", "mlp")),
    "kv": KV(stride=2),
}


def throughout(name: str) -> AgentSDConfig:
    return AgentSDConfig((Phase(attention=TECHNIQUES[name]),))


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def unet(tiny_unet: Callable[..., Any]) -> Any:
    return tiny_unet(block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=8).double()


@pytest.mark.parametrize("name", TECHNIQUES)
@pytest.mark.parametrize("mode", ["ordinary", "deterministic"])
def test_gradients_are_those_of_finite_differences(unet: Any, name: str, mode: str) -> None:
    unet.requires_grad_(False)
    agentsd.apply(unet, throughout(name))
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, 4, 6, 8, generator=generator, dtype=torch.double, requires_grad=True)
    text = torch.randn(1, 3, 8, generator=generator, dtype=torch.double, requires_grad=True)

    def forward(sample: Tensor, text: Tensor) -> Tensor:
        out: Tensor = unet(sample, 500, text).sample
        return out

    if mode == "deterministic":
        with deterministic():
            assert torch.autograd.gradcheck(forward, (sample, text), fast_mode=True)
    else:
        assert torch.autograd.gradcheck(forward, (sample, text), fast_mode=True)


@pytest.mark.parametrize("name", TECHNIQUES)
def test_deterministic_algorithms_sum_in_a_fixed_order_and_give_the_same(unet: Any, name: str) -> None:
    """scatter_reduce is the operation that has no deterministic form on CUDA."""
    agentsd.apply(unet.requires_grad_(False), throughout(name))
    called: set[str] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    generator = torch.Generator().manual_seed(0)
    call = torch.randn(2, 4, 10, 14, generator=generator).double(), 300, torch.randn(2, 3, 8).double()
    with Watch():
        ordinary = unet(*call).sample
    assert "scatter_reduce" in called
    called.clear()
    with deterministic(), Watch():
        fixed = unet(*call).sample
    assert "index_add" in called
    assert "scatter_reduce" not in called
    torch.testing.assert_close(fixed, ordinary, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", TECHNIQUES)
def test_a_call_with_gradients_may_follow_one_in_inference_mode(unet: Any, name: str) -> None:
    """What a call keeps for the next ones is no inference tensor, which autograd refuses to save."""
    agentsd.apply(unet, throughout(name))
    call = torch.randn(1, 4, 10, 14).double(), 300, torch.randn(1, 3, 8).double()
    with torch.inference_mode():
        unet(*call)
    unet(*call).sample.sum().backward()
    assert unet.conv_in.weight.grad.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["paper", "fast"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_lora_learns(unet: Any, preset: str, checkpointing: bool) -> None:
    from peft import LoraConfig

    unet.float().requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    if checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    agentsd.apply(unet, preset)
    weights = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 4, 16, 16, generator=generator)
    text, target = torch.randn(2, 3, 8, generator=generator), torch.randn(2, 4, 16, 16, generator=generator) * 0.1
    losses = []
    for step in range(12):
        loss = (unet(sample, torch.tensor([900, 200][step % 2]), text).sample - target).square().mean()
        loss.backward()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in weights)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-2:]) < 0.95 * sum(losses[:2])
