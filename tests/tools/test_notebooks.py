"""Every notebook runs from a clean kernel, and shows what it says it shows."""

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
# Pictures among the outputs.
PICTURES = {
    "01_quick_start": 1,
    "02_how_agent_attention_works": 7,
    "03_speed_and_quality": 2,
    "04_your_stable_diffusion": 0,
}


def executed(name: str, folder: Path) -> list[Any]:
    """The outputs of a notebook's cells."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def texts(outputs: list[Any]) -> str:
    return "".join(output["text"] for output in outputs if output["output_type"] == "stream")


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PYTHONPATH": str(ROOT), "AGENTSD_STEPS": "2", "AGENTSD_REPEATS": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("AGENTSD_MODEL", raising=False)


def test_all_notebooks_are_tested_and_carry_no_outputs() -> None:
    files = sorted((ROOT / "notebooks").glob("*.ipynb"))
    assert [file.stem for file in files] == list(PICTURES)
    for file in files:
        notebook = nbformat.read(file, as_version=4)
        nbformat.validate(notebook)
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert not any(cell.outputs or cell.execution_count for cell in cells), file.name


@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURES)
def test_the_notebook_runs(name: str, tmp_path: Path) -> None:
    outputs = executed(name, tmp_path)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == PICTURES[name]
    assert "Traceback" not in texts(outputs)
    if not PICTURES[name]:
        assert texts(outputs).count("Skipped: ") == 4


@pytest.mark.slow
def test_the_last_notebook_draws_with_a_model_that_is_named(
    tiny_pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTSD_MODEL", str(tiny_pipeline_folder))
    outputs = executed("04_your_stable_diffusion", tmp_path)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert "Skipped" not in texts(outputs)
    assert "96×96 in" in texts(outputs)
    assert (tmp_path / "mine.yaml").is_file()
