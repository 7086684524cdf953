"""Every operation before and after `apply`: the same accelerated image, and no trace of the acceleration afterwards."""

import copy
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import agentsd
from agentsd import Agent, AgentSDConfig, Merge, Phase
from compatibility import TABLE, Compatibility, read
from families import FAMILIES, KINDS, Family
from operations import (
    AGAIN,
    COLUMNS,
    CONFIG,
    DISABLED,
    OPERATIONS,
    REMOVED,
    SAVED,
    STOPPED,
    Operation,
    draw,
    images,
    networks,
)

OTHER = AgentSDConfig.from_preset("faithful")
FIRST = next(iter(FAMILIES))

# The first family with every operation, and these families with these operations, are the fast tests.
TELLING = ("attention slicing", "fuse QKV", "deepcopy")


def fast(family: str, operation: str) -> bool:
    return family == FIRST or (family in KINDS and operation in TELLING)


def pairs() -> list[Any]:
    return [
        pytest.param(
            family,
            operation,
            id=f"{family.name}-{operation.name}",
            marks=() if fast(family.name, operation.name) else pytest.mark.slow,
        )
        for family in FAMILIES.values()
        for operation in OPERATIONS.values()
        if not operation.compiles
    ]


@pytest.mark.parametrize(("family", "operation"), pairs())
def test_both_orders_give_the_same_image(family: Family, operation: Operation, compatibility: Compatibility) -> None:
    before = family.build()
    if reason := operation.unfit(before):
        compatibility(family.name, operation.name, "–", reason)
        return
    before = operation.do(before)
    stock = draw(family, before, operation)
    after = agentsd.apply(family.build(), CONFIG)
    if operation.refusal:
        with pytest.raises((ValueError, RuntimeError), match=operation.refusal) as first:
            draw(family, agentsd.apply(before, CONFIG), operation)
        after = operation.do(after)
        with pytest.raises((ValueError, RuntimeError), match=operation.refusal) as second:
            draw(family, after, operation)
        assert str(first.value) == str(second.value)
        compatibility(family.name, operation.name, "refused", str(first.value))
    else:
        image = draw(family, agentsd.apply(before, CONFIG), operation)
        assert not torch.equal(image, stock)
        after = operation.do(after)
        assert torch.equal(draw(family, after, operation), image)
        compatibility(family.name, operation.name)
    agentsd.remove(after)
    assert torch.equal(draw(family, after, operation), stock)


@pytest.mark.slow
@pytest.mark.parametrize(
    "operation",
    [
        pytest.param(operation, id=operation.name)
        for operation in OPERATIONS.values()
        if operation.undo and not operation.compiles
    ],
)
def test_undoing_works_whenever_it_is_done(operation: Operation) -> None:
    family = FAMILIES[FIRST]
    assert operation.undo
    undone = operation.undo(operation.do(family.build()))
    stock = draw(family, undone)
    image = draw(family, agentsd.apply(undone, CONFIG))
    assert not torch.equal(image, stock)

    if not operation.refusal:
        inside = operation.undo(agentsd.apply(operation.do(family.build()), CONFIG))
        assert torch.equal(draw(family, inside), image)
        assert torch.equal(draw(family, agentsd.remove(inside)), stock)

    across = agentsd.apply(family.build(), CONFIG)
    draw(family, across)
    across = operation.do(across)
    if not operation.refusal:
        draw(family, across, operation)
    across = operation.undo(across)
    assert torch.equal(draw(family, across), image)
    assert torch.equal(draw(family, agentsd.remove(across)), stock)

    late = operation.do(agentsd.apply(family.build(), CONFIG))
    if not operation.refusal:
        draw(family, late, operation)
    late = operation.undo(agentsd.remove(late))
    assert torch.equal(draw(family, late), stock)
    assert not ours(late)


