"""The acceleration on every family of pipelines: what it changes, covers, skips and leaves behind."""

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import diffusers
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

import agentsd
from agentsd import AgentSDConfig, Merge, Phase
from agentsd.hosts.diffusers_unet import patch_of
from conftest import build_unet
from families import (
    FAMILIES,
    KINDS,
    PROMPT,
    Family,
    controlnet,
    ip_adapter_ready,
    load_ip_adapter,
    motion_adapter,
    picture,
    seeded,
    sharpened,
    text,
    unet,
    unet_xl,
)

Shapes = dict[str, set[int]]

pytestmark = pytest.mark.filterwarnings("ignore:agentsd skips 1 of 3 covered layers:UserWarning")


def networks(pipe: Any) -> dict[str, nn.Module]:
    """The UNet and the ControlNets of a pipeline."""
    found = {"unet": pipe.unet}
    if control := getattr(pipe, "controlnet", None):
        nets = getattr(control, "nets", [control])
        found |= {f"controlnet {index}": net for index, net in enumerate(nets)}
    return found


def self_attentions(net: nn.Module) -> dict[str, Attention]:
    """Spatial self-attention as diffusers names it."""
    return {
        name: module
        for name, module in net.named_modules()
        if name.endswith(".attn1") and "motion_modules" not in name and not module.is_cross_attention
    }


def uncovered(net: nn.Module) -> dict[str, Attention]:
    """Every other attention of tokens to tokens."""
    return {
        name: module
        for name, module in net.named_modules()
        if isinstance(module, Attention) and not module.is_cross_attention and name not in self_attentions(net)
    }


@contextmanager
def token_counts(pipe: Any, find: Callable[[nn.Module], dict[str, Attention]]) -> Iterator[Shapes]:
    """How many tokens the queries of each attention were made of, and of how many it was asked for them."""
    counts: Shapes = {}
    handles = []

    def note(key: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        counts.setdefault(key, set()).add(args[0].shape[1])

    for prefix, net in networks(pipe).items():
        for name, attention in find(net).items():
            handles.append(attention.to_q.register_forward_pre_hook(partial(note, f"{prefix}.{name}")))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def state(pipe: Any) -> dict[str, Any]:
    """Everything that a patch could leave behind: attributes, hooks, processors."""
    kept = {}
    for prefix, net in networks(pipe).items():
        for name, module in net.named_modules():
            attributes = {key: value for key, value in vars(module).items() if not isinstance(value, Tensor)}
            kept[f"{prefix}.{name}"] = {
                key: dict(value) if isinstance(value, dict) else value for key, value in attributes.items()
            }
    return kept


def traces(net: nn.Module) -> list[str]:
    """The modules on which something of this package is left."""
    found = []
    for name, module in net.named_modules():
        for key, value in vars(module).items():
            things = list(value.values()) if isinstance(value, dict) else [value]
            things += [part for thing in things if isinstance(thing, partial) for part in (thing.func, *thing.args)]
            things += [thing.__self__ for thing in things if hasattr(thing, "__self__")]
            if any(type(thing).__module__.startswith("agentsd") for thing in things):
                found.append(f"{name}: {key}")
    return found


@dataclass(frozen=True)
class Seen:
    """What a family did, once for all its tests."""

    family: Family
    stock: Tensor
    tokens: Shapes
    accelerated: tuple[Tensor, Tensor]
    merged: Shapes
    others: list[str]
    report: agentsd.Report
    removed: Tensor
    traces: list[str]
    state: tuple[dict[str, Any], dict[str, Any]]


@cache
def seen(name: str) -> Seen:
    family = FAMILIES[name]
    pipe = family.build()
    with token_counts(pipe, self_attentions) as tokens:
        stock = family.draw(pipe)
    others = [name for net in networks(pipe).values() for name in uncovered(net)]
    before = state(pipe)
    agentsd.apply(pipe)
    with token_counts(pipe, self_attentions) as merged:
        once = family.draw(pipe)
    again = family.draw(pipe)
    report = agentsd.describe(pipe)
    agentsd.remove(pipe)
    left = [trace for net in networks(pipe).values() for trace in traces(net)]
    after = state(pipe)
    removed = family.draw(pipe)
    return Seen(family, stock, tokens, (once, again), merged, others, report, removed, left, (before, after))


def covered_rows(report: agentsd.Report) -> list[Any]:
    return [row for row in report.layers if any(plan.attention for plan in row.plans)]


each = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in KINDS else pytest.mark.slow) for name in FAMILIES]
)


