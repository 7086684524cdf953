"""The step cache against DeepCache, and against stock with features put in by hand; and what must never be stale."""

import contextlib
import copy
import gc
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from torch import Tensor

import agentsd
from agentsd import KV, AgentSDConfig, Phase, StepCache
from agentsd.cache.steps import StepCacheState, full_steps
from agentsd.hosts.diffusers_unet import find_layers, patch_of
from conftest import build_unet
from families import FAMILIES, Family

# The UNet below has three layers at its outermost level, on each side.
OUTERMOST_LEVEL = 3


def only(**fields: Any) -> AgentSDConfig:
    """The step cache and nothing else."""
    return AgentSDConfig((Phase(attention=None),), StepCache(**fields))


def state_of(unet: Any) -> StepCacheState:
    patch = patch_of(unet)
    assert patch is not None
    state = patch.technique(StepCacheState)
    assert state is not None
    return state


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

    agentsd.apply(unet, only(interval=interval, layers=branch + 1))
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
def test_interval_1_is_no_cache_bit_for_bit(unet: Any, preset: str) -> None:
    expected = denoised(agentsd.apply(unet, preset))
    agentsd.apply(unet, preset, steps=StepCache(interval=1, layers=2, extrapolate=1.0))
    assert torch.equal(denoised(unet), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "share"), [(17, "17%"), (10, "30%"), (19, None), (50, None)])
