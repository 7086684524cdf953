"""The training of tiny vision transformers: it runs, goes on where it was, and the document has its numbers."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "train_vit_digits.py"
OPTIONS = ["--epochs", "1", "--side", "8", "--agents", "4", "--seeds", "1", "--long", "8", "16", "--variant", "softmax"]


@pytest.fixture(autouse=True)
def _needs_the_extra() -> None:
    for package in ("timm", "sklearn", "matplotlib"):
        pytest.importorskip(package)


def run(monkeypatch: pytest.MonkeyPatch, *options: str | Path) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, options)])
    return runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.mark.slow
def test_it_trains_and_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, document = tmp_path / "digits.json", tmp_path / "module.md"
    script = runpy.run_path(str(SCRIPT))
    document.write_text(f"before\n{script['START']}\nold\n{script['END']}\nafter\n{script['END']}\n", encoding="utf-8")
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
    assert text.endswith(f"\nafter\n{script['END']}\n"), "another script's tables come later"
    assert "old" not in text
    assert script["table"](second) in text


def test_results_of_other_settings_are_not_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "digits.json"
    output.write_text(json.dumps({"settings": {"epochs": 9}}))
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *OPTIONS, "--output", output)
    assert stop.value.code == 2
    assert "holds runs with {'epochs': 9}; choose another file" in capsys.readouterr().err


def test_variants_start_from_the_same_weights() -> None:
    script = runpy.run_path(str(SCRIPT))
    states = [script["build"](variant, 8, 4, 0).state_dict() for variant in script["VARIANTS"]]
    assert all(state[name].equal(states[0][name]) for state in states for name in states[0])