@each
def test_the_image_changes_and_is_finite(name: str) -> None:
    run = seen(name)
    assert run.accelerated[0].isfinite().all()
    assert run.accelerated[0].shape == run.stock.shape
    assert (run.accelerated[0] - run.stock).abs().max() > 0.01 * run.stock.std()


@each
def test_the_same_call_gives_the_same_image(name: str) -> None:
    run = seen(name)
    assert torch.equal(*run.accelerated)


@each
def test_removing_gives_back_the_stock_image_bit_for_bit_and_leaves_nothing(name: str) -> None:
    run = seen(name)
    assert torch.equal(run.removed, run.stock)
    assert run.traces == []
    assert run.state[0] == run.state[1]


def layer_key(name: str) -> str:
    """The network and the module of a layer, whatever its number among several ControlNets."""
    found = re.fullmatch(r"(unet|controlnet).*?\.((?:down_blocks|mid_block|up_blocks)\..*)", name)
    assert found
    return f"{found[1]}.{found[2]}"


@each
def test_describe_lists_every_self_attention_with_its_tokens(name: str) -> None:
    run = seen(name)
    assert all(len(counts) == 1 for counts in run.tokens.values())
    expected = sorted((layer_key(layer), *counts) for layer, counts in run.tokens.items())
    assert sorted((layer_key(row.name), row.tokens) for row in run.report.layers) == expected
    assert all(row.grid[0] * row.grid[1] == row.tokens for row in run.report.layers)


@each
def test_describe_names_each_layer_once(name: str) -> None:
    names = [row.name for row in seen(name).report.layers]
    assert len(set(names)) == len(names)


@each
def test_describe_counts_the_layers_that_work_on_fewer_tokens(name: str) -> None:
    run = seen(name)
    fewer = [layer for layer, counts in run.merged.items() if max(counts) < max(run.tokens[layer])]
    unmerged = [layer for layer, counts in run.merged.items() if counts == run.tokens[layer]]
    assert len(fewer) + len(unmerged) == len(run.tokens)
    assert len(fewer) == run.family.covered
    rows = covered_rows(run.report)
    assert sorted(layer_key(row.name) for row in rows) == sorted(map(layer_key, fewer))
    finest = max(row.tokens for row in run.report.layers)
    assert all(row.tokens == finest for row in rows)
    assert all(row.skipped for row in run.report.layers if row.tokens == finest and row not in rows)
    told = {layer_key(row.name): {n for plan in row.plans for n in (plan.queries, plan.agents) if n} for row in rows}
    assert all(run.merged[layer] <= told[layer_key(layer)] for layer in fewer)


@pytest.mark.slow
def test_two_families_have_self_attention_that_is_not_spatial() -> None:
    others = {name: run.others for name in FAMILIES if (run := seen(name)).others}
    assert list(others) == ["GLIGEN", "AnimateDiff"]
    assert all("fuser" in layer for layer in others["GLIGEN"])
    assert all("motion_modules" in layer for layer in others["AnimateDiff"])


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("GLIGEN", "GatedSelfAttentionDense"),
        ("AnimateDiff", "AnimateDiffTransformer3D"),
        ("PAG", "PAGCFGIdentitySelfAttnProcessor2_0"),
    ],
)
def test_describe_says_what_is_unmodified(name: str, what: str) -> None:
    assert what in str(seen(name).report)


# ControlNets


CONTROLNETS = [name for name in FAMILIES if "ControlNet" in name]


@pytest.mark.parametrize("name", CONTROLNETS)
def test_controlnets_are_accelerated_unless_the_unet_alone_is(name: str) -> None:
    run = seen(name)
    pipe = run.family.build()
    controls = [net for key, net in networks(pipe).items() if key != "unet"]
    assert len([row for row in covered_rows(run.report) if row.name.startswith("controlnet")]) == len(controls)
    agentsd.apply(pipe.unet)
    with token_counts(pipe, self_attentions) as counts:
        image = run.family.draw(pipe)
    assert not torch.equal(image, run.accelerated[0])
    assert not torch.equal(image, run.stock)
    assert [traces(net) for net in controls] == [[] for _ in controls]
    report = agentsd.describe(pipe)
    assert {layer: tokens for layer, tokens in counts.items() if "controlnet" in layer} == {
        layer: tokens for layer, tokens in run.tokens.items() if "controlnet" in layer
    }
    assert all(row.name.startswith("unet") for row in covered_rows(report))
    assert len(report.layers) == len(run.report.layers)
    agentsd.remove(pipe)
    assert torch.equal(run.family.draw(pipe), run.stock)


