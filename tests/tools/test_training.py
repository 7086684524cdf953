"""The trainings in scripts/training: the embedded model, and tiny vision transformers; both resume."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from agentsd.demo import VOCABULARY, scenes

TRAINING = Path(__file__).resolve().parents[2] / "scripts" / "training"
SCRIPT = TRAINING / "vit_digits.py"
OPTIONS = ["--epochs", "1", "--side", "8", "--agents", "4", "--seeds", "1", "--long", "8", "16", "--variant", "softmax"]


@pytest.fixture(scope="module")
def demo() -> dict[str, Any]:
    """The names in scripts/training/demo.py."""
    return runpy.run_path(str(TRAINING / "demo.py"))


def test_the_tokenizer_is_made_the_same_each_time(demo: dict[str, Any], tmp_path: Path) -> None:
    for name in "abcd":
        tokenizer = demo["make_tokenizer"](tmp_path / name)
    for file in ("vocab.json", "merges.txt"):
        assert len({(tmp_path / name / file).read_bytes() for name in "abcd"}) == 1
    assert all(len(tokenizer(word).input_ids) == 3 for word in VOCABULARY)


@pytest.mark.slow
def test_training_resumes_bit_identically(
    demo: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import Accelerator

    stages = tuple(demo["Stage"](grid, 2, 2, 1e-3, 1e-3) for grid in (16, 32))
    recipe = demo["Recipe"](vae_steps=2, text_steps=4, checker_steps=2, stages=stages)

    def run(folder: Path) -> None:
        trainer = demo["Trainer"](recipe, folder, Accelerator(cpu=True), checkpoint_every=1, sample_every=0)
        for stage in demo["STAGES"]:
            getattr(trainer, stage)()

    at_once, broken = tmp_path / "at once", tmp_path / "broken"
    run(at_once)
    render, calls = scenes.render, 0

    def interrupted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls in (2, 6, 10):
            raise KeyboardInterrupt
        return render(*args)

    monkeypatch.setattr(scenes, "render", interrupted)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            run(broken)
    run(broken)
    for path in ("checker.safetensors", "diffusion-16.safetensors", "model/unet/diffusion_pytorch_model.safetensors"):
        first, second = load_file(at_once / path), load_file(broken / path)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), path
    log = [json.loads(line) for line in (at_once / "log.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in log} == {"text", "vae", "diffusion-16", "diffusion-32", "checker"}


@pytest.fixture
def _vit() -> None:
    for package in ("timm", "sklearn", "matplotlib"):
        pytest.importorskip(package)


def run(monkeypatch: pytest.MonkeyPatch, *options: str | Path) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, options)])
    return runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.mark.slow
@pytest.mark.usefixtures("_vit")
def test_the_digits_training_resumes_and_the_document_has_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, document = tmp_path / "digits.json", tmp_path / "module.md"
    script = runpy.run_path(str(SCRIPT))
    start, end = (f"<!-- {slash}{script['MARK']} -->" for slash in ("", "/"))
    document.write_text(f"before\n{start}\nold\n{end}\nafter\n", encoding="utf-8")
    where = ["--output", output, "--document", document]
    run(monkeypatch, *OPTIONS, *where)
    first = json.loads(output.read_text())
    assert list(first["runs"]) == ["softmax"]
    run(monkeypatch, *OPTIONS, "--variant", "agent + bias + DWC", *where)
    second = json.loads(output.read_text())
    assert second["runs"]["softmax"] == first["runs"]["softmax"]
    assert list(second["runs"]["agent + bias + DWC"]) == ["0"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits.json", "digits.png", "module.md"]
    text = document.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith(f"{end}\nafter\n")
    assert "old" not in text
    assert script["table"](second).strip() in text


@pytest.mark.usefixtures("_vit")
def test_results_of_other_settings_are_not_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "digits.json"
    output.write_text(json.dumps({"settings": {"epochs": 9}}))
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *OPTIONS, "--output", output)
    assert stop.value.code == 2
    assert "holds runs with {'epochs': 9}; choose another file" in capsys.readouterr().err


@pytest.mark.usefixtures("_vit")
def test_variants_start_from_the_same_weights() -> None:
    script = runpy.run_path(str(SCRIPT))
    states = [script["build"](variant, 8, 4, 0).state_dict() for variant in script["VARIANTS"]]
    assert all(state[name].equal(states[0][name]) for state in states for name in states[0])
