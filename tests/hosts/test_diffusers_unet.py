"""How the acceleration of a UNet behaves: what it skips, what it leaves behind, and what an image may depend on."""

import copy
import importlib
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import agentsd
from agentsd import KV, AgentSDConfig, Phase
from agentsd.hosts.diffusers_unet import AgentSDProcessor, block_levels, find_layers, patch_of
from agentsd.planning import level_grid
from agentsd.schedule import Clock

EARLY, LATE = 901, 101
TIMESTEPS = torch.arange(981, 0, -140)


@pytest.fixture
def unet(tiny_unet: Callable[..., Any]) -> Any:
    model = tiny_unet().double().requires_grad_(False)
    for layer in find_layers(model):
        layer.block.attn1.to_q.weight.mul_(4)
        layer.block.attn1.to_out[0].weight.mul_(4)
    return model


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 4, 16, 16, generator=generator).double(), torch.randn(2, 5, 32, generator=generator).double()


def call(unet: Any, inputs: tuple[Tensor, Tensor], timestep: Any = EARLY) -> Tensor:
    return unet(inputs[0], timestep, inputs[1]).sample


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that a patch could leave behind: attributes, hooks, processors."""
    kept: dict[str, Any] = {}
    for name, module in model.named_modules():
        kept[name] = {key: value for key, value in vars(module).items() if not isinstance(value, Tensor)}
        for key, value in kept[name].items():
            kept[name][key] = dict(value) if isinstance(value, dict) else value
    return kept


@pytest.mark.parametrize("preset", AgentSDConfig.presets())
def test_removing_restores_the_stock_model_bit_for_bit_and_leaves_nothing(unet: Any, inputs: Any, preset: str) -> None:
    before, stock = state(unet), call(unet, inputs)
    keys = list(unet.state_dict())
    agentsd.apply(unet, preset)
    assert list(unet.state_dict()) == keys
    assert not torch.equal(call(unet, inputs), stock)
    agentsd.remove(unet)
    assert state(unet) == before
    assert torch.equal(call(unet, inputs), stock)
    agentsd.remove(unet)
    assert state(unet) == before


def test_applying_again_replaces_the_configuration(unet: Any, inputs: Any) -> None:
    before = state(unet)
    once = call(agentsd.apply(unet, ratio=0.2), inputs)
    agentsd.apply(unet, ratio=0.6)
    assert not torch.equal(call(unet, inputs), once)
    agentsd.apply(unet, ratio=0.2)
    assert torch.equal(call(unet, inputs), once)
    assert not isinstance(
        unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.processor.inner, AgentSDProcessor
    )
    agentsd.remove(unet)
    assert state(unet) == before


def test_a_configuration_that_is_refused_changes_nothing(unet: Any, inputs: Any) -> None:
    accelerated = call(agentsd.apply(unet, ratio=0.2), inputs)
    for wrong in (
        {"ratio": 0.9},
        {"levels": 7},
        {"rato": 0.1},
        {"kv_ratio": 0.5},
        {"steps/layers": 9, "steps/interval": 2},
    ):
        with pytest.raises(ValueError):
            agentsd.apply(unet, **wrong)
        assert torch.equal(call(unet, inputs), accelerated)


def test_disabled_and_applied_are_contexts(unet: Any, inputs: Any) -> None:
    before, stock = state(unet), call(unet, inputs)
    with agentsd.applied(unet, ratio=0.3):
        accelerated = call(unet, inputs)
        assert agentsd.is_applied(unet)
        with agentsd.disabled(unet):
            assert torch.equal(call(unet, inputs), stock)
        assert torch.equal(call(unet, inputs), accelerated)
        with pytest.raises(RuntimeError), agentsd.applied(unet, "fast"):
            raise RuntimeError
        assert torch.equal(call(unet, inputs), accelerated)
    assert not torch.equal(accelerated, stock)
    assert not agentsd.is_applied(unet)
    assert state(unet) == before


def test_global_random_state_is_neither_read_nor_changed(unet: Any, inputs: Any) -> None:
    agentsd.apply(unet)
    first = call(unet, inputs)
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)  # noqa: NPY002
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    assert torch.equal(call(unet, inputs), first)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])  # noqa: NPY002


def test_the_image_does_not_depend_on_what_ran_before(unet: Any, inputs: Any) -> None:
    agentsd.apply(unet)
    first = [call(unet, inputs, t) for t in TIMESTEPS]
    call(unet, (inputs[0][:1, :, :10, :14], inputs[1][:1]), LATE)
    with pytest.raises(RuntimeError):
        call(unet, (inputs[0], inputs[1][:, :, :7]), EARLY)
    again = [call(unet, inputs, t) for t in TIMESTEPS]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_guidance_in_one_call_or_two_sees_the_same_destinations(unet: Any, inputs: Any) -> None:
    agentsd.apply(unet)
    for timestep in (EARLY, LATE):
        together = call(unet, inputs, timestep)
        apart = torch.cat([call(unet, (inputs[0][i : i + 1], inputs[1][i : i + 1]), timestep) for i in range(2)])
        torch.testing.assert_close(together, apart, rtol=0, atol=1e-12)


def test_destinations_move_from_step_to_step_and_with_the_seed(unet: Any, inputs: Any) -> None:
    config = AgentSDConfig((Phase(attention=KV(stride=2)),))
    outputs = [call(agentsd.apply(unet, config, seed=seed), inputs) for seed in (0, 1, None)]
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    patch = patch_of(agentsd.apply(unet, config))
    seen = []
    for timestep in (EARLY, EARLY, LATE):
        call(unet, inputs, timestep)
        seen.append(patch.plans[1].destinations)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


@contextmanager
def device_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Everything that would wait for a GPU to hand a number to Python."""
    reads: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (
                torch.ops.aten._local_scalar_dense,
                torch.ops.aten.nonzero,
                torch.ops.aten.equal,
            ):
                reads.append(str(func))
            return func(*args, **(kwargs or {}))

    def counting(name: str) -> Callable[..., Any]:
        stock = getattr(Tensor, name)

        def method(self: Tensor, *args: Any) -> Any:
            reads.append(name)
            return stock(self, *args)

        return method

    with monkeypatch.context() as patch, Watch():
        for name in ("tolist", "item", "numpy", "cpu", "__bool__"):
            patch.setattr(Tensor, name, counting(name))
        yield reads


