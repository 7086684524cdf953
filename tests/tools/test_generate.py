"""agentsd-generate, on a tiny Stable Diffusion of random weights: what it writes, repeats, refuses and survives."""

import errno
import fcntl
import io
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import agentsd
import agentsd.demo
from agentsd.cli.generate import main
from agentsd.generate.output import Output
from agentsd.images import comparison, difference, format_parameters, parse_parameters, psnr, read_parameters
from agentsd.results import write_image

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    tiny_pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Run:
    """Return a function that runs the command on the tiny model, two steps, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, prompt: bool = True, model: object = tiny_pipeline_folder) -> tuple[int, str, str]:
        options = ["--prompt", "a red circle", "--steps", "2"] if prompt else []
        capfd.readouterr()
        code = main([*options, *(["--model", str(model)] if model else []), *map(str, arguments)])
        out, err = capfd.readouterr()
        return code, out, err

    return run


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def shade(path: Path, size: tuple[int, int] = (64, 64)) -> Path:
    Image.linear_gradient("L").resize(size).convert("RGB").save(path)
    return path


# Making images


def test_stock_image_is_the_pipelines_own(run: Run, tiny_pipeline: Any) -> None:
    code, out, err = run("--stock", "--seed", 3)
    assert (code, err) == (0, "")
    expected = tiny_pipeline(
        "a red circle", num_inference_steps=2, generator=torch.Generator().manual_seed(3), output_type="pil"
    ).images[0]
    np.testing.assert_array_equal(pixels("outputs/agentsd-0001.png"), np.asarray(expected))
    assert "nothing is accelerated" in out


def test_accelerated_image_is_that_of_apply(run: Run, tiny_pipeline: Any) -> None:
    code, out, err = run("--seed", 3, "--ratio", 0.5)
    assert (code, err) == (0, "")
    agentsd.apply(tiny_pipeline, ratio=0.5)
    generator = torch.Generator().manual_seed(3)
    accelerated = tiny_pipeline("a red circle", num_inference_steps=2, generator=generator).images[0]
    np.testing.assert_array_equal(pixels("outputs/agentsd-0001.png"), np.asarray(accelerated))
    run("--seed", 3, "--stock")
    assert (pixels("outputs/agentsd-0001.png") != pixels("outputs/agentsd-0002.png")).any()
    assert re.search(r"outputs/agentsd-0001.png: seed 3, \d+\.\d\d s\n", out)
    assert str(agentsd.describe(tiny_pipeline)) in out


def test_demo_needs_no_other_option(
    run: Run, tiny_pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("agentsd.demo.MODEL", tiny_pipeline_folder)
    code, out, err = run("--prompt", "a red circle and a quick brown fox", prompt=False, model=None)
    assert code == 0
    assert err.count("\n") == 1
    assert re.search("warning: the demo model does not know: .*quick.*fox", err)
    assert "--model takes any Stable Diffusion" in out
    fields = read_parameters(tmp_path / "outputs/agentsd-0001.png")[2]
    assert (fields["Steps"], fields["CFG scale"], fields["Model"]) == ("25", "4", "demo")
    assert agentsd.AgentSDConfig.from_dict(json.loads(fields["AgentSD"])) == agentsd.AgentSDConfig.from_preset("paper")


@pytest.mark.skipif(not (agentsd.demo.MODEL / "model_index.json").exists(), reason="the demo model is not built")
def test_embedded_model_draws(run: Run) -> None:
    code, _, err = run("--prompt", "a large red circle on a green background", "--steps", 2, prompt=False, model=None)
    assert (code, err) == (0, "")
    assert pixels("outputs/agentsd-0001.png").shape == (256, 256, 3)


def test_every_prompt_and_seed_gets_its_image(run: Run, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\ufeffa red ring\n\n  a blue star, left \n", encoding="utf-8")
    code, out, _ = run(
        "--prompt-file", "prompts.txt", "--steps", 2, "--num-images", 2, "--batch-size", 3, "--quiet", prompt=False
    )
    assert code == 0
    assert out.split() == [f"outputs/agentsd-{number:04d}.png" for number in range(1, 5)]
    recorded = [read_parameters(tmp_path / name) for name in out.split()]
    assert [prompt for prompt, _, _ in recorded] == ["a red ring"] * 2 + ["a blue star, left"] * 2
    assert [fields["Seed"] for _, _, fields in recorded] == ["0", "1", "2", "3"]
    assert [fields.get("Batch pos") for _, _, fields in recorded] == ["0", "1", "2", None]


def test_image_hardly_depends_on_its_batch(run: Run) -> None:
    run("--num-images", 3, "--batch-size", 3)
    run("--seed", 2)
    apart = pixels("outputs/agentsd-0003.png").astype(int) - pixels("outputs/agentsd-0004.png")
    assert abs(apart).max() <= 1


def test_changing_fields_of_the_configuration(run: Run, tmp_path: Path) -> None:
    code, _, _ = run(
        *("--set", "1/attention=kv", "--set", "stride=8", "--set", "0/stride=[4, 2]", "--set", "seed=7"),
        *("--set", "steps/interval=2", "--ratio", "0.3", "--preset", "paper"),
    )
    assert code == 0
    fields = read_parameters(tmp_path / "outputs/agentsd-0001.png")[2]
    expected = agentsd.AgentSDConfig(
        phases=(
            agentsd.Phase(until=0.4, attention=agentsd.Agent(ratio=0.3, stride=(4, 2))),
            agentsd.Phase(attention=agentsd.KV(stride=8)),
        ),
        steps=(agentsd.StepCache(interval=2),),
        seed=7,
    )
    assert agentsd.AgentSDConfig.from_dict(json.loads(fields["AgentSD"])) == expected


def test_configuration_from_a_file(run: Run, tmp_path: Path) -> None:
    config = agentsd.AgentSDConfig(phases=(agentsd.Phase(attention=agentsd.KV(stride=2)),))
    config.to_file(tmp_path / "kv.yaml")
    assert run("--config", "kv.yaml")[0] == 0
    fields = read_parameters(tmp_path / "outputs/agentsd-0001.png")[2]
    assert agentsd.AgentSDConfig.from_dict(json.loads(fields["AgentSD"])) == config


def test_single_file_and_its_repetition(
    run: Run, tiny_pipeline_folder: Path, tiny_single_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run()
    monkeypatch.chdir(tiny_single_file.parent)
    options = ("--model-config", tiny_pipeline_folder.name, "--output", tmp_path / "outputs")
    code, _, err = run(*options, model=tiny_single_file.name)
    assert (code, err) == (0, "")
    monkeypatch.chdir(tmp_path)
    assert run("--from-png", "outputs/agentsd-0002.png", prompt=False, model=None)[0] == 0
    first, *others = (pixels(f"outputs/agentsd-000{number}.png") for number in (1, 2, 3))
    for other in others:
        np.testing.assert_array_equal(other, first)
    assert read_parameters(tmp_path / "outputs/agentsd-0003.png")[2]["Model"] == "single"


def test_half_precision(run: Run) -> None:
    for dtype in ("float16", "bfloat16"):
        assert run("--dtype", dtype)[0] == 0
    run()
    half, brain, full = (pixels(f"outputs/agentsd-000{number}.png").astype(int) for number in (1, 2, 3))
    drawn = [
        torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=d).float() for d in (torch.float16, None)
    ]
    if not torch.allclose(*drawn, atol=1e-2):
        pytest.skip("older versions of torch draw other noise in half precision")
    assert 0 < abs(half - full).mean() < abs(brain - full).mean() < 10


def test_size_and_negative_prompt_change_the_image(run: Run) -> None:
    assert run("--width", 96, "--height", 48, "--stock")[0] == 0
    assert pixels("outputs/agentsd-0001.png").shape == (48, 96, 3)
    run("--width", 96, "--height", 48, "--stock", "--negative-prompt", "a blue star")
    assert (pixels("outputs/agentsd-0001.png") != pixels("outputs/agentsd-0002.png")).any()


def test_attention_backend_sliced_agrees_with_sdpa(run: Run) -> None:
    assert run("--stock", "--attention-backend", "sdpa")[0] == 0
    assert run("--stock", "--attention-backend", "sliced")[0] == 0
    apart = pixels("outputs/agentsd-0001.png").astype(int) - pixels("outputs/agentsd-0002.png")
    assert abs(apart).max() <= 1


@pytest.mark.slow
def test_compile_agrees_with_eager(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module, **options: compiled(module, backend="eager", **options)
    )
    assert run("--stock")[0] == 0
    assert run("--stock", "--compile")[0] == 0
    apart = pixels("outputs/agentsd-0001.png").astype(int) - pixels("outputs/agentsd-0002.png")
    assert abs(apart).max() <= 1


@pytest.mark.slow
def test_lora_changes_the_image_by_its_weight(run: Run, tiny_pipeline: Any, tmp_path: Path) -> None:
    lora = make_lora(tiny_pipeline, tmp_path / "style")
    assert run("--stock")[0] == 0
    for weight in ("", ":0", ":0.5"):
        code, _, err = run("--stock", "--lora", f"{lora}{weight}")
        assert (code, err) == (0, "")
    plain, full, zero, half = (pixels(f"outputs/agentsd-000{number}.png").astype(int) for number in range(1, 5))
    np.testing.assert_allclose(zero, plain, atol=1)
    assert abs(full - plain).mean() > abs(half - plain).mean() > 0.1
    assert run("--from-png", "outputs/agentsd-0004.png", prompt=False, model=None)[0] == 0
    np.testing.assert_array_equal(pixels("outputs/agentsd-0005.png"), half)


def make_lora(pipe: Any, folder: Path) -> Path:
    peft = pytest.importorskip("peft")
    from diffusers.utils import convert_state_dict_to_diffusers

    torch.manual_seed(0)
    pipe.unet.add_adapter(
        peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    )
    layers = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(pipe.unet))
    type(pipe).save_lora_weights(folder, unet_lora_layers=layers)
    return folder


# Starting from an image


def test_image_to_image_follows_its_strength(run: Run, tmp_path: Path) -> None:
    start = pixels(shade(tmp_path / "start.png", (70, 50)))[:48, :64].astype(int)
    for strength in (0.1, 1):
        code, _, err = run("--init-image", "start.png", "--strength", strength, "--steps", 10)
        assert (code, err) == (0, "")
    weak, strong = (pixels(f"outputs/agentsd-000{number}.png") for number in (1, 2))
    assert weak.shape == start.shape
    fields = read_parameters(tmp_path / "outputs/agentsd-0001.png")[2]
    assert (fields["Denoising strength"], fields["Size"]) == ("0.1", "64x48")
    assert (weak != strong).any()


def test_inpainting_keeps_what_is_not_masked(run: Run, tmp_path: Path) -> None:
    start = pixels(shade(tmp_path / "start.png"))
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[:, 32:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    code, _, err = run("--init-image", "start.png", "--mask", "mask.png", "--num-images", 2, "--batch-size", 2)
    assert (code, err) == (0, "")
    for number in (1, 2):
        image = pixels(f"outputs/agentsd-000{number}.png")
        np.testing.assert_array_equal(image[:, :32], start[:, :32])
        assert (image[:, 32:] != start[:, 32:]).mean() > 0.5


# Repeating an image


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "--stock --seed 5 --negative-prompt dark:,1",
        "--num-images 5 --batch-size 3 --scheduler euler-a",
        "--prompt second --batch-size 2 --dtype bfloat16",
        "--preset fast --set stride=2 --guidance-scale 1.2345678901 --scheduler dpm++-karras --width 72",
        "--init-image start.png --strength 0.7 --steps 4",
        "--init-image start.png --mask start.png --num-images 3 --batch-size 2 --ratio 0.1",
    ],
)
def test_repeats_an_image_bit_for_bit(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str
) -> None:
    shade(tmp_path / "start.png")
    assert run(*arguments.split())[0] == 0
    originals = sorted((tmp_path / "outputs").iterdir())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    torch.randn(7)  # nothing may depend on the global generator
    for original in originals:
        code, out, err = run("--from-png", original, "--quiet", prompt=False, model=None)
        assert (code, err) == (0, "")
        repeated = Path(out.strip())
        np.testing.assert_array_equal(pixels(repeated), pixels(original))
        assert Image.open(repeated).info["parameters"] == Image.open(original).info["parameters"]


def test_options_beside_from_png_replace_what_is_recorded(run: Run, tmp_path: Path) -> None:
    run("--seed", 5, "--num-images", 3, "--batch-size", 3, "--scheduler", "euler", "--stock")
    run("--from-png", "outputs/agentsd-0002.png", "--steps", 3, "--preset", "fast", "--num-images", 2, prompt=False)
    recorded = [read_parameters(tmp_path / f"outputs/agentsd-000{number}.png") for number in (4, 5)]
    for prompt, _, fields in recorded:
        assert (prompt, fields["Steps"], fields["Sampler"]) == ("a red circle", "3", "Euler")
        assert json.loads(fields["AgentSD"])["phases"][0]["attention"] == "kv"
    assert [fields["Seed"] for *_, fields in recorded] == ["6", "7"]


def test_from_png_keeps_the_configuration_or_changes_a_field_of_it(run: Run, tmp_path: Path) -> None:
    run("--set", "seed=9")
    run("--from-png", "outputs/agentsd-0001.png", "--ratio", 0.2, prompt=False)
    run("--from-png", "outputs/agentsd-0001.png", "--stock", prompt=False)
    run("--from-png", "outputs/agentsd-0003.png", "--ratio", 0.1, prompt=False)
    texts = [read_parameters(tmp_path / f"outputs/agentsd-000{number}.png")[2]["AgentSD"] for number in (2, 3, 4)]
    assert (json.loads(texts[0])["seed"], json.loads(texts[0])["phases"][0]["ratio"]) == (9, 0.2)
    assert texts[1] == "off"
    assert (json.loads(texts[2])["seed"], json.loads(texts[2])["phases"][1]["ratio"]) == (0, 0.1)


def test_from_png_reads_an_image_of_a_web_ui(run: Run, tmp_path: Path) -> None:
    text = "a cat\nNegative prompt: dog\nSteps: 3, Sampler: Euler a, CFG scale: 7, Seed: 12, Size: 64x32, Model: other"
    write_image(tmp_path / "web.png", Image.new("RGB", (8, 8)), text={"parameters": text})
    assert run("--from-png", "web.png", prompt=False)[0] == 0
    prompt, negative_prompt, fields = read_parameters(tmp_path / "outputs/agentsd-0001.png")
    assert (prompt, negative_prompt, fields["Sampler"], fields["Seed"]) == ("a cat", "dog", "Euler a", "12")
    assert pixels("outputs/agentsd-0001.png").shape == (32, 64, 3)


def test_from_png_warns_of_another_model_and_version(
    run: Run, tmp_path: Path, tiny_pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = torch.__version__
    tiny_pipeline.save_pretrained(tmp_path / "model")
    run(model=tmp_path / "model")
    with torch.no_grad():
        tiny_pipeline.unet.conv_out.bias += 1
    tiny_pipeline.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(torch, "__version__", "0.0.1")
    code, _, err = run("--from-png", "outputs/agentsd-0001.png", prompt=False, model=None)
    assert code == 0
    assert "the model has changed since" in err
    assert f"was made with torch {version}" in err


def test_repeats_an_image_of_another_number_of_threads(run: Run) -> None:
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        run("--width", 128, "--height", 128, "--stock")
    run("--from-png", "outputs/agentsd-0001.png", prompt=False, model=None)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)
    np.testing.assert_array_equal(pixels("outputs/agentsd-0003.png"), pixels("outputs/agentsd-0001.png"))


# The text in the file


def web_ui_parse(text: str) -> dict[str, str]:
    """Read a text as AUTOMATIC1111's web UI does, in its own words."""
    pattern = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
    *lines, last = text.strip().split("\n")
    if len(pattern.findall(last)) < 3:
        lines.append(last)
        last = ""
    prompt, negative_prompt, done = "", "", False
    for line in map(str.strip, lines):
        if line.startswith("Negative prompt:"):
            done = True
            line = line[16:].strip()
        if done:
            negative_prompt += ("" if negative_prompt == "" else "\n") + line
        else:
            prompt += ("" if prompt == "" else "\n") + line
    result = {"Prompt": prompt, "Negative prompt": negative_prompt}
    for key, value in pattern.findall(last):
        result[key] = json.loads(value) if value[:1] == '"' and value[-1:] == '"' else value
    return result


