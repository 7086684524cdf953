"""Compiled by inductor on a CPU: no graph break, no recompilation, and what eager gives."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import agentsd
from agentsd.ops import kernels

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler"),
]
STEPS = torch.linspace(999, 19, 50).long()


@pytest.mark.parametrize(("how", "dtype"), [("the UNet", torch.float32), ("repeated blocks", torch.bfloat16)])
def test_two_runs_of_fifty_steps_and_another_prompt(
    tiny_unet: Callable[..., Any], how: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The operation of this package is in the graph on machines too on which the fused kernel is faster.
    monkeypatch.setattr(kernels, "plain_products_are_faster", lambda: True)
    generator = torch.Generator().manual_seed(0)
    unet = tiny_unet(
        block_out_channels=(16,),
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",),
    )
    unet = agentsd.apply(unet.to(dtype).requires_grad_(False))
    sample = torch.randn(2, 4, 16, 16, generator=generator).to(dtype)
    texts = [torch.randn(2, 5, 32, generator=generator).to(dtype) for _ in range(2)]

    def run(text: Tensor, timesteps: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return [unet(sample, t, text).sample for t in timesteps]

    eager = run(texts[0], STEPS)
    torch._dynamo.reset()
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    with torch._dynamo.config.patch({limit: 64}):
        if how == "the UNet":
            unet.compile(fullgraph=True)
        else:
            unet.compile_repeated_blocks(fullgraph=True)
        compiled = run(texts[0], STEPS)
        with torch._dynamo.config.patch(error_on_recompile=True):
            again = run(texts[0], STEPS.clone())
            other = run(texts[1], STEPS.clone())
    torch._dynamo.reset()
    for a, b, c in zip(eager, compiled, again, strict=True):
        assert torch.equal(b, c)
        # Half precision rounds in other places, and a token may go to another of two destinations that are as similar.
        assert (a - b).norm() / a.norm() < (1e-5 if dtype == torch.float32 else 3e-2)
    assert not torch.equal(other[0], again[0])