def ours(pipe: Any) -> list[str]:
    """The modules that have anything of the acceleration on them."""
    found = []
    for net in networks(pipe):
        for name, module in net.named_modules():
            values = [getattr(module, "processor", None), *module._forward_pre_hooks.values()]
            values += module._forward_hooks.values()
            owners = [owner for value in values for owner in (value, getattr(value, "__self__", None))]
            owners += [owner for value in values for owner in getattr(value, "args", ())]
            found += [name for owner in owners if type(owner).__module__.startswith("agentsd")]
    return found


@pytest.mark.parametrize(
    "operation",
    [
        pytest.param(operation, id=operation.name)
        for operation in OPERATIONS.values()
        if operation.keeps and not operation.compiles
    ],
)
def test_an_operation_that_should_keep_the_image_keeps_the_accelerated_one(
    operation: Operation,
) -> None:
    """Both orders could lose the acceleration of the same layers."""
    family = FAMILIES[FIRST]
    image = images(FIRST)[1]
    after = operation.do(agentsd.apply(family.build(), CONFIG))
    torch.testing.assert_close(draw(family, after, operation), image, rtol=1e-3, atol=1e-3)


each_family = pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, id=family.name, marks=() if family.name in KINDS else pytest.mark.slow)
        for family in FAMILIES.values()
    ],
)


@each_family
def test_applying_again_is_applying_the_last_configuration(family: Family, compatibility: Compatibility) -> None:
    pipe = agentsd.apply(family.build(), OTHER)
    other = draw(family, pipe)
    agentsd.apply(pipe, CONFIG)
    assert torch.equal(draw(family, pipe), images(family.name)[1])
    assert not torch.equal(other, images(family.name)[1])
    compatibility(family.name, AGAIN)


@each_family
def test_a_disabled_pipeline_is_stock_until_it_is_enabled(family: Family, compatibility: Compatibility) -> None:
    pipe = agentsd.apply(family.build(), CONFIG)
    with agentsd.disabled(pipe):
        assert torch.equal(draw(family, pipe), images(family.name)[0])
    assert torch.equal(draw(family, pipe), images(family.name)[1])
    compatibility(family.name, DISABLED)


@each_family
def test_removing_twice_is_removing_once(family: Family, compatibility: Compatibility) -> None:
    pipe = agentsd.apply(family.build(), CONFIG)
    assert ours(pipe)
    draw(family, pipe)
    for _ in range(2):
        agentsd.remove(pipe)
        assert not agentsd.is_applied(pipe)
        assert not ours(pipe)
    assert torch.equal(draw(family, pipe), images(family.name)[0])
    compatibility(family.name, REMOVED)