@pytest.mark.parametrize("preset", AgentSDConfig.presets())
def test_one_device_read_per_image_and_none_per_step(
    unet: Any, inputs: Any, preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    agentsd.apply(unet, preset)
    for timesteps in (TIMESTEPS.clone(), torch.linspace(999.0, 1.0, 20)):
        with device_reads(monkeypatch) as reads:
            for timestep in timesteps:
                call(unet, inputs, timestep)
        assert reads == ["tolist"]


def test_the_clock_reads_what_the_tensor_holds() -> None:
    clock = Clock()
    values = torch.tensor([981.0, 500.5, 3.25])
    assert [clock.read(t) for t in values] == values.tolist()
    assert [clock.read(t) for t in values[1:].expand(4, 2).T.flip(0)] == [3.25, 500.5]
    values[1] = 7.0
    assert clock.read(values[1]) == 7.0
    assert [clock.read(torch.tensor(float(t))) for t in range(50)] == [float(t) for t in range(50)]
    assert clock.read(torch.tensor([5, 6])) == 5
    assert clock.read(12) == 12
    with torch.inference_mode():
        assert [clock.read(t) for t in torch.arange(3)] == [0, 1, 2]


def test_masks_and_other_token_counts_go_to_the_wrapped_processor(unet: Any, inputs: Any) -> None:
    mask = torch.ones(2, 256, dtype=torch.double)
    mask[:, 100:] = 0
    attn = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    tokens = torch.randn(2, 256, 16).double()
    bias = (1 - mask)[:, None] * -1e4
    stock = attn(tokens, attention_mask=bias), attn(tokens[:, :99]), attn(tokens, encoder_hidden_states=tokens[:, :9])
    agentsd.apply(unet)
    call(unet, inputs)
    attn.processor.state.x = tokens
    accelerated = attn(tokens)
    for metric, kwargs, want in (
        (tokens, {"attention_mask": bias}, stock[0]),
        (tokens[:, :99], {}, stock[1]),
        (tokens, {"encoder_hidden_states": tokens[:, :9]}, stock[2]),
    ):
        attn.processor.state.x = metric
        assert torch.equal(attn(metric, **kwargs), want)
    assert not torch.equal(accelerated, attn.processor.inner(attn, tokens))


def test_a_grid_smaller_than_the_stride_stays_stock(unet: Any, inputs: Any) -> None:
    small = inputs[0][..., :2, :12], inputs[1]
    stock = call(unet, small)
    agentsd.apply(unet, stride=(2, 4))
    assert torch.equal(call(unet, small), stock)
    assert "stock: smaller than a cell" in str(agentsd.describe(unet))


def test_processors_put_in_the_place_of_ours_are_wrapped_at_the_next_call(unet: Any, inputs: Any) -> None:
    accelerated = call(agentsd.apply(unet), inputs)
    for processor in (AttnProcessor(), SlicedAttnProcessor(1), AttnProcessor2_0()):
        unet.set_attn_processor(processor)
        torch.testing.assert_close(call(unet, inputs), accelerated, rtol=0, atol=1e-10)
        layer = find_layers(unet)[0].block
        assert layer.attn1.processor.inner is processor
        assert len(layer.norm1._forward_pre_hooks) == 1
    agentsd.remove(unet)
    assert {type(p) for p in unet.attn_processors.values()} == {AttnProcessor2_0}


def test_a_processor_of_another_kind_is_skipped_and_reported(unet: Any, inputs: Any) -> None:
    class Own(AttnProcessor2_0):
        pass

    attn = find_layers(unet)[0].block.attn1
    attn.set_processor(Own())
    with pytest.warns(UserWarning, match=r"agentsd skips 1 of 3 covered layers of UNet2DConditionModel because of Own"):
        agentsd.apply(unet)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(unet, inputs)
    assert type(attn.processor) is Own
    report = agentsd.describe(unet)
    assert report.layers[0].skipped == "Own"
    assert report.saved(report.layers[0]) == 0
    assert "skipped: Own" in str(report)


def test_nothing_but_processors_of_another_kind_is_an_error(unet: Any) -> None:
    class Own(AttnProcessor2_0):
        pass

    unet.set_attn_processor(Own())
    before = state(unet)
    with pytest.raises(ValueError, match=r"no self-attention layer that can be accelerated: Own is not supported"):
        agentsd.apply(unet)
    assert state(unet) == before


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("diffusers.models.attention", "BasicTransformerBlock"),
        ("diffusers.models.transformers.transformer_2d", "Transformer2DModel"),
        ("diffusers.models.attention_processor", "FusedAttnProcessor2_0"),
    ],
)
def test_a_class_that_diffusers_renames_is_met_by_an_error_that_names_it(
    unet: Any, module: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(importlib.import_module(module), name)
    before = state(unet)
    with pytest.raises((ImportError, AttributeError), match=name):
        agentsd.apply(unet)
    assert state(unet) == before


def test_processors_that_diffusers_kept_aside_come_back_right(unet: Any, inputs: Any) -> None:
    stock = call(unet, inputs)
    accelerated = call(agentsd.apply(unet), inputs)
    unet.fuse_qkv_projections()
    torch.testing.assert_close(call(unet, inputs), accelerated, rtol=0, atol=1e-10)
    unet.unfuse_qkv_projections()
    assert torch.equal(call(unet, inputs), accelerated)
    unet.fuse_qkv_projections()
    agentsd.remove(unet)
    unet.unfuse_qkv_projections()
    assert not any(isinstance(processor, AgentSDProcessor) for processor in unet.attn_processors.values())
    assert torch.equal(call(unet, inputs), stock)


def test_a_copy_is_independent(unet: Any, inputs: Any) -> None:
    accelerated = call(agentsd.apply(unet), inputs)
    twin = copy.deepcopy(unet)
    agentsd.remove(unet)
    assert agentsd.is_applied(twin)
    assert torch.equal(call(twin, inputs), accelerated)
    stock = call(unet, inputs)
    agentsd.remove(twin)
    assert torch.equal(call(twin, inputs), stock)


def test_batches_sizes_and_odd_grids(unet: Any) -> None:
    agentsd.apply(unet)
    for batch, height, width in ((1, 16, 16), (3, 10, 22), (2, 30, 14), (9, 8, 8)):
        sample, context = torch.randn(batch, 4, height, width).double(), torch.randn(batch, 5, 32).double()
        for timestep in (EARLY, LATE):
            assert call(unet, (sample, context), timestep).isfinite().all()


def test_levels_count_from_the_latent_grid(tiny_unet: Callable[..., Any]) -> None:
    unet = tiny_unet(
        block_out_channels=(8, 8, 16, 16),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )
    assert block_levels(unet) == {
        **{f"down_blocks.{i}": i + 1 for i in range(4)},
        "mid_block": 4,
        **{f"up_blocks.{i}": 4 - i for i in range(4)},
    }
    seen: dict[str, int] = {}
    for layer in find_layers(unet):
        layer.block.norm1.register_forward_pre_hook(
            lambda m, args, name=layer.name: seen.update({name: args[0].shape[1]})
        )
    unet(torch.randn(1, 4, 19, 13), 5, torch.randn(1, 3, 32))
    assert len(seen) == 10
    for layer in find_layers(unet):
        height, width = level_grid((19, 13), layer.level)
        assert seen[layer.name] == height * width


def test_levels_choose_the_resolutions(tiny_unet: Callable[..., Any]) -> None:
    finest_is_second = tiny_unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")
    )
    report = agentsd.describe(agentsd.apply(finest_is_second))
    assert {row.level for row in report.layers if row.plans[0].attention} == {2}
    with pytest.raises(
        ValueError, match=r"levels is \[\[1\]\]; UNet2DConditionModel has self-attention at levels \[2\]"
    ):
        agentsd.apply(finest_is_second, AgentSDConfig((Phase(),)), levels=1)