def test_web_ui_reads_the_parameters(run: Run, tmp_path: Path) -> None:
    run("--negative-prompt", "blurry, dark: no", "--seed", 4, "--scheduler", "euler-a", "--guidance-scale", 6.5)
    text = Image.open(tmp_path / "outputs/agentsd-0001.png").info["parameters"]
    assert text.splitlines()[:2] == ["a red circle", "Negative prompt: blurry, dark: no"]
    assert text.splitlines()[2].startswith(
        "Steps: 2, Sampler: Euler a, CFG scale: 6.5, Seed: 4, Size: 64x64, Model hash: "
    )
    result = web_ui_parse(text)
    assert (result["Prompt"], result["Negative prompt"]) == ("a red circle", "blurry, dark: no")
    assert (result["Steps"], result["Model"], result["Version"]) == ("2", "tiny", f"AgentSD {agentsd.__version__}")
    config = agentsd.AgentSDConfig.from_dict(json.loads(result["AgentSD"]))
    assert config == agentsd.AgentSDConfig.from_preset("paper")


@settings(max_examples=200, deadline=None)
@given(prompt=st.text(), negative_prompt=st.text(), value=st.text(min_size=1))
def test_no_prompt_and_no_value_is_lost(prompt: str, negative_prompt: str, value: str) -> None:
    fields = {"Steps": 25, "Sampler": "DDIM", "Left out": None, "AgentSD": json.dumps({"key": value})}
    text = format_parameters(prompt, negative_prompt, fields)
    parsed = parse_parameters(text)
    assert parsed[:2] == (prompt, negative_prompt)
    assert json.loads(parsed[2]["AgentSD"]) == {"key": value}
    assert json.loads(web_ui_parse(text)["AgentSD"]) == {"key": value}
    assert "Left out" not in parsed[2]