def contents(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@each_family
def test_a_saved_folder_holds_no_trace(family: Family, compatibility: Compatibility, tmp_path: Path) -> None:
    stock = family.build()
    # A tokenizer is saved with the padding of its last call.
    draw(family, stock)
    stock.save_pretrained(tmp_path / "stock")
    pipe = agentsd.apply(family.build(), CONFIG)
    draw(family, pipe)
    pipe.save_pretrained(tmp_path / "accelerated")
    assert contents(tmp_path / "accelerated") == contents(tmp_path / "stock")
    assert torch.equal(draw(family, pipe), images(family.name)[1])
    compatibility(family.name, SAVED)


class Stop(Exception):  # noqa: N818
    pass


def stop_in(module: torch.nn.Module, error: type[BaseException], call: int = 1) -> None:
    """Raise once, in the module's call of that number, counted from 0."""
    calls = iter(range(call + 1))

    def hook(*args: Any) -> None:
        if next(calls) == call:
            handle.remove()
            raise error

    handle = module.register_forward_pre_hook(hook)


@each_family
def test_an_exception_in_a_run_leaves_the_pipeline_as_it_was(family: Family, compatibility: Compatibility) -> None:
    pipe = agentsd.apply(family.build(), CONFIG)
    stop_in(pipe.unet.up_blocks[-1].resnets[-1], Stop, call=0)
    with pytest.raises(Stop):
        draw(family, pipe, seed=1)
    assert torch.equal(draw(family, pipe), images(family.name)[1])
    assert torch.equal(draw(family, agentsd.remove(pipe)), images(family.name)[0])
    compatibility(family.name, STOPPED)


def in_callback(pipe: Any, error: type[BaseException]) -> dict[str, Any]:
    def callback(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        raise error

    return {"callback_on_step_end": callback}


def in_up_block(pipe: Any, error: type[BaseException]) -> dict[str, Any]:
    stop_in(pipe.unet.up_blocks[-1].attentions[-1].transformer_blocks[0].attn2, error)
    return {}


def between_norm_and_attention(pipe: Any, error: type[BaseException]) -> dict[str, Any]:
    """After the block's input has been kept for the matching, before it is used."""
    stop_in(pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1, error)
    return {}


def in_scheduler(pipe: Any, error: type[BaseException]) -> dict[str, Any]:
    def step(*args: Any, **kwargs: Any) -> None:
        del pipe.scheduler.step
        raise error

    pipe.scheduler.step = step
    return {}


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("place", [in_callback, in_up_block, between_norm_and_attention, in_scheduler])
def test_an_interrupted_run_leaves_nothing_to_the_next(
    place: Callable[..., dict[str, Any]], error: type[BaseException]
) -> None:
    family = FAMILIES[FIRST]
    pipe = agentsd.apply(family.build(), CONFIG)
    options = {"output_type": "latent", "num_inference_steps": 4}
    with pytest.raises(error):
        pipe(
            "a circle", height=48, width=96, generator=torch.Generator().manual_seed(5), **options, **place(pipe, error)
        )
    assert torch.equal(draw(family, pipe), images(FIRST)[1])
    with agentsd.disabled(pipe):
        assert torch.equal(draw(family, pipe), images(FIRST)[0])
    assert torch.equal(draw(family, agentsd.remove(pipe)), images(FIRST)[0])
    assert not ours(pipe)


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("context", ["disabled", "applied"])
def test_an_error_leaves_a_context_as_it_was_entered(context: str, error: type[BaseException]) -> None:
    family = FAMILIES[FIRST]
    pipe = family.build()
    if context == "disabled":
        agentsd.apply(pipe, CONFIG)
    around = agentsd.disabled(pipe) if context == "disabled" else agentsd.applied(pipe, CONFIG)
    stop_in(pipe.unet.up_blocks[-1], error)
    with pytest.raises(error), around:
        draw(family, pipe)
    assert torch.equal(draw(family, pipe), images(FIRST)[context == "disabled"])


def test_a_reloaded_pipeline_is_stock_and_can_be_accelerated(tmp_path: Path) -> None:
    family = FAMILIES[FIRST]
    pipe = agentsd.apply(family.build(), CONFIG)
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert not agentsd.is_applied(again)
    assert torch.equal(draw(family, again), images(FIRST)[0])
    assert torch.equal(draw(family, agentsd.apply(again, CONFIG)), images(FIRST)[1])


def test_pipelines_of_the_same_components_are_accelerated_together() -> None:
    """The UNet is one: either pipeline accelerates it and either takes it off."""
    from diffusers import StableDiffusionImg2ImgPipeline

    text, image = FAMILIES[FIRST], FAMILIES["SD 1.x img2img"]
    pipe = text.build()
    twin = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    twin.set_progress_bar_config(disable=True)
    agentsd.apply(pipe, CONFIG)
    assert agentsd.is_applied(twin)
    assert torch.equal(draw(image, twin), images(image.name)[1])
    agentsd.remove(twin)
    assert not agentsd.is_applied(pipe)
    assert torch.equal(draw(text, pipe), images(text.name)[0])
    assert torch.equal(draw(text, agentsd.apply(pipe, CONFIG)), images(text.name)[1])


def test_a_copy_of_a_pipeline_is_independent() -> None:
    family = FAMILIES["ControlNet"]
    pipe = agentsd.apply(family.build(), CONFIG)
    twin = copy.deepcopy(pipe)
    agentsd.apply(pipe, OTHER)
    assert torch.equal(draw(family, twin), images(family.name)[1])
    agentsd.remove(twin)
    assert torch.equal(draw(family, twin), images(family.name)[0])
    assert torch.equal(draw(family, agentsd.apply(pipe, CONFIG)), images(family.name)[1])


def test_on_the_meta_device_shapes_are_computed() -> None:
    pipe = agentsd.apply(FAMILIES[FIRST].build(), CONFIG)
    unet = pipe.unet.to("meta")
    sample, context = torch.empty(2, 4, 16, 16, device="meta"), torch.empty(2, 5, 32, device="meta")
    for timestep in (801, torch.tensor(801), 1):
        assert unet(sample, timestep, context).sample.shape == sample.shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", [FIRST, "ControlNet", "SDXL text-to-image"])
def test_a_pipeline_may_go_to_a_gpu_and_back(name: str) -> None:
    family = FAMILIES[name]
    stock, image = images(name)
    before = agentsd.apply(family.build().to("cuda"), CONFIG)
    after = agentsd.apply(family.build(), CONFIG)
    assert torch.equal(draw(family, after), image)
    after.to("cuda")
    for pipe in (before, after):
        drawn = draw(family, pipe)
        assert drawn.is_cuda
        with agentsd.disabled(pipe):
            assert not torch.equal(draw(family, pipe), drawn)
        pipe.to("cpu")
        assert torch.equal(draw(family, pipe), image)
        assert torch.equal(draw(family, agentsd.remove(pipe)), stock)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in KINDS else pytest.mark.slow) for name in FAMILIES]
)
def test_each_image_of_these_tests_has_a_step_of_agent_attention_and_one_of_merging(name: str) -> None:
    family = FAMILIES[name]

    def alone(kind: type[Agent] | type[Merge]) -> Tensor:
        phases = (p if isinstance(p.attention, kind) else Phase(p.until, None) for p in CONFIG.phases)
        return draw(family, agentsd.apply(family.build(), CONFIG, phases=tuple(phases)))

    agent, merge = alone(Agent), alone(Merge)
    stock, both = images(name)
    one_step = name == "SDXL few-step"
    assert not torch.equal(agent, stock)
    assert torch.equal(agent, both) is one_step
    assert torch.equal(merge, stock) is one_step


