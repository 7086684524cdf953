"""The optional refinement: nothing while it is zero, what it says when it is not, and better after training."""

import copy
import json
import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel
from diffusers.models.attention_processor import AttnProcessor2_0
from safetensors.torch import save_file
from torch import Tensor

import agentsd
from agentsd import AgentSDConfig, Phase
from agentsd.merging import destinations
from agentsd.patch import patch_of
from agentsd.processor import AgentSDProcessor, Block, Plan
from agentsd.refine import (
    RefinedProcessor,
    Refinement,
    Sample,
    collect,
    distill,
    error,
    load_refinements,
    save_refinements,
)
from operations import image_embedding, load_ip_adapter
from reference import fold, merge, pool, project, softmax
from reference_nn import convolved, resized

GRID = (6, 8)
ROOT = Path(__file__).resolve().parents[1]
CONFIG = AgentSDConfig(ratio=0.5, phases=(Phase(attention="agent", stride=4),), use_rand=False)


def random_refinement(heads: int, dim: int) -> Refinement:
    refinement = Refinement(heads, dim)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in refinement.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return refinement


def layer_of(unet: Any) -> Any:
    return unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1


def block_of(sample: Sample) -> Block:
    block = Block({1: sample.plan}, 1, ())
    block.x = sample.x
    return block


def called(attn: Any, x: Tensor, y: Tensor, phase: Phase, ratio: float, refinement: Refinement | None) -> Tensor:
    block = Block({1: Plan(phase, ratio, GRID, destinations(GRID, phase.cell, None, "cpu"))}, 1, (phase,))
    block.remember(attn, (x,))
    processor = AgentSDProcessor(None, block) if refinement is None else RefinedProcessor(None, block, refinement)
    return processor(attn, y)