@pytest.mark.parametrize("name", CONTROLNETS)
def test_controlnets_alone_can_be_accelerated(name: str) -> None:
    run = seen(name)
    pipe = run.family.build()
    agentsd.apply(pipe.controlnet)
    assert traces(pipe.unet) == []
    assert agentsd.is_applied(pipe)
    image = run.family.draw(pipe)
    assert not torch.equal(image, run.stock)
    assert not torch.equal(image, run.accelerated[0])
    agentsd.remove(pipe.controlnet)
    assert torch.equal(run.family.draw(pipe), run.stock)


def test_describe_of_a_pipeline_whose_controlnet_alone_is_accelerated_has_the_size_of_the_last_call() -> None:
    pipe = FAMILIES["ControlNet"].build()
    agentsd.apply(pipe.controlnet)
    text(lambda seed: {"image": picture(seed)}, height=96, width=160)(pipe)
    assert {row.grid for row in agentsd.describe(pipe.controlnet).layers if row.level == 1} == {(24, 40)}
    assert {row.grid for row in agentsd.describe(pipe).layers if row.level == 1} == {(24, 40)}


def test_guess_mode_is_covered() -> None:
    """The ControlNet sees the conditional half of the batch only."""
    family = FAMILIES["ControlNet"]
    pipe = family.build()
    draw = text(lambda seed: {"image": picture(seed)}, guess_mode=True)
    stock = draw(pipe)
    agentsd.apply(pipe)
    assert not torch.equal(draw(pipe), stock)
    agentsd.remove(pipe)
    assert torch.equal(draw(pipe), stock)


# AnimateDiff


def test_temporal_attention_is_untouched() -> None:
    family = FAMILIES["AnimateDiff"]
    pipe = family.build()
    temporal = {name: module for name, module in pipe.unet.named_modules() if name.endswith("motion_modules.0")}
    assert temporal
    with token_counts(pipe, uncovered) as stock:
        family.draw(pipe)
    agentsd.apply(pipe)
    assert all(traces(module) == [] for module in temporal.values())
    with token_counts(pipe, uncovered) as accelerated:
        family.draw(pipe)
    assert accelerated == stock
    assert set().union(*stock.values()) == {2}
    assert not any("motion" in row.name for row in agentsd.describe(pipe).layers)


def test_animatediff_with_a_controlnet() -> None:
    components = {key: part for key, part in FAMILIES["AnimateDiff"].build().components.items() if key != "unet"}
    pipe = diffusers.AnimateDiffControlNetPipeline(
        **components | {"unet": unet(), "motion_adapter": motion_adapter(), "controlnet": controlnet()}
    )
    pipe.set_progress_bar_config(disable=True)
    frames = [VaeImageProcessor().postprocess(picture(i))[0] for i in range(2)]
    draw = text(num_frames=2, conditioning_frames=frames)
    stock = draw(pipe)
    agentsd.apply(pipe)
    accelerated = draw(pipe)
    assert not torch.equal(accelerated, stock)
    assert len(covered_rows(agentsd.describe(pipe))) == 4
    agentsd.remove(pipe)
    assert torch.equal(draw(pipe), stock)


# Adapters and perturbed attention, which bring processors


def test_an_ip_adapter_may_be_loaded_before_or_after() -> None:
    family = FAMILIES["IP-Adapter"]
    after = load_ip_adapter(agentsd.apply(ip_adapter_ready()))
    assert torch.equal(family.draw(after), seen(family.name).accelerated[0])
    assert len(covered_rows(agentsd.describe(after))) == family.covered
    agentsd.remove(after)
    assert [trace for net in networks(after).values() for trace in traces(net)] == []
    assert torch.equal(family.draw(after), seen(family.name).stock)


def test_an_ip_adapter_may_be_unloaded() -> None:
    pipe = agentsd.apply(ip_adapter_ready())
    draw = text()
    plain = draw(pipe)
    load_ip_adapter(pipe)
    assert not torch.equal(FAMILIES["IP-Adapter"].draw(pipe), plain)
    pipe.unload_ip_adapter()
    assert torch.equal(draw(pipe), plain)
    agentsd.remove(pipe)
    assert {type(processor) for processor in pipe.unet.attn_processors.values()} == {AttnProcessor2_0}


def test_images_without_perturbed_attention_are_the_same_after_one_with_it() -> None:
    family = FAMILIES["PAG"]
    plain = text(pag_scale=0.0)
    fresh, used = agentsd.apply(family.build()), agentsd.apply(family.build())
    family.draw(used)
    assert torch.equal(plain(used), plain(fresh))


