"""The grammar of methods, and drawing with each of them on a UNet of its own."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from agentsd import AgentSDConfig, is_applied, pipelines
from agentsd.drawing import draw
from agentsd.hosts.diffusers_unet import find_layers
from agentsd.methods import PEER_OPTIONS, PEERS, method, missing, own_copy, parse, prepared

NAMES = ["stock", "floor", *AgentSDConfig.presets(), *PEERS]


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("paper", "paper", {}),
        ("paper:ratio=0.5", "paper", {"ratio": 0.5}),
        ("fast:0/stride=8,steps/interval=3", "fast", {"0/stride": 8, "steps/interval": 3}),
        ("floor:levels=[1+2],x=true", "floor", {"levels": [1, 2], "x": True}),
        ("a.yaml:seed=null,y=word", "a.yaml", {"seed": None, "y": "word"}),
    ],
)
def test_options_are_read(text: str, name: str, options: dict[str, Any]) -> None:
    assert parse(text) == (name, options)


@pytest.mark.parametrize("name", AgentSDConfig.presets())
def test_a_preset_is_its_configuration(name: str) -> None:
    assert method(name).config == AgentSDConfig.from_preset(name)


def test_keys_are_those_of_field_assignments() -> None:
    options = {"0/ratio": 0.3, "seed": 5, "steps/interval": 2}
    text = "paper:" + ",".join(f"{key}={value}" for key, value in options.items())
    assert method(text).config == AgentSDConfig.from_preset("paper").assign(options)


def test_a_file_is_a_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    AgentSDConfig.from_preset("fast").to_file(tmp_path / "own.yaml")
    assert method("own.yaml").config == AgentSDConfig.from_preset("fast")
    assert method("own.yaml:seed=3").config == AgentSDConfig.from_preset("fast").replace(seed=3)


def test_settings_tell_methods_apart_and_names_do_not(tmp_path: Path) -> None:
    AgentSDConfig().to_file(tmp_path / "a.yaml")
    same = method("paper"), method("paper:ratio=0.4"), method(f"{tmp_path}/a.yaml")
    assert len({one.sha256 for one in same}) == 1
    assert len({one.folder for one in same}) == 3
    assert method("paper:ratio=0.5").sha256 != method("paper").sha256
    everything = [method(name) for name in NAMES]
    assert len({one.folder for one in everything}) == len(NAMES)
    assert all(yaml.safe_load(yaml.safe_dump(one.settings)) == one.settings for one in everything)


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_has_its_options_and_its_version(name: str) -> None:
    first = next(iter(PEER_OPTIONS[name]))
    settings = method(f"{name}:{first}=7").settings
    assert settings == PEER_OPTIONS[name] | {first: 7, "version": settings["version"]}
    assert method(name).config is None
    assert "version" not in method(name).options


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nothing", "method is 'nothing'; it must be one of stock, floor, xformers, "),
        ("paper:ratio", "options are written name:key=value,key=value"),
        ("paper:=1", "options are written name:key=value,key=value"),
        ("paper:rato=1", "'rato'"),
        ("paper:ratio=2", "ratio is 2"),
        ("paper:kv_ratio=0.5", "has no effect"),
        ("stock:ratio=1", "stock has no options"),
        ("tomesd:raito=1", "'raito'"),
        ("floor:level=1", "'level'"),
    ],
)
def test_a_bad_method_is_one_sentence(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as raised:
        method(text)
    assert "\n" not in str(raised.value)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentsd.methods.version", lambda _: None)
    wanted = [method(text) for text in ("stock", "paper", "tomesd:ratio=0.1", "xformers")]
    assert missing(wanted) == {"tomesd:ratio=0.1": "tomesd", "xformers": "xformers"}


@pytest.fixture(scope="module")
def pipe(tiny_pipeline_folder: Path) -> Any:
    return pipelines.load(str(tiny_pipeline_folder), device="cpu", dtype=torch.float32)


def image(pipe: Any) -> np.ndarray:
    arrays = draw(pipe, "a red circle", 3, output="np", num_inference_steps=6, guidance_scale=2.0).arrays
    assert arrays is not None
    return arrays


def test_a_copy_shares_weights_and_nothing_else(pipe: Any) -> None:
    own = own_copy(pipe)
    assert own.unet is not pipe.unet
    assert own.scheduler is not pipe.scheduler
    assert own.vae is pipe.vae
    pairs = zip(own.unet.parameters(), pipe.unet.parameters(), strict=True)
    assert all(a is b for a, b in pairs)


def test_methods_draw_as_if_they_were_alone(pipe: Any) -> None:
    texts = ["stock", "floor:of=fast", "paper", "fast", "turbo", *(name for name in PEERS if name != "tgate")]
    wanted = [m for m in map(method, texts) if not missing([m])]
    drawers = {one.text: prepared(pipe, one) for one in wanted}
    before = {text: image(drawer) for text, drawer in drawers.items()}
    for text, drawer in reversed(drawers.items()):
        torch.manual_seed(len(text))
        assert np.array_equal(image(drawer), before[text]), text
    assert np.array_equal(image(pipe), before["stock"])
    assert not is_applied(pipe)
    others = [text for text in before if text != "stock"]
    assert not any(np.array_equal(before[text], before["stock"]) for text in others)


@pytest.mark.parametrize(
    ("text", "levels"),
    [("floor", {1}), ("floor:of=fast", {1, 2}), ("floor:levels=2", {2}), ("floor:levels=all", {1, 2})],
)
def test_a_floor_skips_the_self_attention_of_its_levels(text: str, levels: set[int], pipe: Any) -> None:
    drawer = prepared(pipe, method(text))
    computed: list[int] = []
    layers = find_layers(drawer.unet)
    for layer in layers:
        layer.block.attn1.to_q.register_forward_pre_hook(lambda *_, level=layer.level: computed.append(level))
    image(drawer)
    assert set(computed) == {layer.level for layer in layers} - levels


def test_a_floor_of_no_level_is_an_error(pipe: Any) -> None:
    with pytest.raises(ValueError, match="nothing"):
        prepared(pipe, method("floor:of=nothing"))