def test_a_model_without_spatial_self_attention_is_refused(tiny_unet: Callable[..., Any]) -> None:
    bare = tiny_unet(
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, mid_block_type="UNetMidBlock2D"
    )
    with pytest.raises(ValueError, match="no spatial self-attention"):
        agentsd.apply(bare)
    with pytest.raises(ValueError, match="must be a diffusers pipeline"):
        agentsd.apply(object())


def test_describe_counts_tokens_agents_and_work(unet: Any) -> None:
    report = agentsd.describe(agentsd.apply(unet))
    row = report.layers[0]
    assert (row.grid, row.tokens, row.level) == ((16, 16), 256, 1)
    agent, merge = row.plans
    assert (agent.attention, agent.queries, agent.agents) == ("agent", 256 - 102, 16)
    assert (merge.attention, merge.queries, merge.agents) == ("merge", 256 - 102, 0)
    work = 0.4 * 4 * 154 * 16 + 0.6 * 2 * 154**2
    assert report.saved(row) == pytest.approx(1 - work / (2 * 256**2))
    table = str(report)
    for words in ("16×16", "agent: 154 tokens, 16 agents", "merge: 154 tokens", "0–0.4", "0.4–1"):
        assert words in table
    assert "not applied" in str(agentsd.describe(agentsd.remove(unet)))