@pytest.mark.parametrize("name", ["SD 1.x text-to-image", "PAG", "ControlNet"])
@pytest.mark.parametrize("parts", [("attn",), ("attn", "mlp"), ("crossattn", "mlp")])
def test_no_block_keeps_a_tensor_between_calls(name: str, parts: tuple[str, ...]) -> None:
    family = FAMILIES[name]
    pipe = agentsd.apply(family.build(), AgentSDConfig((Phase(attention=Merge(parts=parts)),)))
    family.draw(pipe)
    states = [state for net in networks(pipe).values() for state in patch_of(net).states.values()]
    assert states
    assert all(set(map(type, vars(state).values())) <= {dict, int, type(None)} for state in states)


def test_perturbed_layers_are_skipped_with_one_warning() -> None:
    run = seen("PAG")
    pipe = agentsd.apply(run.family.build())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        run.family.draw(pipe)
        run.family.draw(pipe)
    said = [str(warning.message) for warning in caught if "agentsd" in str(warning.message)]
    assert len(said) == 1
    assert "1 of 3 covered layers" in said[0]
    assert "PAGCFGIdentitySelfAttnProcessor2_0" in said[0]
    layer = "unet.up_blocks.1.attentions.1.transformer_blocks.0.attn1"
    assert run.merged[layer] == run.tokens[layer]


def test_grounding_changes_the_accelerated_image() -> None:
    family = FAMILIES["GLIGEN"]
    pipe = agentsd.apply(family.build())
    elsewhere = text(gligen_phrases=[PROMPT], gligen_boxes=[[0.5, 0.5, 0.9, 0.9]], gligen_scheduled_sampling_beta=1.0)
    assert not torch.equal(elsewhere(pipe), seen(family.name).accelerated[0])


def test_attention_in_float32_stays_finite_in_half_precision() -> None:
    """Scores beyond half precision's range, which such a model computes in float32 (with the processor that does)."""
    net = sharpened(build_unet(upcast_attention=True, use_linear_projection=True)).half()
    for attention in self_attentions(net).values():
        attention.to_q.weight.mul_(200)
        attention.to_k.weight.mul_(200)
    net.set_attn_processor(AttnProcessor())
    generator = torch.Generator().manual_seed(0)
    sample, context = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 5, 32, generator=generator)
    for timestep in (901, 101):
        stock = net(sample.half(), timestep, context.half()).sample
        with agentsd.applied(net):
            accelerated = net(sample.half(), timestep, context.half()).sample
        assert stock.isfinite().all()
        assert accelerated.isfinite().all()
        assert not torch.equal(accelerated, stock)


# Networks of other kinds


def plain_unet(**overrides: Any) -> Any:
    return seeded(0, lambda: diffusers.UNet2DModel(sample_size=16, norm_num_groups=8, **overrides))


def latent_upscaler() -> Any:
    return build_unet(
        in_channels=8,
        norm_num_groups=None,
        block_out_channels=(32, 32, 64),
        down_block_types=("KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"),
        up_block_types=("KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"),
        mid_block_type=None,
        act_fn="gelu",
        resnet_time_scale_shift="scale_shift",
        time_embedding_type="fourier",
        timestep_post_act="gelu",
        conv_in_kernel=1,
        conv_out_kernel=1,
    )


def kandinsky() -> Any:
    return build_unet(
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        attention_head_dim=4,
    )


def video_unet(kind: str, block: str, **overrides: Any) -> Any:
    def make() -> Any:
        return getattr(diffusers, kind)(
            sample_size=16,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=(f"CrossAttnDownBlock{block}", f"DownBlock{block}"),
            up_block_types=(f"UpBlock{block}", f"CrossAttnUpBlock{block}"),
            cross_attention_dim=32,
            **overrides,
        )

    return sharpened(seeded(0, make))