def test_text_in_any_script_survives_the_file(tmp_path: Path) -> None:
    text = {"parameters": format_parameters("een café, 猫 🐈", "", {"Steps": 1})}
    write_image(tmp_path / "a.png", Image.new("RGB", (8, 8)), text=text)
    assert Image.open(tmp_path / "a.png").info["parameters"].splitlines()[0] == "een café, 猫 🐈"


# Comparing


def test_comparison_shows_both_images(run: Run, tmp_path: Path) -> None:
    code, out, err = run("--compare", "--num-images", 2, "--seed", 1)
    assert (code, err) == (0, "")
    assert len(list((tmp_path / "outputs").iterdir())) == 6
    assert (
        len(re.findall(r"stock \d+\.\d\d s, accelerated \d+\.\d\d s \(\d+\.\d\dx\), (PSNR \d+\.\d dB|identical)", out))
        == 2
    )
    run("--stock", "--seed", 1)
    run("--seed", 1)
    np.testing.assert_array_equal(pixels("outputs/agentsd-0001-stock.png"), pixels("outputs/agentsd-0003.png"))
    np.testing.assert_array_equal(pixels("outputs/agentsd-0001-accelerated.png"), pixels("outputs/agentsd-0004.png"))
    assert read_parameters(tmp_path / "outputs/agentsd-0001-stock.png")[2]["AgentSD"] == "off"
    assert read_parameters(tmp_path / "outputs/agentsd-0001-accelerated.png")[2]["AgentSD"].startswith("{")
    assert Image.open("outputs/agentsd-0001.png").width > 3 * 448