def test_a_run_of_few_steps_is_warned_of_once(unet: Any, steps: int, share: str | None) -> None:
    agentsd.apply(unet, only(interval=3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(2):
            denoised(unet, steps, embedding(seed))
    said = [str(warning.message) for warning in caught if "interval" in str(warning.message)]
    expected = f"interval of steps is 3: in a run of {steps} steps, {share} of the noise schedule are between two full"
    assert len(said) == (share is not None)
    assert all(message.startswith(expected) for message in said)


@contextlib.contextmanager
def put_in_by_hand(unet: Any, module: str, interval: int, share: float) -> Iterator[None]:
    """The definition: every call of the stock UNet is computed in full, but the output of a module is replaced in most.

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
        step, full = seen["step"][seen["turn"]], calls.setdefault(seen["turn"], [])
        needed = 2 if share else 1
        if len(full) < needed or step - full[-1][0] >= interval:
            full.append((step, out[0] if isinstance(out, tuple) else out))
            return None
        (i1, F1), (i0, F0) = full[-1], full[-2 if share else -1]
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
NOT_CACHING = ("AnimateDiff", "ControlNet-XS", "SDXL ControlNet-XS", "LDM")
CACHING = [name for name in FAMILIES if not name.startswith(NOT_CACHING)]


@pytest.mark.slow
@pytest.mark.parametrize("name", CACHING)
def test_every_family_draws_what_stock_draws_with_features_put_in_by_hand(name: str) -> None:
    """ControlNets, adapters, img2img, inpainting, SDXL; the outermost level is computed in every step, or one layer."""
    family: Family = FAMILIES[name]
    pipe, stock = family.build(), family.build()
    last = len(pipe.unet.up_blocks) - 1
    outermost = pipe.unet.up_blocks[last]
    for module, layers in (
        (f"up_blocks.{last - 1}", len(outermost.resnets)),
        (f"up_blocks.{last}.{'attentions' if hasattr(outermost, 'attentions') else 'resnets'}.0", 1),
    ):
        agentsd.apply(pipe, only(interval=2, layers=layers))
        ours = family.draw(pipe)
        with put_in_by_hand(stock.unet, module, 2, 0):
            expected = family.draw(stock)
        assert torch.equal(ours, expected)
    assert torch.equal(ours, family.draw(stock)) == (name == "SDXL few-step")
    assert torch.equal(family.draw(agentsd.remove(pipe)), family.draw(stock))


@pytest.mark.parametrize("apart", [False, True], ids=["one call", "two calls"])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_extrapolation_is_the_line_through_the_last_two_full_steps(unet: Any, share: float, apart: bool) -> None:
    agentsd.apply(unet, only(interval=3, layers=OUTERMOST_LEVEL, extrapolate=share))
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
    ids=["run", "stopped", "prompt", "size", "batch", "two calls", "exception", "number", "numbers"],
)
def test_nothing_stale_enters_another_image(unet: Any, before: Callable[[Any], Any]) -> None:
    """The run that follows starts in the middle of the schedule, where what was kept could pass for its own."""
    expected = denoised(agentsd.apply(unet, "turbo"), text=SAME, start=8)
    agentsd.apply(unet, "turbo")
    before(unet)
    assert torch.equal(denoised(unet, text=SAME, start=8), expected)


def test_nothing_stale_after_a_part_of_the_run_was_stock(unet: Any) -> None:
    """Each part between two stock ones starts with a full step."""
    agentsd.apply(unet, only(interval=10))
    text, x = embedding(), torch.ones(2, 4, 16, 16).double()
    computed = []
    unet.mid_block.resnets[0].register_forward_hook(lambda *_: computed.append(step))
    timesteps = torch.arange(900, 0, -100)
    for step, t in enumerate(timesteps):
        with agentsd.disabled(unet) if step == 4 else contextlib.nullcontext():
            unet(x, t, text)
    assert computed == [0, 4, 5]


def test_what_is_kept_is_let_go_after_the_last_step_and_described(unet: Any) -> None:
    agentsd.apply(unet, "turbo")
    state = state_of(unet)
    assert str(agentsd.describe(unet)).endswith("kept between steps: at most 0 MiB so far")

    def kept() -> list[Tensor]:
        return [features for history in state.histories for _, features in history.features]

    denoised(unet, stop=9)
    assert [tuple(tensor.shape) for tensor in kept()] == [(2, 16, 16, 16)] * 2
    denoised(unet)
    gc.collect()
    assert not kept()
    assert state.bytes >= 2 * 2 * 16 * 16 * 16 * 8
    described = str(agentsd.describe(unet))
    assert f"{state.bytes / 2**20:.2g} MiB" in described
    assert "0.3–0.7: one step in 2 is full, and any over 0.045 of the schedule after the last full one" in described


def test_the_outermost_layer_alone_is_computed_in_between(unet: Any) -> None:
    agentsd.apply(unet, only(interval=5))
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


def steps_that_are_full(unet: Any, **run: Any) -> list[bool]:
    """Of a run: whether the mid block was computed, which the state has to say beforehand."""
    said: list[bool] = []
    computed: list[bool] = []
    state = state_of(unet)

    def before(*_: Any) -> None:
        assert state.full is not None
        said.append(state.full)
        computed.append(False)

    hooks = [
        unet.register_forward_pre_hook(before),
        unet.mid_block.resnets[0].register_forward_hook(lambda *_: computed.__setitem__(-1, True)),
    ]
    assert state.full is None
    denoised(unet, **run)
    assert state.full is None
    for hook in hooks:
        hook.remove()
    assert said == computed
    return computed


def test_entries_cache_each_in_its_way(unet: Any) -> None:
    """An entry of another cut starts with a full step; one of the same cut goes on with the features that there are."""
    entries = (StepCache(0.25, 1), StepCache(0.55, 2, OUTERMOST_LEVEL), StepCache(1.0, 3, 1))
    agentsd.apply(unet, AgentSDConfig((Phase(attention=None),), entries))
    full = steps_that_are_full(unet, steps=10)
    assert full == [True, True, True, False, True, True, False, False, True, False]
    same_cut = (*entries[:2], StepCache(1.0, 3, OUTERMOST_LEVEL))
    agentsd.apply(unet, AgentSDConfig((Phase(attention=None),), same_cut))
    full = steps_that_are_full(unet, steps=10)
    assert full == [True, True, True, False, True, False, False, True, False, False]


@pytest.mark.parametrize("share", [0.0, 0.7])
@pytest.mark.parametrize(("steps", "interval"), [(10, 1), (11, 2), (20, 3), (19, 4), (3, 5)])
def test_which_steps_are_full_is_known_beforehand(unet: Any, steps: int, interval: int, share: float) -> None:
    cache = StepCache(interval=interval, extrapolate=share, max_gap=1.0)
    expected = [step in full_steps(steps, cache) for step in range(steps)]
    agentsd.apply(unet, AgentSDConfig((Phase(attention=None),), (StepCache(0.001, 2), cache)))
    assert steps_that_are_full(unet, steps=steps) == expected


@pytest.mark.parametrize(("steps", "interval"), [(50, 3), (25, 3), (24, 2), (20, 2), (13, 2), (12, 1), (6, 1)])
def test_runs_of_few_steps_cache_less(unet: Any, steps: int, interval: int) -> None:
    phases = (Phase(attention=KV(stride=2)),)
    equal = AgentSDConfig(phases, StepCache(interval=interval, extrapolate=0.7))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", agentsd.AgentSDWarning)
        expected = denoised(agentsd.apply(unet, equal), steps)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = denoised(agentsd.apply(unet, equal, steps=StepCache(interval=3, max_gap=0.08, extrapolate=0.7)), steps)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("gap", [0.03, 0.08, 0.2, 1.0])
def test_no_cached_step_is_farther_from_the_last_full_one_than_max_gap(unet: Any, gap: float) -> None:
    """On a schedule whose steps differ in length."""
    scheduler = diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True)
    agentsd.apply(unet, only(interval=4))
    unlimited = steps_that_are_full(unet, steps=25, scheduler=scheduler)
    agentsd.apply(unet, only(interval=4, max_gap=gap))
    full = steps_that_are_full(unet, steps=25, scheduler=scheduler)
    times = scheduler.timesteps.tolist()
    for step, t in enumerate(times):
        assert min(times[i] for i in range(step + 1) if full[i]) - t <= 1000 * gap + 1e-6
    assert (full == unlimited) == (gap == 1)


def test_a_call_repeated_from_a_snapshot_is_the_same_call(unet: Any) -> None:
    agentsd.apply(unet, "turbo")
    state, text, x = state_of(unet), embedding(), torch.ones(2, 4, 16, 16).double()
    timesteps = torch.arange(900, 0, -20)
    for t in timesteps:
        before = state.snapshot()
        first = unet(x, t, text)[0]
        after = state.snapshot()
        state.restore(before)
        assert torch.equal(unet(x, t, text)[0], first)
        state.restore(after)
        x = x + 0.01 * first


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "graphs"),
    [
        (only(interval=3, layers=OUTERMOST_LEVEL), 2),
        (only(interval=3, extrapolate=0.7), 2),
        (AgentSDConfig.from_preset("turbo"), 2),
    ],
    ids=["kept", "extrapolated", "turbo"],
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
    assert counter.frame_count == graphs
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
    agentsd.apply(unet, only(interval=2, max_gap=1.0))
    denoised(unet, steps=4)
    assert len(calls) == 2
    agentsd.remove(unet)
    assert vars(unet.mid_block)["forward"] is hooked
    denoised(unet, steps=4)
    assert len(calls) == 6


def test_a_copy_caches_by_itself(unet: Any) -> None:
    expected = denoised(agentsd.apply(unet, "turbo"))
    other = copy.deepcopy(unet)
    with torch.no_grad():
        unet.mid_block.resnets[0].conv1.weight.zero_()
    agentsd.remove(unet)
    assert torch.equal(denoised(other), expected)
    assert {module.module for module in state_of(other).modules} <= set(other.modules())


def test_a_controlnet_computes_every_step_in_full() -> None:
    net = FAMILIES["ControlNet"].build().controlnet
    patch = patch_of(agentsd.apply(net, "turbo"))
    assert patch is not None
    assert patch.technique(StepCacheState) is None


def test_a_model_without_the_layers_or_blocks_is_refused_and_stays_as_it_was(unet: Any) -> None:
    stock = denoised(unet, steps=3)
    with pytest.raises(ValueError, match="layers of steps is 6; for this UNet2DConditionModel it must be at most 5"):
        agentsd.apply(unet, only(interval=2, layers=6))
    assert torch.equal(denoised(unet, steps=3), stock)
    assert not agentsd.is_applied(unet)
    motion = FAMILIES[next(name for name in FAMILIES if name.startswith("AnimateDiff"))].build()
    with pytest.raises(
        ValueError, match=r"steps is set; it must be empty for UNetMotionModel, whose blocks .* are not"
    ):
        agentsd.apply(motion, only(interval=3))
    assert not agentsd.is_applied(motion)