def test_processors_read_and_set_back_are_still_accelerated() -> None:
    """What a caller does who wants his own processors for a while."""
    family = FAMILIES[FIRST]
    pipe = family.build()
    stock = dict(pipe.unet.attn_processors)
    agentsd.apply(pipe, CONFIG)
    accelerated = dict(pipe.unet.attn_processors)
    pipe.unet.set_attn_processor(stock)
    assert torch.equal(draw(family, pipe), images(FIRST)[1])
    pipe.unet.set_attn_processor(accelerated)
    assert torch.equal(draw(family, pipe), images(FIRST)[1])


def test_diffusers_refuses_to_reset_processors_it_does_not_know_and_nothing_breaks() -> None:
    """`set_attn_processor` works; `set_default_attn_processor` wants to know what it replaces."""
    family = FAMILIES[FIRST]
    pipe = agentsd.apply(family.build(), CONFIG)
    with pytest.raises(ValueError, match=r"AgentSDProcessor"):
        pipe.unet.set_default_attn_processor()
    assert torch.equal(draw(family, pipe), images(FIRST)[1])
    agentsd.remove(pipe).unet.set_default_attn_processor()  # which is not the one that a new UNet has
    torch.testing.assert_close(draw(family, pipe), images(FIRST)[0], rtol=1e-3, atol=1e-3)


def test_the_table_has_every_family_and_every_operation(compatibility: Compatibility) -> None:
    if compatibility.writing:
        pytest.skip("the table is being written")
    expected = {(family, operation) for family in FAMILIES for operation in COLUMNS}
    assert set(read(TABLE.read_text("utf-8"))) == expected