def test_comparison_in_one_named_file(run: Run, tmp_path: Path) -> None:
    assert run("--compare", "--output", "both.png", "--quiet")[1].split() == [
        "both.png",
        "both-stock.png",
        "both-accelerated.png",
    ]
    for name in ("both.png", "both-stock.png"):
        (tmp_path / "other.png").unlink(missing_ok=True)
        Path(name).rename("other-stock.png" if "stock" in name else "other.png")
        assert run("--compare", "--output", "other.png")[0] == 2


def test_psnr_and_difference_have_known_values() -> None:
    black, grey = Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), (10, 10, 10))
    assert psnr(black, grey) == pytest.approx(20 * np.log10(255 / 10))
    assert psnr(grey, grey) == np.inf
    delta, factor = difference(grey, black)
    assert factor == 16
    assert (np.asarray(delta) == 160).all()
    assert difference(grey, grey)[1] == 1


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), [(16, 16), (64, 128), (200, 100), (700, 40)])
@pytest.mark.parametrize("words", [1, 300])
def test_comparison_clips_no_text_and_keeps_its_margins(width: int, height: int, words: int) -> None:
    image = Image.new("RGB", (width, height), "navy")
    panels = [(image, "Stock", "0.41 s"), (image, "Difference, amplified 64x", "PSNR 27.4 dB, and so on")] * 2
    picture = np.asarray(comparison(panels, "wörd " * words + "w" * 300, "how it was measured; " * words))
    edge = [picture[:12], picture[-12:], picture[:, :12], picture[:, -12:]]
    assert all((part == 255).all() for part in edge)


