"""scripts/experiments/attention_error.py: the attention's error is what brute force says it is."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from agentsd.config import Merge
from agentsd.drawing import UNetCall
from agentsd.hosts.diffusers_unet import find_layers
from agentsd.methods import missing

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "scripts/experiments/attention_error.py"
errors = SimpleNamespace(**runpy.run_path(str(ROOT / SCRIPT)))
variant, relative_error = errors.variant, errors.relative_error


@pytest.fixture
def call() -> UNetCall:
    generator = torch.Generator().manual_seed(0)
    sample, text = (torch.randn(2, *shape, generator=generator) for shape in ((4, 16, 16), (16, 32)))
    return UNetCall((sample, torch.tensor(499)), {"encoder_hidden_states": text, "return_dict": False}, sample)


def softmax_attention(attn: Any, queries: Tensor, tokens: Tensor) -> Tensor:
    """float64, before to_out; `tokens` make the keys and values."""
    q, k, v = (
        torch.nn.functional.linear(x.double(), layer.weight.double())
        for x, layer in ((queries, attn.to_q), (tokens, attn.to_k), (tokens, attn.to_v))
    )
    heads = [x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v)]
    weights = (heads[0] @ heads[1].transpose(-1, -2) * heads[0].shape[-1] ** -0.5).softmax(-1)
    return (weights @ heads[2]).transpose(1, 2).flatten(2)


@torch.no_grad()
def test_every_layer_meets_the_inputs_of_a_stock_run(tiny_pipeline: Any, call: UNetCall) -> None:
    layers = find_layers(tiny_pipeline.unet)
    inputs = errors._inputs(tiny_pipeline.unet, layers, call)
    peers = [text for text in ("tomesd",) if not missing([variant(text)])]
    for text in (None, "pooled:stride=2", "kv:stride=2", "turbo", *peers, "floor"):
        unet = errors._everywhere(tiny_pipeline, text and variant(text))
        found = errors._outputs(unet, call, inputs)
        assert set(found) == {layer.name for layer in layers}
        for layer in layers:
            y = layer.block.norm1(inputs[layer.name])
            side = round(y.shape[1] ** 0.5)
            image = y.transpose(1, 2).unflatten(2, (side, side))
            pooled = torch.nn.functional.avg_pool2d(image, 2).flatten(2).transpose(1, 2)
            true = softmax_attention(layer.block.attn1, y, y)
            expected = {
                None: true,
                "pooled:stride=2": softmax_attention(layer.block.attn1, y, pooled),
                "floor": y.double(),
            }
            if text in expected:
                torch.testing.assert_close(found[layer.name].double(), expected[text], rtol=1e-4, atol=1e-5)
            else:
                assert 0 < relative_error(found[layer.name], true) < 1


def test_relative_error_is_a_mean_over_images() -> None:
    true = torch.tensor([[[3.0, 4.0]], [[0.0, 1.0]]])
    found = torch.tensor([[[3.0, 5.0]], [[0.0, 1.0]]])
    assert relative_error(found, true) == pytest.approx((1 / 5 + 0) / 2)
    assert relative_error(true, true) == 0


def test_nothing_merged_is_no_error(tiny_pipeline: Any) -> None:
    prompts = ["a red ring", "a blue star"]
    variants = [variant(text) for text in ("merge:ratio=0", "kv:stride=4", "floor")]
    before = {name: value.clone() for name, value in tiny_pipeline.unet.state_dict().items()}
    result = errors.measure(tiny_pipeline, variants, prompts, steps=4, guidance=2.0, at=(0.2, 0.8), quiet=True)
    none, some, floor = result["variants"]
    assert result["levels"] == [1, 2]
    assert result["progress"][0] < 0.5 < result["progress"][1]
    assert {value for values in none["error"].values() for value in values} == {0}
    assert none["psnr"] == [999.0, 999.0]
    for level in ("1", "2"):
        assert len(some["error"][level]) == 2
        assert max(some["error"][level]) < min(floor["error"][level])
    assert max(some["psnr"]) < 999
    assert all(torch.equal(value, before[name]) for name, value in tiny_pipeline.unet.state_dict().items())


def test_names_of_variants() -> None:
    assert variant("kv:stride=2").settings["phases"][0]["attention"] == "kv"
    merge = variant("merge:ratio=0.3,proportional=true").config
    assert merge is not None
    assert [phase.attention for phase in merge.phases] == [Merge(ratio=0.3, stride=2, proportional=True)] * 2
    assert [variant(text).text for text in errors.VARIANTS if not text.startswith("tomesd")]
    for text, words in (
        ("deepcache", "its attention is the stock one"),
        ("pooled:sride=2", "pooled has no field 'sride'"),
        ("kv:sride=2", "no field 'sride'"),
        ("nothing", "method is 'nothing'"),
    ):
        with pytest.raises(ValueError, match=words):
            variant(text)


def test_the_command_writes_its_tables(
    tiny_pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def run(*options: object) -> None:
        monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, options)])
        errors.main()

    options = ("--model", tiny_pipeline_folder, "--steps", 3, "--prompts", 2, "--device", "cpu")
    run(*options, "--method", "kv:stride=2", "--method", "floor", "--output", "out")
    result = json.loads((tmp_path / "out/errors.json").read_text())
    assert [row["variant"] for row in result["variants"]] == ["kv:stride=2", "floor"]
    assert result["provenance"]["steps"] == 3
    assert errors.tables(result) in capsys.readouterr().out
    assert "| variant | level 1 | level 2 |" in errors.tables(result)
    (tmp_path / "text.md").write_text(f"<!-- {SCRIPT} out/errors.json -->\nold\n<!-- /{SCRIPT} -->\n")
    run("--into", "text.md")
    text = (tmp_path / "text.md").read_text()
    assert errors.tables(result) in text
    assert "2 prompts, 3 steps" in text
    assert f"python {SCRIPT} --model" in text


def test_the_tables_of_the_benchmarks_are_those_of_the_results() -> None:
    page = ROOT / "docs" / "benchmarks.md"
    assert errors.renewed(page) == page.read_text(encoding="utf-8")
