"""Files that appear complete or not at all, and tables in documents."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from agentsd import results

WRITERS = [results.write_bytes, results.claim]


@pytest.mark.parametrize("write", WRITERS)
def test_a_file_is_written_and_nothing_else_left(write: Any, tmp_path: Path) -> None:
    write(tmp_path / "file", b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"content"


@pytest.mark.parametrize(
    ("write", "name", "step"),
    [
        (results.write_bytes, "old", "fsync"),
        (results.write_bytes, "old", "replace"),
        (results.claim, "new", "fsync"),
        (results.claim, "new", "link"),
    ],
)
def test_an_interrupted_write_leaves_what_was_there(
    write: Any, name: str, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    (tmp_path / "old").write_bytes(b"old")
    monkeypatch.setattr(os, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / name, b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_bytes() == b"old"


def test_writing_replaces_and_claiming_does_not(tmp_path: Path) -> None:
    path = tmp_path / "file"
    results.claim(path, b"1")
    with pytest.raises(FileExistsError) as raised:
        results.claim(path, b"2")
    assert raised.value.filename == str(path)
    assert path.read_bytes() == b"1"
    results.write_bytes(path, b"3")
    assert path.read_bytes() == b"3"


def test_claiming_works_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", refused)
    results.claim(tmp_path / "file", b"1")
    with pytest.raises(FileExistsError):
        results.claim(tmp_path / "file", b"2")
    assert (tmp_path / "file").read_bytes() == b"1"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("write", WRITERS)
def test_an_error_names_the_file_that_was_asked_for(write: Any, tmp_path: Path) -> None:
    path = tmp_path / "missing" / "file"
    with pytest.raises(OSError, match="No such file") as raised:
        write(path, b"")
    assert raised.value.filename == str(path)


def test_json_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    value = {"δ": [1, 2.5, None], "text": "512×512"}
    results.write_json(path, value)
    assert results.read_json(path) == value
    assert "512×512" in path.read_text(encoding="utf-8")
    path.write_text("{")
    with pytest.raises(ValueError, match=r"file\.json is not JSON"):
        results.read_json(path)


def test_the_same_image_and_text_are_the_same_bytes(tmp_path: Path) -> None:
    image = Image.new("RGB", (3, 2), (10, 20, 30))
    for name in "ab":
        results.write_image(tmp_path / name, image, text={"prompt": "a ring, rouge à lèvres"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    read = Image.open(tmp_path / "a")
    assert read.tobytes() == image.tobytes()
    assert read.info["prompt"] == "a ring, rouge à lèvres"


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_same_figure_is_the_same_bytes(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setitem(plt.rcParams, "svg.hashsalt", "salt")
    for name in "ab":
        figure, axis = plt.subplots()
        axis.plot([1, 2])
        results.save_figure(figure, tmp_path / f"{name}{suffix}")
        assert not plt.get_fignums()
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_a_table_in_markdown() -> None:
    table = results.markdown_table(["a", "b"], [["x|y", 1], ["", 2.5]])
    assert table == "| a | b |\n| --- | --- |\n| x\\|y | 1 |\n|  | 2.5 |"


def test_tables_go_between_the_marks_of_their_tool(tmp_path: Path) -> None:
    document = tmp_path / "document.md"
    other = "<!-- another -->\nkept\n<!-- /another -->\n"
    document.write_text(f"before\n<!-- tool -->\nold\n<!-- /tool -->\n{other}after\n")
    for _ in range(2):
        results.put_between(document, "tool", "new\n")
        assert document.read_text() == f"before\n<!-- tool -->\n\nnew\n\n<!-- /tool -->\n{other}after\n"


def test_the_words_of_a_mark_say_what_goes_there(tmp_path: Path) -> None:
    document = tmp_path / "document.md"
    document.write_text("<!-- tool a.json x -->\n<!-- /tool -->\n<!-- tool b.json -->\nold\n<!-- /tool -->\n")
    filled = results.filled(document, "tool", " and ".join)
    assert filled == (
        "<!-- tool a.json x -->\n\na.json and x\n\n<!-- /tool -->\n<!-- tool b.json -->\n\nb.json\n\n<!-- /tool -->\n"
    )


@pytest.mark.parametrize("text", ["no marks", "<!-- tool -->\n", "<!-- toolbox -->\n<!-- /toolbox -->"])
def test_a_document_without_the_marks_is_an_error_and_stays(text: str, tmp_path: Path) -> None:
    document = tmp_path / "document.md"
    document.write_text(text)
    with pytest.raises(ValueError, match=r"document\.md has no lines <!-- tool -->"):
        results.put_between(document, "tool", "new")
    assert document.read_text() == text


def test_the_environment_names_what_a_measurement_depends_on() -> None:
    import torch

    found = results.environment("cpu")
    assert found["python"] == sys.version.split()[0]
    assert torch.__version__.startswith(found["torch"])
    assert found["threads"] == torch.get_num_threads()
    assert found["device"]
    assert results.version("no-such-package") is None