@pytest.mark.parametrize("preset", AgentSDConfig.presets())
def test_no_attention_map_is_materialised(tiny_unet: Callable[..., Any], preset: str) -> None:
    """The largest tensor made is the similarity of tokens and destinations, once for all eight heads."""
    unet = agentsd.apply(tiny_unet(attention_head_dim=8).requires_grad_(False), preset)
    tokens, largest = 48 * 48, {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            outputs = func(*args, **(kwargs or {}))
            for out in outputs if isinstance(outputs, tuple | list) else (outputs,):
                if isinstance(out, Tensor):
                    largest[timestep] = max(
                        largest.get(timestep, 0), out.untyped_storage().nbytes() // out.element_size()
                    )
            return outputs

    for timestep in (EARLY, LATE):
        with Watch():
            unet(torch.randn(1, 4, 48, 48), timestep, torch.randn(1, 5, 32))
        stride = 4 if (preset, timestep) in (("paper", EARLY), ("fast", EARLY), ("fast", LATE)) else 2
        assert largest[timestep] <= max(tokens * tokens // stride**2, tokens * 128)


@pytest.mark.slow
def test_compiled_blocks_do_not_break_or_recompile(tiny_unet: Callable[..., Any], inputs: Any) -> None:
    from torch._dynamo.testing import CompileCounter

    unet = tiny_unet().requires_grad_(False)
    inputs = inputs[0].float(), inputs[1].float()
    agentsd.apply(unet)
    eager = [call(unet, inputs, t) for t in TIMESTEPS]
    counter = CompileCounter()
    torch._dynamo.reset()
    unet.compile_repeated_blocks(fullgraph=True, backend=counter)
    # torch 2.6 makes graphs for each block by itself, more than its limit for one function.
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    with torch._dynamo.config.patch({limit: 64}):
        compiled = [call(unet, inputs, t) for t in TIMESTEPS]
        graphs = counter.frame_count
        again = [call(unet, inputs, t) for t in TIMESTEPS]
    assert counter.frame_count == graphs
    for a, b, c in zip(eager, compiled, again, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "how"), [("paper", "wrapped"), ("paper", "in place"), ("paper", "wrapped before"), ("fast", "in place")]
)
def test_the_compiled_unet_has_one_graph_per_phase(
    tiny_unet: Callable[..., Any], inputs: Any, preset: str, how: str
) -> None:
    """No graph break, and no recompilation over a run, a second run, or another prompt."""
    from torch._dynamo.testing import CompileCounter

    unet = tiny_unet().requires_grad_(False)
    inputs = inputs[0].float(), inputs[1].float()
    stock = call(unet, inputs, TIMESTEPS[0])
    agentsd.apply(unet, preset)
    eager = [call(unet, inputs, t) for t in TIMESTEPS]
    counter = CompileCounter()
    torch._dynamo.reset()
    model = unet
    if how == "in place":
        unet.compile(fullgraph=True, backend=counter)
    else:
        model = torch.compile(unet, fullgraph=True, backend=counter)
    if how == "wrapped before":
        assert torch.equal(call(agentsd.remove(model), inputs, TIMESTEPS[0]), stock)
        agentsd.apply(model, preset)
    before = counter.frame_count
    compiled = [call(model, inputs, t) for t in TIMESTEPS]
    assert counter.frame_count - before == len(AgentSDConfig.from_preset(preset).ends)
    with torch._dynamo.config.patch(error_on_recompile=True):
        again = [call(model, inputs, t) for t in TIMESTEPS.clone()]
        call(model, (inputs[0], inputs[1].flip(1)), TIMESTEPS[-1])
    for a, b, c in zip(eager, compiled, again, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert torch.equal(call(agentsd.remove(model), inputs, TIMESTEPS[0]), stock)


def test_nothing_is_said_in_ordinary_use(unet: Any, inputs: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agentsd.apply(unet)
        call(unet, inputs)
        agentsd.remove(unet)