# Writing files


def test_nothing_is_overwritten(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "outputs"
    folder.mkdir()
    (folder / "agentsd-0007-stock.png").write_text("mine")
    (folder / "agentsd-notes.png").write_text("mine")
    run("--num-images", 2)
    assert sorted(path.name for path in folder.glob("agentsd-000*.png")) == [
        "agentsd-0007-stock.png",
        "agentsd-0008.png",
        "agentsd-0009.png",
    ]
    assert (folder / "agentsd-0007-stock.png").read_text() == "mine"


@pytest.mark.parametrize("links", [True, False])
def test_writers_at_the_same_time_get_names_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    images = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in range(24)]
    names: list[Path] = []

    def write(part: list[Image.Image]) -> None:
        for image in part:
            names.extend(Output(tmp_path, 1).save([(image, "text")]))

    threads = [threading.Thread(target=write, args=(images[start::4],)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(names)) == 24
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(name.name for name in names)
    assert {pixels(name)[0, 0, 0] for name in names} == set(range(24))


def test_written_files_have_the_usual_permissions(tmp_path: Path) -> None:
    Output(tmp_path / "a.png", 1).save([(Image.new("RGB", (8, 8)), "")])
    (tmp_path / "b.png").touch()
    assert (tmp_path / "a.png").stat().st_mode == (tmp_path / "b.png").stat().st_mode


def test_full_disk_leaves_no_half_file(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        code, _, err = run("--output", "here")
    assert code == 2
    assert err == "agentsd-generate: error: here/agentsd-0001.png: No space left on device\n"
    assert list((tmp_path / "here").iterdir()) == []


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model nosuch", "unknown model 'nosuch'"),
        ("--model ./nosuch/folder", "unknown model"),
        ("--model empty", "holds no pipeline"),
        ("--model broken.safetensors", "not a sound safetensors file"),
        ("--model cut.safetensors", "not a sound safetensors file"),
        ("--model weights.ckpt", "pickled"),
        ("--model text.txt", "neither a .safetensors file nor a folder"),
        ("--prompt x --prompt-file text.txt", "not allowed with"),
        ("--width 100", "--width must be a multiple of 8 for this model, not 100"),
        ("--height -8", "--height: must be a whole number from 1, not '-8'"),
        ("--steps 0", "--steps: must be a whole number from 1, not '0'"),
        ("--steps two", "--steps: must be a whole number from 1, not 'two'"),
        ("--seed -1", "--seed: must be a whole number from 0"),
        ("--guidance-scale nan", "--guidance-scale: must be a number of at least 0, not 'nan'"),
        ("--ratio 0.99", "ratio is 0.99"),
        ("--ratio -0.1", "--ratio: must be a number of at least 0"),
        (
            "--preset fast --ratio 0.3",
            "ratio=0.3 has no effect: it is for attention agent or merge",
        ),
        ("--ratio 0.3 --set attention=kv", "ratio=0.3 has no effect: it is for attention agent or merge"),
        ("--set attention=kv --ratio 0.3", "ratio=0.3 has no effect: it is for attention agent or merge"),
        ("--preset nosuch", "preset is 'nosuch'"),
        ("--config nosuch.yaml", "nosuch.yaml: No such file or directory"),
        ("--config unknown.yaml", "no field 'ratoi'"),
        ("--config tangled.yaml", "tangled.yaml"),
        ("--config unknown.yaml --preset paper", "not allowed with"),
        ("--set 0/stirde=2", "no field 'stirde'"),
        ("--set 0/stride=0", "stride is 0"),
        ("--set 5/stride=2", "5/stride names no entry; there are 0 to 1"),
        ("--set kv_ratio=0.5", "kv_ratio=0.5 has no effect"),
        ("--set steps/intervall=2", "no field 'intervall'"),
        ("--set stride", "--set must be KEY=VALUE, not 'stride'"),
        ("--set 0/stride=[", "is not YAML"),
        ("--stock --ratio 0.2 --set seed=1", "--stock excludes --preset, --config, --ratio and --set"),
        ("--stock --compare", "--compare shows stock and accelerated"),
        ("--scheduler nosuch", "scheduler must be one of ddim"),
        ("--dtype float8", "dtype must be one of float32"),
        ("--device nosuch", "device 'nosuch' does not exist here; there is"),
        ("--device cuda:99", "device 'cuda:99' does not exist here; there is"),
        ("--device meta", "device 'meta' does not exist here"),
        ("--attention-backend nosuch", "attention backend 'nosuch' cannot be used here"),
        ("--lora nosuch.safetensors", "LoRA nosuch.safetensors must be"),
        ("--strength 0.5", "--strength needs --init-image"),
        ("--mask start.png", "--mask needs --init-image"),
        ("--init-image start.png --strength 0", "--strength: must be above 0 and at most 1, not 0"),
        ("--init-image start.png --strength 0.1", "--strength 0.1 of 2 steps leaves no step"),
        ("--init-image nosuch.png", "nosuch.png: No such file or directory"),
        ("--init-image text.txt", "text.txt is not a picture"),
        ("--from-png nosuch.png", "nosuch.png: No such file or directory"),
        ("--from-png text.txt", "text.txt is not a picture"),
        ("--from-png start.png", "start.png carries no generation parameters"),
        ("--from-png odd.png", "odd.png carries generation parameters that cannot be read"),
        ("--output start.png", "start.png exists already; nothing is overwritten"),
        ("--output new.jpg", "must end in .png or be a folder"),
        ("--output new.png --num-images 2", "is one file, but 2 images are to be made"),
        ("--output text.txt", "text.txt: File exists"),
        ("--output text.txt/folder", "text.txt/folder: Not a directory"),
        ("--nosuch", "unrecognized arguments: --nosuch"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(run: Run, tmp_path: Path, arguments: str, message: str) -> None:
    pytest.importorskip("peft", reason="without peft every LoRA is refused") if "--lora" in arguments else None
    shade(tmp_path / "start.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "weights.ckpt").write_bytes(b"\x80\x04")
    (tmp_path / "broken.safetensors").write_bytes(b"not a safetensors file at all")
    (tmp_path / "cut.safetensors").write_bytes(
        b'\x3b\0\0\0\0\0\0\0{"a":{"dtype":"F32","shape":[99],"data_offsets":[0,396]}}   '
    )
    (tmp_path / "unknown.yaml").write_text("ratoi: 0.3\n")
    (tmp_path / "tangled.yaml").write_text("ratio: [0.3\nphases: }\n")
    text = "x\nSteps: many, Sampler: DDIM, CFG scale: 4, Seed: 1, Size: 8x8"
    write_image(tmp_path / "odd.png", Image.new("RGB", (8, 8)), text={"parameters": text})
    code, out, err = run(*arguments.split())
    assert (code, out) == (2, "")
    assert message in err
    assert re.fullmatch("agentsd-generate: error: .*\n", err)


@pytest.mark.parametrize(
    ("contents", "message"), [(None, "No such file"), (b"\n \n", "holds no prompt"), (b"\xff\xfe", "not text in UTF-8")]
)
def test_bad_prompt_file(run: Run, tmp_path: Path, contents: bytes | None, message: str) -> None:
    if contents is not None:
        (tmp_path / "prompts.txt").write_bytes(contents)
    code, out, err = run("--prompt-file", "prompts.txt", prompt=False)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_prompt_that_is_not_text(run: Run) -> None:
    code, out, err = run("--negative-prompt", "\udcff")
    assert (code, out, err) == (2, "", "agentsd-generate: error: the prompt is not text in UTF-8\n")


def test_prompt_is_needed(run: Run) -> None:
    assert run(prompt=False)[::2] == (2, "agentsd-generate: error: --prompt, --prompt-file or --from-png is needed\n")


def test_unreachable_hub_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, out, err = run(model="nobody/no-such-model")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "'nobody/no-such-model' is not on this machine and could not be downloaded" in err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission(run: Run, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    code, out, err = run("--output", "locked")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "Permission denied" in err


def test_folder_that_takes_no_files(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(dir: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(dir))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    code, out, err = run()
    assert (code, out, err) == (2, "", "agentsd-generate: error: outputs: Permission denied\n")


def test_lora_without_peft(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    code, out, err = run("--lora", "x.safetensors")
    assert (code, out, err) == (2, "", "agentsd-generate: error: LoRA needs the package peft, which is not installed\n")


def test_lora_of_another_model(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from safetensors.torch import save_file

    save_file({"unet.nosuch.lora_A.weight": torch.zeros(2, 3)}, tmp_path / "other.safetensors")
    code, out, err = run("--lora", "other.safetensors")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "LoRA other.safetensors does not fit the model" in err


@pytest.mark.parametrize("change", ["missing", "different"])
def test_repeating_needs_the_same_initial_image(run: Run, tmp_path: Path, change: str) -> None:
    shade(tmp_path / "start.png")
    run("--init-image", "start.png")
    (tmp_path / "start.png").unlink()
    if change == "different":
        Image.new("RGB", (64, 64)).save(tmp_path / "start.png")
    code, out, err = run("--from-png", "outputs/agentsd-0001.png", prompt=False)
    assert (code, out, err.count("\n")) == (2, "", 1)
    message = (
        "start.png: No such file" if change == "missing" else "the init image has changed since outputs/agentsd-0001"
    )
    assert message in err
    Image.new("RGB", (64, 64)).save(tmp_path / "start.png")
    assert run("--from-png", "outputs/agentsd-0001.png", "--init-image", "start.png", prompt=False)[0] == 0


def test_out_of_memory_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import StableDiffusionPipeline

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a lot\nand more")

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", fail)
    code, _, err = run()
    assert code == 2
    assert re.fullmatch("agentsd-generate: error: out of memory; .*\n", err)


# The command itself


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "agentsd.cli.generate", *map(str, arguments)]


@pytest.mark.slow
def test_interrupt_keeps_finished_images_and_leaves_no_half_file(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    arguments = (
        "--model",
        tiny_pipeline_folder,
        "--prompt",
        "x",
        "--steps",
        20,
        "--num-images",
        500,
        "--output",
        tmp_path,
    )
    process = subprocess.Popen(
        command(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509  a background job ignores it
    )
    deadline = time.monotonic() + 300
    while len(list(tmp_path.glob("*.png"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    files = sorted(tmp_path.iterdir())
    assert 2 <= len(files) < 500
    assert err == f"agentsd-generate: interrupted; images finished: {len(files)}\n"
    for number, file in enumerate(files, 1):
        assert file.name == f"agentsd-{number:04d}.png"
        assert pixels(file).shape == (64, 64, 3)


@pytest.mark.slow
def test_progress_bar_is_labelled(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    arguments = command(
        "--model", tiny_pipeline_folder, "--prompt", "x", "--steps", 2, "--output", tmp_path, "--num-images", 2
    )
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=follower)
    os.close(follower)
    shown = b""
    while chunk := read(leader):
        shown += chunk
    assert process.wait(timeout=300) == 0
    assert b"image 1/2:   0%" in shown
    assert b"image 2/2:   0%" in shown


def read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except OSError:
        return b""


def test_latin_terminal_gets_its_table(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
        patch.setattr(sys, "stdout", stream)
        assert run()[0] == 0
        stream.flush()
        assert b"?????" in stream.buffer.getvalue()


def test_help_lists_every_option_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert exit.value.code == 0
    out = capsys.readouterr().out
    options = """prompt prompt-file negative-prompt from-png model model-config lora dtype device allow-pickle stock
        preset config ratio set attention-backend compile steps guidance-scale scheduler seed height width num-images
        batch-size init-image strength mask output compare quiet version"""
    for option in options.split():
        assert re.search(rf"^  --{option}\b", out, re.MULTILINE), option
    assert max(map(len, out.splitlines())) <= 110
    for preset in agentsd.AgentSDConfig.presets():
        assert preset in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out.startswith(f"agentsd {agentsd.__version__}, torch {torch.__version__}, diffusers ")