OTHERS: dict[str, tuple[Callable[[], Any], str]] = {
    "a UNet without attention": (
        lambda: build_unet(
            down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, mid_block_type="UNetMidBlock2D"
        ),
        "",
    ),
    "an unconditional UNet": (
        lambda: plain_unet(
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ),
        "AttnDownBlock2D",
    ),
    "latent upscale": (latent_upscaler, "KAttentionBlock"),
    "Kandinsky 2": (kandinsky, "SimpleCrossAttnDownBlock2D"),
    "Stable Video Diffusion": (
        lambda: video_unet(
            "UNetSpatioTemporalConditionModel",
            "SpatioTemporal",
            num_attention_heads=(2, 4),
            addition_time_embed_dim=32,
            projection_class_embeddings_input_dim=96,
        ),
        "TransformerSpatioTemporalModel",
    ),
    "a transformer": (
        lambda: diffusers.PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            num_layers=1,
            sample_size=8,
            cross_attention_dim=16,
            caption_channels=16,
            norm_num_groups=4,
        ),
        "",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_network_with_nothing_to_cover_is_refused_in_one_sentence_and_stays_as_it_was(name: str) -> None:
    net = OTHERS[name][0]()
    hooks = len(net._forward_pre_hooks)
    with pytest.raises(ValueError, match=f"^{type(net).__name__} has no spatial self-attention") as error:
        agentsd.apply(net)
    assert "\n" not in str(error.value)
    assert len(net._forward_pre_hooks) == hooks
    assert traces(net) == []
    assert not agentsd.is_applied(net)


@pytest.mark.parametrize("name", [name for name, (_, where) in OTHERS.items() if where])
def test_the_error_names_the_blocks_whose_self_attention_is_not_covered(name: str) -> None:
    make, where = OTHERS[name]
    with pytest.raises(ValueError, match=where):
        agentsd.apply(make())


def test_a_pipeline_without_a_unet_is_refused() -> None:
    pipe = diffusers.PixArtAlphaPipeline(None, None, None, OTHERS["a transformer"][0](), None)
    with pytest.raises(ValueError, match="must be a diffusers pipeline with a UNet"):
        agentsd.apply(pipe)


def inputs(channels: int = 4, frames: int | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = (1, channels, 16, 16) if frames is None else (1, channels, frames, 16, 16)
    return torch.randn(shape, generator=generator), torch.randn(1, 5, 32, generator=generator)


def test_attention_blocks_beside_transformers_are_unmodified() -> None:
    net = sharpened(
        build_unet(
            down_block_types=("AttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "AttnUpBlock2D"),
        )
    )
    sample, context = inputs()
    stock = net(sample, 901, context).sample
    agentsd.apply(net)
    assert not torch.equal(net(sample, 901, context).sample, stock)
    report = agentsd.describe(net)
    assert {row.level for row in report.layers} == {2}
    assert len(covered_rows(report)) == 4
    agentsd.remove(net)
    assert torch.equal(net(sample, 901, context).sample, stock)


def test_attention_blocks_beside_transformers_are_named() -> None:
    net = build_unet(
        down_block_types=("AttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "AttnUpBlock2D"),
    )
    assert "AttnDownBlock2D" in str(agentsd.describe(agentsd.apply(net)))


def test_a_text_to_video_unet_is_covered_in_space_alone() -> None:
    net = video_unet("UNet3DConditionModel", "3D", attention_head_dim=4)
    sample, context = inputs(frames=3)
    stock = net(sample, 901, context).sample
    agentsd.apply(net)
    assert not torch.equal(net(sample, 901, context).sample, stock)
    assert len(covered_rows(agentsd.describe(net))) == 3
    assert not any("temp" in row.name for row in agentsd.describe(net).layers)
    temporal = [module for name, module in net.named_modules() if re.search(r"temp_attentions$|transformer_in$", name)]
    assert [traces(module) for module in temporal] == [[] for _ in temporal]
    agentsd.remove(net)
    assert torch.equal(net(sample, 901, context).sample, stock)


def test_a_unet_grown_together_with_a_controlnet_xs_is_covered() -> None:
    base = build_unet(layers_per_block=2)
    control = diffusers.ControlNetXSAdapter.from_unet(
        base, size_ratio=1.0, conditioning_embedding_out_channels=(8, 8, 16)
    )
    net = sharpened(diffusers.UNetControlNetXSModel.from_unet(base, control))
    sample, context = inputs()
    call = partial(net, sample, 901, context, controlnet_cond=picture(0))
    stock = call().sample
    agentsd.apply(net)
    assert not torch.equal(call().sample, stock)
    report = agentsd.describe(net)
    # Two layers each of the UNet and the ControlNet on the way down, three on the way up.
    assert len(covered_rows(report)) == 7
    assert {row.grid for row in covered_rows(report)} == {(16, 16)}
    agentsd.remove(net)
    assert torch.equal(call().sample, stock)


def test_a_union_controlnet_is_covered() -> None:
    net = diffusers.ControlNetUnionModel.from_unet(unet_xl())
    report = agentsd.describe(agentsd.apply(net))
    assert len(report.layers) == 5
    assert [row.name for row in covered_rows(report)] == [
        "controlnet.down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    ]
    assert traces(agentsd.remove(net)) == []
