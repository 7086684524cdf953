"""Step reuse against DeepCache, and against stock with features put in by hand; and what must never be stale."""

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import agentsd
from agentsd import AgentSDConfig, Phase
from agentsd.patch import find_layers, patch_of
from agentsd.reuse import whole_calls
from conftest import build_unet
from families import FAMILIES, Family

Run = Callable[..., Tensor]


def only(**fields: Any) -> AgentSDConfig:
    return AgentSDConfig(phases=(Phase(**{"attention": "stock"} | fields),))


@pytest.fixture
def unet() -> Any:
    model = build_unet(layers_per_block=2).double().requires_grad_(False)
    for layer in find_layers(model):
        layer.block.attn1.to_q.weight.mul_(4)
        layer.block.attn1.to_out[0].weight.mul_(4)
    return model


def embedding(seed: int = 3, batch: int = 2) -> Tensor:
    return torch.randn(batch, 5, 32, generator=torch.Generator().manual_seed(seed)).double()


def denoised(
    unet: Any,
    steps: int = 20,
    text: Tensor | None = None,
    size: int = 16,
    start: int = 0,
    stop: int | None = None,
    scheduler: Any = None,
    apart: bool = False,
) -> Tensor:
    """The latents of a run of DDIM with guidance, in one call for each step or in two (`apart`)."""
    scheduler = scheduler or diffusers.DDIMScheduler()
    scheduler.set_timesteps(steps)
    text = embedding() if text is None else text
    halves = text.chunk(2)
    x = torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(5)).double()
    for t in scheduler.timesteps[start:stop]:
        if apart:
            without, given = (unet(x, t, half)[0] for half in halves)
        else:
            without, given = unet(torch.cat([x, x]), t, text)[0].chunk(2)
        x = scheduler.step(without + 3 * (given - without), t, x).prev_sample
    return x


@pytest.mark.slow
@pytest.mark.parametrize("branch", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("interval", [2, 3])
def test_the_latents_are_those_of_deepcache(unet: Any, branch: int, interval: int) -> None:
    from DeepCache import DeepCacheSDHelper

    agentsd.apply(unet, only(reuse_interval=interval, reuse_layers=branch + 1))
    ours = denoised(unet)
    agentsd.remove(unet)
    stock = denoised(unet)
    scheduler = diffusers.DDIMScheduler()
    helper = DeepCacheSDHelper(SimpleNamespace(unet=unet, scheduler=scheduler))
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    helper.enable()
    torch.testing.assert_close(ours, denoised(unet, scheduler=scheduler), rtol=1e-12, atol=1e-12)
    assert (ours - stock).abs().max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["paper", "fast"])
def test_interval_1_is_no_reuse_bit_for_bit(unet: Any, preset: str) -> None:
    config = AgentSDConfig.from_preset(preset)
    values = config.to_dict()
    for phase in values["phases"]:
        phase |= {"reuse_interval": 1, "reuse_layers": 2, "extrapolate": 1.0, "match_interval": 1}
    expected = denoised(agentsd.apply(unet, config))
    assert torch.equal(denoised(agentsd.apply(unet, AgentSDConfig.from_dict(values))), expected)
    assert torch.equal(denoised(agentsd.apply(unet, config.replace(cross_reuse_from=1.0))), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "share"), [(17, "17%"), (10, "30%"), (19, None), (50, None)])