@pytest.mark.parametrize("ratio", [0.0, 0.4])
@pytest.mark.parametrize("agents", ["merge", "pool"])
def test_refined_layer_is_its_definition(tiny_unet: Callable[..., Any], ratio: float, agents: Any) -> None:
    """A group's bias is the mean over its tokens and the agent's tokens; the convolution sees the unmerged values."""
    attn = layer_of(tiny_unet()).double()
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(1, 48, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    phase = Phase(attention="agent", stride=2, agents=agents)
    refinement = random_refinement(attn.heads, 16).double()
    with torch.no_grad():
        out = called(attn, x, y, phase, ratio, refinement)[0]
        dst = destinations(GRID, (2, 2), None, "cpu").tolist()
        groups = fold(x[0], dst, int(48 * ratio))
        f = merge(y[0], groups)
        if agents == "merge":
            members = fold(x[0], dst, 36)
            a = merge(y[0], members)
        else:
            members = [
                [(2 * i + r) * 8 + 2 * j + c for r in (0, 1) for c in (0, 1)] for i in range(3) for j in range(4)
            ]
            a = pool(y[0], GRID, (3, 4))
        q, k, v, A = project(attn.to_q, f), project(attn.to_k, f), project(attn.to_v, f), project(attn.to_q, a)
        d = 16 // attn.heads
        of_tokens = torch.zeros(len(f), 16, dtype=torch.float64)
        for head in range(attn.heads):
            part = slice(head * d, (head + 1) * d)

            def table(b: Tensor, head: int = head) -> Tensor:
                """Every agent × every token, resized over both and averaged over the groups."""
                rows_of = [resized(row.view(7, 7), GRID) for row in b[head]]
                whole = torch.tensor([[t(i, j) for i in range(6) for j in range(8)] for t in rows_of])
                size = GRID if agents == "merge" else (3, 4)
                columns = [resized(column.view(7, 7), size) for column in whole.T]
                each = torch.tensor([[t(i, j) for t in columns] for i in range(size[0]) for j in range(size[1])])
                rows = [each[group].mean(0) for group in members] if agents == "merge" else list(each)
                return torch.stack([torch.stack([row[group].mean() for group in groups]) for row in rows])

            B1, B2 = table(refinement.b1), table(refinement.b2)
            gathered = [softmax(k[:, part] @ A[i, part] * d**-0.5 + B1[i]) @ v[:, part] for i in range(len(A))]
            for token in range(len(f)):
                weights = softmax(A[:, part] @ q[token, part] * d ** (-0.5 * 0.3) + B2[:, token])
                of_tokens[token, part] = weights @ torch.stack(gathered) + 0.075 * v[token, part]
        whole_o, whole_v = torch.zeros(48, 16, dtype=torch.float64), torch.zeros(48, 16, dtype=torch.float64)
        for group, row_o, row_v in zip(groups, of_tokens, v, strict=True):
            whole_o[group], whole_v[group] = row_o, row_v
        zero = torch.zeros(16, dtype=torch.float64)
        expected = project(attn.to_out[0], whole_o + convolved(whole_v, GRID, refinement.dwc, zero))
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("phase", [Phase(stride=2), Phase(stride=2, agents="pool"), Phase(stride=2, proportional=True)])
def test_zero_changes_nothing(tiny_unet: Callable[..., Any], phase: Phase) -> None:
    attn = layer_of(tiny_unet()).double()
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 48, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    plain = called(attn, x, y, phase, 0.4, None)
    torch.testing.assert_close(called(attn, x, y, phase, 0.4, Refinement(attn.heads, 16)), plain)


def test_half_precision(tiny_unet: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the fused kernel and with the blocks of matrix products that some CPUs take."""
    attn, refinement = layer_of(tiny_unet()).double(), random_refinement(2, 16)
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 48, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    with torch.no_grad():
        exact = called(attn, x, y, Phase(stride=2), 0.4, refinement)
        for faster in (False, True):
            monkeypatch.setattr("agentsd.attention._PRODUCTS_ARE_FASTER", faster)
            out = called(attn.bfloat16(), x, y.bfloat16(), Phase(stride=2), 0.4, refinement).double()
            assert (out - exact).norm() < 0.03 * exact.norm()


def layers_of(unet: Any) -> list[str]:
    with agentsd.applied(unet, CONFIG):
        return [layer.name for layer in patch_of(unet).covered]


def written(file: Path, unet: Any, make: Callable[[int, int], Refinement] = random_refinement) -> Path:
    save_refinements({name: make(2, 16) for name in layers_of(unet)}, file)
    return file


def drawn(pipe: Any, **arguments: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    image: Tensor = pipe("a", num_inference_steps=2, output_type="latent", generator=generator, **arguments).images
    return image


def test_refined_pipeline_and_the_way_back(tiny_pipeline: Any, tmp_path: Path) -> None:
    pipe, unet = tiny_pipeline, tiny_pipeline.unet
    stock, keys = drawn(pipe), set(unet.state_dict())
    plain = drawn(agentsd.apply(pipe, CONFIG))
    zero = written(tmp_path / "zero.safetensors", unet, Refinement)
    assert torch.equal(drawn(agentsd.apply(pipe, CONFIG, refine=zero)), plain)
    assert "refined" not in str(agentsd.describe(pipe))

    file = written(tmp_path / "refine.safetensors", unet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["refine.safetensors", "zero.safetensors"]
    refined = drawn(agentsd.apply(pipe, CONFIG, refine=file))
    assert not torch.allclose(refined, plain, atol=1e-2)
    report = str(agentsd.describe(pipe))
    assert report.count("16 agents, refined") == report.count("agent:") == len(layers_of(unet))
    assert set(unet.state_dict()) == keys
    with pytest.raises(ValueError, match="no such file"):
        agentsd.apply(pipe, refine=tmp_path / "none.safetensors")
    unet.set_attn_processor(AttnProcessor2_0())
    assert torch.equal(drawn(pipe), refined), "other processors came, and a refusal before them changed nothing"
    unet.fuse_qkv_projections()
    torch.testing.assert_close(drawn(pipe), refined)
    unet.unfuse_qkv_projections()
    assert torch.equal(drawn(copy.deepcopy(pipe)), refined)
    with agentsd.disabled(pipe):
        assert torch.equal(drawn(pipe), stock)
    with agentsd.applied(pipe, CONFIG):
        assert torch.equal(drawn(pipe), plain)
    assert torch.equal(drawn(pipe), refined)

    agentsd.remove(pipe)
    assert torch.equal(drawn(pipe), stock)
    assert not any(isinstance(processor, AgentSDProcessor) for processor in unet.attn_processors.values())
    assert torch.equal(drawn(agentsd.apply(pipe, CONFIG, refine=str(file))), refined)


def test_refinement_stays_beside_an_ip_adapter(tiny_pipeline: Any, tmp_path: Path) -> None:
    file = written(tmp_path / "refine.safetensors", tiny_pipeline.unet)
    agentsd.apply(tiny_pipeline, CONFIG, refine=file)
    load_ip_adapter(tiny_pipeline)
    arguments = image_embedding(tiny_pipeline, {})
    before = drawn(tiny_pipeline, **arguments)
    assert torch.equal(drawn(agentsd.apply(tiny_pipeline, CONFIG, refine=file), **arguments), before)
    assert not torch.allclose(drawn(agentsd.apply(tiny_pipeline, CONFIG), **arguments), before, atol=1e-2)


@pytest.mark.slow
def test_refined_blocks_compile_in_one_graph(tiny_unet: Callable[..., Any], tmp_path: Path) -> None:
    unet = tiny_unet().requires_grad_(False)
    agentsd.apply(unet, CONFIG, refine=written(tmp_path / "refine.safetensors", unet))
    inputs = torch.randn(2, 4, 16, 16), torch.tensor(900), torch.randn(2, 5, 32)
    eager = unet(*inputs).sample
    unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert torch.equal(unet(*inputs).sample, eager)


def test_a_controlnet_is_not_refined(tiny_unet: Callable[..., Any], tmp_path: Path) -> None:
    unet = tiny_unet()
    control = ControlNetModel.from_unet(unet)
    file = written(tmp_path / "refine.safetensors", unet)
    pipe = SimpleNamespace(unet=unet, controlnet=control)
    agentsd.apply(pipe, CONFIG, refine=file)
    rows = {row.name: row.refined for row in agentsd.describe(pipe).layers if row.phases[0].attention == "agent"}
    assert {name.split(".")[0]: refined for name, refined in rows.items()} == {"unet": True, "controlnet": False}
    with pytest.raises(ValueError, match=r"refine is '.*'; it is for a UNet, not for a ControlNetModel"):
        agentsd.apply(control, CONFIG, refine=file)


def test_training_finds_a_refinement_that_is_there(tiny_pipeline: Any) -> None:
    """Outputs that a refinement made are learnt on one image and met on another; the pipeline stays stock."""
    tiny_pipeline.set_progress_bar_config(disable=True)
    unet = tiny_pipeline.unet
    weights = {name: value.clone() for name, value in unet.state_dict().items()}
    samples = collect(tiny_pipeline, CONFIG, ["a", "b"], num_inference_steps=3)
    layer = samples[0].layer
    samples = [sample for sample in samples if sample.layer == layer]
    attn, teacher = unet.get_submodule(layer), random_refinement(2, 16)
    with torch.no_grad():
        taught = [replace(s, out=RefinedProcessor(None, block_of(s), teacher)(attn, s.y)) for s in samples]
    refinement = distill(unet, taught[:3], steps=150, rate=0.03)[layer]
    with torch.no_grad():
        before, after = (sum(error(attn, part, s).item() for s in taught[3:]) for part in (None, refinement))
    assert after < 0.1 * before
    assert not agentsd.is_applied(tiny_pipeline)
    assert all(torch.equal(value, weights[name]) for name, value in unet.state_dict().items())
    assert all(parameter.grad is None for parameter in unet.parameters())


def test_samples_are_what_stock_computes(tiny_pipeline: Any) -> None:
    tiny_pipeline.set_progress_bar_config(disable=True)
    phases = (Phase(until=0.5, stride=4), Phase(attention="kv"))
    samples: list[Sample] = collect(tiny_pipeline, AgentSDConfig(phases=phases), ["a"], num_inference_steps=4)
    layers = {sample.layer for sample in samples}
    assert len(samples) == 2 * len(layers), "the second half of the schedule has no agents"
    for sample in samples:
        with torch.no_grad():
            assert torch.equal(tiny_pipeline.unet.get_submodule(sample.layer)(sample.y), sample.out)


def test_bad_refinements(tiny_unet: Callable[..., Any], tmp_path: Path) -> None:
    unet, file = tiny_unet(), tmp_path / "refine.safetensors"
    name = layers_of(unet)[0]

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=f"refine is '.*refine.safetensors'[;,] {message}"):
            agentsd.apply(unet, CONFIG, refine=file)
        assert not agentsd.is_applied(unet)

    refused("there is no such file")
    file.write_bytes(b"no")
    refused("it cannot be read as safetensors")
    save_file({"weight": torch.ones(1)}, file)
    refused("it holds no b1 for any layer")
    save_file({f"{name}.{key}": value for key, value in Refinement(2, 16).state_dict().items() if key != "dwc"}, file)
    refused(f"it holds no dwc for {name}")
    save_file({f"{name}.{key}": torch.ones(2, 5, 5) for key in ("b1", "b2", "dwc")}, file)
    refused(rf"{name} has b1 \(2, 5, 5\), b2 .*, not maps of 49×49 and 3×3")
    save_refinements({"mid": Refinement(2, 16)}, file)
    refused("with a layer mid; UNet2DConditionModel is accelerated in down_blocks")
    save_refinements({name: Refinement(4, 16)}, file)
    refused(f"with 4 heads and 16 channels for {name}, which has 2 and 16")
    file.unlink()
    file.mkdir()
    refused("it cannot be read as safetensors")


def test_the_document_has_the_figures_of_the_results() -> None:
    table = runpy.run_path(str(ROOT / "scripts" / "check_refine.py"))["table"]
    results = json.loads((ROOT / "benchmarks" / "results" / "refine-demo.json").read_text(encoding="utf-8"))
    assert table(results) in (ROOT / "docs" / "module.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_script(tiny_pipeline_folder: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    prompts, file = tmp_path / "prompts.txt", tmp_path / "refine.safetensors"
    prompts.write_text("a\nb\nc\n")
    options = f"--model {tiny_pipeline_folder} --prompts {prompts} --images 1 --steps 3 --updates 3 --output {file}"
    monkeypatch.setattr(sys, "argv", ["distill_bias.py", *options.split(), "--device", "cpu"])
    runpy.run_path(str(ROOT / "scripts" / "distill_bias.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if "→" in line] == list(load_refinements(file))
