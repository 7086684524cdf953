"""The trainable module against its definition written out token by token in float64."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from agentsd.nn import AgentAttention, convert_state_dict
from agentsd.ops.attention import agent_attention
from reference import Grid
from reference_nn import authors_state, convolved, reference


def random_tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loaded(state: dict[str, Tensor], *args: Any, **options: Any) -> AgentAttention:
    module = AgentAttention(
        *args,
        agent_bias="an_bias" in state,
        dwc="dwc.weight" in state,
        **options,
    ).double()
    module.load_state_dict(convert_state_dict(state))
    return module


grids = st.tuples(st.integers(1, 5), st.integers(1, 5))
flags = st.booleans()


@settings(max_examples=30, deadline=None)
@given(grid=grids, made_for=grids, heads=st.integers(1, 3), prefix=st.integers(0, 2), bias=flags, dwc=flags)
def test_module_is_what_the_paper_defines(
    grid: Grid, made_for: Grid, heads: int, prefix: int, bias: bool, dwc: bool
) -> None:
    """On the grid that the parameters were made for and on any other."""
    state = authors_state(6, heads, 4, made_for, bias=bias, dwc=dwc, prefix=prefix)
    module = loaded(state, 6, heads, 4, made_for, class_token=prefix)
    x = random_tokens(2, prefix + grid[0] * grid[1], 6)
    expected = torch.stack([reference(state, picture, grid, heads, 4, prefix) for picture in x])
    torch.testing.assert_close(module(x, grid), expected)


@settings(max_examples=15, deadline=None)
@given(
    cells=grids,
    sr=st.integers(2, 3),
    separate=flags,
    dwc=flags,
)
def test_spatial_reduction(cells: Grid, sr: int, separate: bool, dwc: bool) -> None:
    grid = cells[0] * sr, cells[1] * sr
    state = authors_state(4, 2, 4, grid, sr=sr, separate=separate, dwc=dwc)
    x = random_tokens(1, grid[0] * grid[1], 4)
    out = loaded(state, 4, 2, 4, grid, sr_ratio=sr)(x)
    torch.testing.assert_close(out[0], reference(state, x[0], grid, 2, 4, sr=sr))


@settings(max_examples=15, deadline=None)
@given(grid=grids, window=st.tuples(st.integers(1, 3), st.integers(1, 4)), bias=flags)
def test_windows_attend_each_to_itself(grid: Grid, window: Grid, bias: bool) -> None:
    """A window at the border that the grid does not fill sees only the tokens that there are."""
    state = authors_state(4, 2, 4, window, bias=bias)
    x = random_tokens(1, grid[0] * grid[1], 4)
    out = loaded(state, 4, 2, 4, grid, window=window)(x).view(*grid, 4)
    image = x.view(*grid, 4)
    for top in range(0, grid[0], window[0]):
        for left in range(0, grid[1], window[1]):
            padded = torch.zeros(*window, 4, dtype=torch.float64)
            inside = image[top : top + window[0], left : left + window[1]]
            h, w = inside.shape[:2]
            padded[:h, :w] = inside
            keep = [i < h and j < w for i in range(window[0]) for j in range(window[1])]
            expected = reference(state, padded.flatten(0, 1), window, 2, 4, keep=keep).view(*window, 4)
            torch.testing.assert_close(out[top : top + h, left : left + w], expected[:h, :w])


@settings(max_examples=20, deadline=None)
@given(grid=grids, prefix=st.integers(0, 1), bias=flags, seed=st.integers(0, 99))
def test_mask_is_what_it_says(grid: Grid, prefix: int, bias: bool, seed: int) -> None:
    state = authors_state(4, 2, 4, grid, bias=bias, prefix=prefix)
    module = loaded(state, 4, 2, 4, grid, class_token=prefix)
    x = random_tokens(1, prefix + grid[0] * grid[1], 4)
    mask = random_tokens(1, x.shape[1], seed=seed) > 0
    mask[:, -1] = True
    out = module(x, mask=mask)
    torch.testing.assert_close(out[0], reference(state, x[0], grid, 2, 4, prefix, keep=mask[0].tolist()))
    changed = torch.where(mask[..., None], x, 100 * random_tokens(*x.shape, seed=2))
    torch.testing.assert_close(module(changed, mask=mask)[mask], out[mask])


@settings(max_examples=20, deadline=None)
@given(grid=grids, heads=st.integers(1, 3))
def test_without_bias_and_convolution_it_is_agent_attention(grid: Grid, heads: int) -> None:
    module = AgentAttention(12, heads, 4, grid, agent_bias=False, dwc=False).double()
    x = random_tokens(2, grid[0] * grid[1], 12)
    q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in module.qkv(x).chunk(3, dim=2))
    image = q.transpose(2, 3).reshape(2, 12, *grid)
    agents = torch.nn.functional.adaptive_avg_pool2d(image, 2).view(2, heads, -1, 4).transpose(2, 3)
    out = agent_attention(q, k, v, agents)
    torch.testing.assert_close(module(x), module.proj(out.transpose(1, 2).flatten(2)))


@settings(max_examples=10, deadline=None)
@given(shift=st.floats(-50, 50))
def test_a_bias_that_does_not_distinguish_changes_nothing(shift: float) -> None:
    """The softmax does not see what all tokens have from an agent, nor what all agents give to a token."""
    module = AgentAttention(8, 2, 4, (3, 5)).double()
    x = random_tokens(1, 15, 8)
    before = module(x)
    assert module.b1 is not None
    assert module.b2 is not None
    with torch.no_grad():
        module.b1.map += shift * random_tokens(2, 4, 1, 1)
        module.b2.rows += shift * random_tokens(2, 1, 3)
    torch.testing.assert_close(module(x), before)


def test_gradients() -> None:
    module = AgentAttention(4, 2, 4, (2, 3), class_token=True).double()
    names, parameters = zip(*module.named_parameters(), strict=True)
    assert {"b1.map", "b1.rows", "b1.columns", "b1.prefix", "b2.map", "b2.prefix", "dwc.weight"} <= set(names)

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x, (3, 2)))

    x = random_tokens(1, 7, 4).requires_grad_()
    assert torch.autograd.gradcheck(call, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("options", [{"window": (2, 3)}, {"sr_ratio": 2}])
def test_gradients_of_every_kind(options: dict[str, Any]) -> None:
    module = AgentAttention(4, 2, 4, (4, 4), **options).double()
    x = random_tokens(1, 16, 4).requires_grad_()
    assert torch.autograd.gradcheck(module, (x,), fast_mode=True)
    module(x).square().sum().backward()
    unused = [name for name, parameter in module.named_parameters() if parameter.grad is None]
    assert unused == []


def test_initialisation_is_the_papers() -> None:
    module = AgentAttention(64, 4, 49, (14, 14), class_token=True)
    for name, parameter in module.named_parameters():
        if name.endswith(("map", "rows", "columns", "prefix", "qkv.weight", "proj.weight")):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.15), name
            assert parameter.mean().abs().item() < 0.005, name
        elif not name.startswith("dwc"):
            assert not parameter.any(), name
    assert module.dwc is not None
    assert module.dwc.weight.abs().max().item() <= 1 / 3


def test_grid_follows_the_number_of_tokens() -> None:
    module = AgentAttention(8, 2, 4, (2, 3)).double()
    x = random_tokens(1, 24, 8)
    assert torch.equal(module(x), module(x, (4, 6)))
    with pytest.raises(ValueError, match=r"grid is \(2, 3\); it must have the 25 tokens of x"):
        module(random_tokens(1, 25, 8))


def test_dropout() -> None:
    """Of the attention maps: only the convolution is left. Of the output: nothing is left. In evaluation: none."""
    x = random_tokens(1, 16, 8)
    state = authors_state(8, 2, 4, (4, 4))
    plain = loaded(state, 8, 2, 4, (4, 4))
    module = loaded(state, 8, 2, 4, (4, 4), attn_drop=1.0)
    v = (x @ state["qkv.weight"].T + state["qkv.bias"])[0, :, 16:]
    left = convolved(v, (4, 4), state["dwc.weight"], state["dwc.bias"])
    torch.testing.assert_close(module(x)[0], left @ state["proj.weight"].T + state["proj.bias"])
    assert torch.equal(module.eval()(x), plain(x))
    assert not loaded(state, 8, 2, 4, (4, 4), proj_drop=1.0)(x).any()


def test_attention_is_fused_with_the_bias_as_its_mask() -> None:
    module = AgentAttention(64, 4, 49, (14, 14), class_token=True).eval()
    with torch.no_grad(), torch.profiler.profile() as profile:
        module(torch.randn(1, 197, 64))
    names = [event.name for event in profile.events()]
    assert sum(name == "aten::_scaled_dot_product_flash_attention_for_cpu" for name in names) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    module = AgentAttention(16, 2, 9, (6, 6), class_token=True).eval()
    x = torch.randn(2, 37, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = module(x)
        with torch.autocast("cpu", dtype):
            torch.testing.assert_close(module(x).float(), expected, atol=0.02, rtol=0.02)
        out = module.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("options", [{"class_token": 1}, {"window": 3}, {"sr_ratio": 2}])
def test_compiles_in_one_graph(options: dict[str, Any]) -> None:
    torch.compiler.reset()
    module = AgentAttention(8, 2, 4, (4, 6), **options)
    x = torch.randn(1, 24 + module.prefix, 8)
    torch.testing.assert_close(torch.compile(module, backend="eager", fullgraph=True, dynamic=False)(x), module(x))


def test_work_and_memory_grow_linearly() -> None:
    """Four times the tokens: four times the multiplications, and four times what is kept for the gradient."""
    module = AgentAttention(16, 2, 9, (8, 8))

    def cost(side: int) -> tuple[int, int]:
        saved = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal saved
            saved += tensor.numel()
            return tensor

        with FlopCounterMode(display=False) as flops, torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            module(torch.randn(1, side * side, 16))
        return flops.get_total_flops(), saved

    costs = [cost(side) for side in (16, 32, 64)]
    (work, first), (_, second), (more, third) = costs
    assert more == 16 * work
    # The row and column terms grow with the side.
    assert (third - second) / (second - first) == pytest.approx(4, rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "num_heads is 3; it must be a divisor of dim, 8"),
        ({"agent_num": 5}, "agent_num is 5; it must be a square number"),
        ({"agent_num": 0}, "agent_num is 0; it must be a square number"),
        ({"window": 2, "class_token": True}, "class_token is True, window is 2 and sr_ratio is 1; only one"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AgentAttention(**{"dim": 8, "num_heads": 2, "agent_num": 4, "grid": (4, 4)} | options)


def test_mask_beside_spatial_reduction() -> None:
    module = AgentAttention(8, 2, 4, (4, 4), sr_ratio=2)
    with pytest.raises(ValueError, match="mask is given and sr_ratio is 2"):
        module(torch.randn(1, 16, 8), mask=torch.ones(1, 16, dtype=torch.bool))


def test_whole_models_of_the_authors_are_renamed() -> None:
    """What belongs to no agent attention keeps its name, a softmax attention with `q` and `kv` too."""
    of_block = authors_state(4, 2, 4, (2, 2), separate=True)
    state = {f"block1.0.attn.{name}": value for name, value in of_block.items()}
    others = {"head.weight": torch.ones(2, 4), "block4.0.attn.q.weight": torch.ones(4, 4)}
    converted = convert_state_dict(state | others)
    names = AgentAttention(4, 2, 4, (2, 2)).state_dict()
    assert set(converted) == {f"block1.0.attn.{name}" for name in names} | set(others)
    assert all(converted[name] is value for name, value in others.items())