def test_a_run_of_few_steps_is_warned_of_once(unet: Any, steps: int, share: str | None) -> None:
    agentsd.apply(unet, only(reuse_interval=3, reuse_layers=1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(2):
            denoised(unet, steps, embedding(seed))
    said = [str(warning.message) for warning in caught if "reuse_interval" in str(warning.message)]
    expected = f"reuse_interval is 3: in a run of {steps} steps, {share} of the noise schedule lie between two whole"
    assert len(said) == (share is not None)
    assert all(message.startswith(expected) for message in said)


@contextlib.contextmanager
def put_in_by_hand(unet: Any, module: str, interval: int, share: float) -> Iterator[None]:
    """The definition: every call of the stock UNet is whole, but the output of a module is replaced in most.

    Calls at one timestep are told apart by their order.
    """
    calls: dict[int, list[tuple[int, Tensor]]] = {}
    seen: dict[str, Any] = {"key": None, "turn": 0, "step": {}}

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        t = args[1] if len(args) > 1 else kwargs["timestep"]
        key = t.storage_offset()
        seen["turn"] = seen["turn"] + 1 if key == seen["key"] else 0
        seen["key"] = key
        seen["step"][seen["turn"]] = seen["step"].get(seen["turn"], -1) + 1

    def after(_: Any, args: Any, out: Any) -> Any:
        step, whole = seen["step"][seen["turn"]], calls.setdefault(seen["turn"], [])
        needed = 2 if share else 1
        if len(whole) < needed or step - whole[-1][0] >= interval:
            whole.append((step, out[0] if isinstance(out, tuple) else out))
            return None
        (i1, F1), (i0, F0) = whole[-1], whole[-2 if share else -1]
        features = F1 + share * (step - i1) / (i1 - i0) * (F1 - F0) if share else F1
        return (features,) if isinstance(out, tuple) else features

    handles = [
        unet.register_forward_pre_hook(before, with_kwargs=True),
        unet.get_submodule(module).register_forward_hook(after),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# Blocks of another kind; and a pipeline that makes the embedding anew in each step, as a change of prompt would.
NOT_REUSING = ("AnimateDiff", "ControlNet-XS", "SDXL ControlNet-XS", "LDM")
REUSING = [name for name in FAMILIES if not name.startswith(NOT_REUSING)]


@pytest.mark.slow
@pytest.mark.parametrize("name", REUSING)
def test_every_family_draws_what_stock_draws_with_features_put_in_by_hand(name: str) -> None:
    """ControlNets, adapters, img2img, inpainting, SDXL: one whole level is computed in every second or third call."""
    family: Family = FAMILIES[name]
    pipe, stock = family.build(), family.build()
    last = len(pipe.unet.up_blocks) - 1
    for module, fields in (
        (f"up_blocks.{last - 1}", {"reuse_depth": 1}),
        (f"up_blocks.{last}.resnets.0", {"reuse_layers": 1}),
    ):
        if "reuse_layers" in fields and hasattr(pipe.unet.up_blocks[last], "attentions"):
            module = f"up_blocks.{last}.attentions.0"
        agentsd.apply(pipe, only(reuse_interval=2, **fields))
        ours = family.draw(pipe)
        with put_in_by_hand(stock.unet, module, 2, 0):
            expected = family.draw(stock)
        assert torch.equal(ours, expected)
    assert torch.equal(ours, family.draw(stock)) == (name == "SDXL few-step")
    assert torch.equal(family.draw(agentsd.remove(pipe)), family.draw(stock))


@pytest.mark.parametrize("apart", [False, True], ids=["one call", "two calls"])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_extrapolation_is_the_line_through_the_last_two_whole_calls(unet: Any, share: float, apart: bool) -> None:
    agentsd.apply(unet, only(reuse_interval=3, extrapolate=share))
    ours = denoised(unet, apart=apart)
    agentsd.remove(unet)
    with put_in_by_hand(unet, "up_blocks.0", 3, share):
        torch.testing.assert_close(ours, denoised(unet, apart=apart), rtol=1e-7, atol=1e-9)


def test_guidance_in_two_calls_is_guidance_in_one(unet: Any) -> None:
    agentsd.apply(unet, "turbo")
    torch.testing.assert_close(denoised(unet, apart=True), denoised(unet), rtol=1e-9, atol=1e-9)


def interrupted(unet: Any, text: Tensor) -> None:
    """A run that ends with an exception inside a UNet call."""

    def fail(*_: Any) -> None:
        raise RuntimeError("interrupted")

    with unet.conv_out.register_forward_pre_hook(fail), pytest.raises(RuntimeError, match="interrupted"):
        denoised(unet, text=text)


SAME = embedding()


@pytest.mark.parametrize(
    "before",
    [
        lambda unet: denoised(unet, text=SAME),
        lambda unet: denoised(unet, text=SAME, stop=7),
        lambda unet: denoised(unet, text=embedding(9), stop=7),
        lambda unet: denoised(unet, text=SAME, size=32, stop=7),
        lambda unet: denoised(unet, text=embedding(3, batch=2)[:1].repeat(2, 1, 1), stop=5),
        lambda unet: denoised(unet, text=SAME, stop=7, apart=True),
        lambda unet: interrupted(unet, SAME),
        lambda unet: unet(torch.ones(2, 4, 16, 16).double(), 999, SAME),
        lambda unet: [unet(torch.ones(2, 4, 16, 16).double(), t, SAME) for t in (999, 990, 980)],
    ],
    ids=["whole run", "stopped", "prompt", "size", "batch", "two calls", "exception", "number", "numbers"],
)
def test_nothing_stale_enters_another_image(unet: Any, before: Callable[[Any], Any]) -> None:
    """The run that follows starts in the middle of the schedule, where what was held could pass for its own."""
    config = AgentSDConfig.from_preset("turbo").replace(cross_reuse_from=0.3)
    expected = denoised(agentsd.apply(unet, config), text=SAME, start=8)
    agentsd.apply(unet, config)
    before(unet)
    assert torch.equal(denoised(unet, text=SAME, start=8), expected)


def test_nothing_stale_after_a_part_of_the_run_was_stock(unet: Any) -> None:
    """Each part between two stock ones starts with a whole call."""
    agentsd.apply(unet, only(reuse_interval=10))
    patch, text, x = patch_of(unet), embedding(), torch.ones(2, 4, 16, 16).double()
    assert patch is not None
    assert patch.reuse is not None
    computed = []
    unet.mid_block.resnets[0].register_forward_hook(lambda *_: computed.append(step))
    timesteps = torch.arange(900, 0, -100)
    for step, t in enumerate(timesteps):
        with agentsd.disabled(unet) if step == 4 else contextlib.nullcontext():
            unet(x, t, text)
    assert computed == [0, 4, 5]


def test_what_is_held_is_let_go_after_the_last_step_and_described(unet: Any) -> None:
    agentsd.apply(unet, "turbo", cross_reuse_from=0.5)
    patch = patch_of(unet)
    assert patch is not None
    assert patch.reuse is not None
    assert str(agentsd.describe(unet)).endswith("held between calls: at most 0 MiB so far")
    denoised(unet, stop=9)
    held = sum(lane.bytes for lane in patch.reuse.lanes)
    features = patch.reuse.lanes[0].features
    assert [tuple(tensor.shape) for _, tensor in features] == [(2, 16, 16, 16)] * 2
    denoised(unet)
    gc.collect()
    assert held > 0
    assert sum(lane.bytes for lane in patch.reuse.lanes) == 0
    assert patch.reuse.bytes >= 2 * 2 * 16 * 16 * 16 * 8
    described = str(agentsd.describe(unet))
    assert f"{patch.reuse.bytes / 2**20:.2g} MiB" in described
    assert (
        "0.3–0.7: one UNet call in 2 is whole, and any over 0.045 of the schedule after the last whole one" in described
    )


def test_the_outermost_layer_alone_is_computed_in_between(unet: Any) -> None:
    agentsd.apply(unet, only(reuse_interval=5, reuse_layers=1))
    called: list[str] = []
    for name, module in unet.named_modules():
        if type(module).__name__ in ("ResnetBlock2D", "Transformer2DModel", "Downsample2D", "Upsample2D"):
            inner = next(child for child in module.children() if list(child.parameters()))
            inner.register_forward_hook(lambda *_, name=name: called.append(name))
    text, x = embedding(), torch.ones(2, 4, 16, 16).double()
    counts = []
    for t in torch.arange(900, 0, -100):
        called.clear()
        unet(x, t, text)
        counts.append(len(called))
        if counts[-1] != counts[0]:
            assert called == ["up_blocks.1.resnets.2", "up_blocks.1.attentions.2"]
    assert [count == counts[0] for count in counts] == [i % 5 == 0 for i in range(9)]


def test_phases_reuse_each_in_its_way(unet: Any) -> None:
    """A phase of another cut starts whole; one of the same cut goes on with the features that there are."""
    phases = (
        Phase(until=0.25, attention="stock"),
        Phase(until=0.55, attention="stock", reuse_interval=2),
        Phase(attention="stock", reuse_interval=3, reuse_layers=1),
    )
    agentsd.apply(unet, AgentSDConfig(phases=phases))
    whole: list[bool] = []
    patch = patch_of(unet)
    assert patch is not None
    reuse = patch.reuse
    assert reuse is not None
    unet.register_forward_pre_hook(lambda *_: whole.append(reuse.layers == 0))
    denoised(unet, steps=10)
    assert whole == [True, True, True, False, True, True, False, False, True, False]


@given(steps=st.integers(1, 200), interval=st.integers(1, 12), spacing=st.sampled_from(["uniform", "quadratic"]))
def test_as_many_calls_are_whole_whatever_the_spacing(steps: int, interval: int, spacing: str) -> None:
    whole = whole_calls(steps, interval, spacing)
    assert len(whole) == -(-steps // interval)
    assert min(whole) == 0
    assert max(whole) < steps
    if spacing == "uniform":
        assert sorted(whole) == list(range(0, steps, interval))


def test_quadratic_spacing_is_densest_in_the_middle_of_the_phase(unet: Any) -> None:
    assert sorted(whole_calls(20, 4, "quadratic")) == [0, 6, 9, 10, 13]
    agentsd.apply(unet, only(reuse_interval=4, reuse_spacing="quadratic"))
    computed: list[int] = []
    unet.mid_block.resnets[0].register_forward_hook(lambda *_: computed.append(len(calls) - 1))
    calls: list[int] = []
    unet.register_forward_pre_hook(lambda *_: calls.append(1))
    denoised(unet)
    assert computed == [0, 6, 9, 10, 13]


def whole_steps(unet: Any, **run: Any) -> list[float]:
    """Timesteps of the whole calls of a run."""
    times: list[float] = []
    computed: list[float] = []
    hooks = [
        unet.register_forward_pre_hook(lambda _, args: times.append(float(args[1]))),
        unet.mid_block.resnets[0].register_forward_hook(lambda *_: computed.append(times[-1])),
    ]
    denoised(unet, **run)
    for hook in hooks:
        hook.remove()
    return computed


@pytest.mark.parametrize(("steps", "interval"), [(50, 3), (25, 3), (24, 2), (20, 2), (13, 2), (12, 1), (6, 1)])
def test_runs_of_few_steps_reuse_less(unet: Any, steps: int, interval: int) -> None:
    fields = {"attention": "kv", "stride": 2, "reuse_layers": 1, "extrapolate": 0.7}
    expected = denoised(agentsd.apply(unet, only(**fields, reuse_interval=interval)), steps)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = denoised(agentsd.apply(unet, only(**fields, reuse_interval=3, reuse_span=0.08)), steps)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("span", [0.03, 0.08, 0.2, 1.0])
@pytest.mark.parametrize("spacing", ["uniform", "quadratic"])
def test_no_call_reuses_what_is_farther_away_than_the_span(unet: Any, span: float, spacing: str) -> None:
    """On a schedule whose steps differ in length."""
    scheduler = diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True)
    agentsd.apply(unet, only(reuse_interval=4, reuse_spacing=spacing))
    limit = whole_steps(unet, steps=25, scheduler=scheduler)
    agentsd.apply(unet, only(reuse_interval=4, reuse_spacing=spacing, reuse_span=span))
    whole = whole_steps(unet, steps=25, scheduler=scheduler)
    for t in scheduler.timesteps.tolist():
        assert min(last for last in whole if last >= t) - t <= 1000 * span + 1e-6
    assert (whole == limit) == (span == 1)
    assert spacing == "uniform" or set(limit) <= set(whole)


def test_cross_attention_is_held_from_the_gate_on(unet: Any) -> None:
    """Against outputs that are put in by hand."""
    agentsd.apply(unet, only(), cross_reuse_from=0.5)
    ours = denoised(unet)
    stock = denoised(agentsd.remove(unet))
    kept: dict[str, Tensor] = {}
    step = -1

    def count(*_: Any) -> None:
        nonlocal step
        step += 1

    unet.register_forward_pre_hook(count)
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            module.register_forward_hook(
                lambda _, args, out, name=name: kept.setdefault(name, out) if step >= 9 else None
            )
    by_hand = denoised(unet)
    assert torch.equal(ours, by_hand)
    assert not torch.equal(ours, stock)


def test_held_cross_attentions_and_step_reuse_go_together(unet: Any) -> None:
    """The inner layers hold theirs from the first whole call after the gate."""
    agentsd.apply(unet, only(reuse_interval=4), cross_reuse_from=0.5)
    calls: dict[str, list[int]] = {}
    step = -1

    def count(*_: Any) -> None:
        nonlocal step
        step += 1

    unet.register_forward_pre_hook(count)
    for name, module in unet.named_modules():
        if name.endswith("attn2.to_q"):
            module.register_forward_hook(lambda *_, name=name: calls.setdefault(name, []).append(step))
    denoised(unet)
    outer = calls["up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q"]
    inner = calls["mid_block.attentions.0.transformer_blocks.0.attn2.to_q"]
    assert outer == [*range(10), 10, 11, 12]
    assert inner == [0, 4, 8, 12]


def test_a_match_serves_several_steps(unet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import agentsd.processor as processor

    times = 0
    stock = processor.match

    def counted(*args: Any) -> Any:
        nonlocal times
        times += 1
        return stock(*args)

    monkeypatch.setattr(processor, "match", counted)
    layers = sum(layer.level == 1 for layer in find_layers(unet))
    kv = {"attention": "kv", "stride": 2}
    every = denoised(agentsd.apply(unet, only(**kv)))
    assert times == 20 * layers
    times = 0
    third = denoised(agentsd.apply(unet, only(match_interval=3, **kv)))
    assert times == 7 * layers
    assert not torch.equal(every, third)

    agentsd.apply(unet, only(match_interval=3, **kv), use_rand=False)
    x, text = torch.ones(2, 4, 16, 16).double(), embedding()
    kept = [unet(x, t, text)[0] for t in (500, 499)]
    agentsd.apply(unet, only(**kv), use_rand=False)
    torch.testing.assert_close(kept[1], unet(x, 499, text)[0], rtol=0.05, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "graphs"),
    [
        (only(reuse_interval=3), 2),
        (only(reuse_interval=3, reuse_layers=1, extrapolate=0.7), 2),
        (only(attention="kv", match_interval=2), 2),
        (AgentSDConfig.from_preset("turbo"), 2),
        (only().replace(cross_reuse_from=0.5), 3),
    ],
    ids=["held", "extrapolated", "groups kept", "turbo", "cross-attentions held"],
)
def test_compiled_each_kind_of_call_is_a_graph_of_its_own(config: AgentSDConfig, graphs: int) -> None:
    """No graph break and no recompilation over a run, a second run, and another prompt."""
    from torch._dynamo.testing import CompileCounter

    unet = build_unet(layers_per_block=2).double().requires_grad_(False)
    agentsd.apply(unet, config)
    eager = denoised(unet)
    counter = CompileCounter()
    torch._dynamo.reset()
    model = torch.compile(unet, fullgraph=True, backend=counter)
    assert torch.equal(denoised(model), eager)
    # torch 2.6 guards the phase as a whole, so that each phase has graphs of its own.
    assert graphs <= counter.frame_count <= graphs * len(config.phases)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(denoised(model), eager)
        denoised(model, text=embedding(8))


@pytest.mark.slow
def test_offload_on_either_side(unet: Any) -> None:
    expected = denoised(agentsd.apply(unet, "turbo"))
    accelerate.cpu_offload(unet, torch.device("cpu"))
    assert torch.equal(denoised(unet), expected)
    agentsd.remove(unet)
    assert torch.equal(denoised(agentsd.apply(unet, "turbo")), expected)


def test_a_hook_that_was_there_before_comes_back(unet: Any) -> None:
    """As offload by blocks puts one in the place of a block's forward."""
    calls: list[int] = []

    class Hook(accelerate.hooks.ModelHook):
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return args, kwargs

    accelerate.hooks.add_hook_to_module(unet.mid_block, Hook())
    hooked = vars(unet.mid_block)["forward"]
    agentsd.apply(unet, only(reuse_interval=2))
    denoised(unet, steps=4)
    assert len(calls) == 2
    agentsd.remove(unet)
    assert vars(unet.mid_block)["forward"] is hooked
    denoised(unet, steps=4)
    assert len(calls) == 6


def test_a_copy_reuses_its_own(unet: Any) -> None:
    import copy

    expected = denoised(agentsd.apply(unet, "turbo"))
    other = copy.deepcopy(unet)
    with torch.no_grad():
        unet.mid_block.resnets[0].conv1.weight.zero_()
    agentsd.remove(unet)
    assert torch.equal(denoised(other), expected)
    own = patch_of(other)
    assert own is not None
    assert own.reuse is not None
    assert all(spot.module in set(other.modules()) for spot in own.reuse.spots)


def test_what_cannot_be_reused_is_refused_and_changes_nothing(unet: Any) -> None:
    stock = denoised(unet, steps=3)
    for config, message in (
        (only(reuse_interval=2, reuse_depth=2), "reuse_depth is 2; for this UNet2DConditionModel it must be at most 1"),
        (
            only(reuse_interval=2, reuse_layers=6),
            "reuse_layers is 6; for this UNet2DConditionModel it must be at most 5",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            agentsd.apply(unet, config)
        assert torch.equal(denoised(unet, steps=3), stock)
        assert not agentsd.is_applied(unet)
    motion = FAMILIES[next(name for name in FAMILIES if name.startswith("AnimateDiff"))].build()
    with pytest.raises(
        ValueError, match=r"reuse_interval is 3; it must be 1 for UNetMotionModel, whose blocks .* are not"
    ):
        agentsd.apply(motion, only(reuse_interval=3))
    for fields, message in (
        ({"reuse_interval": 0}, "reuse_interval is 0; it must be a whole number from 1"),
        ({"reuse_depth": True}, "reuse_depth is True; it must be a whole number from 1"),
        ({"reuse_layers": 0.5}, "reuse_layers is 0.5; it must be null or a whole number from 1"),
        ({"match_interval": -1}, "match_interval is -1; it must be a whole number from 1"),
        ({"reuse_span": -0.1}, "reuse_span is -0.1; it must be a number from 0 to 1"),
        ({"reuse_span": True}, "reuse_span is True; it must be a number from 0 to 1"),
        ({"extrapolate": 3}, "extrapolate is 3; it must be a number from 0 to 2"),
        ({"reuse_spacing": "cubic"}, "reuse_spacing is 'cubic'; it must be one of uniform, quadratic"),
        ({"levels": {0: {"reuse_interval": 2}}}, "level 0 is .*; it must be a mapping without until, levels, reuse"),
    ):
        with pytest.raises(ValueError, match=message):
            Phase(**fields)
    with pytest.raises(ValueError, match=r"cross_reuse_from is 0.5; it must be null where merge_crossattn is true"):
        AgentSDConfig(phases=(Phase(merge_crossattn=True),), cross_reuse_from=0.5)
