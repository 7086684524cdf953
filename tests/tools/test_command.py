"""What all commands have in common: exit codes, one line for an error, warnings of this package."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from agentsd import AgentSDWarning
from agentsd.cli import bench, command, evaluate, generate, tune, ui

COMMANDS: dict[str, Callable[[list[str]], int]] = {
    module.PROGRAM: module.main  # type: ignore[attr-defined]
    for module in (bench, evaluate, generate, tune, ui)
}


def raised(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("ratio is 2;\n it must be less"), 2, "error: ratio is 2; it must be less"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), 2, "error: a.txt: No such file or directory"),
        (OSError(28, "No space left on device"), 2, "error: No space left on device"),
        (OSError("a line\nand another"), 2, "error: a line and another"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 2, "error: out of memory; --dtype float16 needs less"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 2, "error: out of memory; --dtype"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 2, "error: out of mem"),
    ],
)
def test_an_error_is_one_line(error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run("agentsd-x", raised(error)) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"agentsd-x: {line}")
    assert err.count("\n") == 1


def test_a_defect_is_not_hidden() -> None:
    with pytest.raises(RuntimeError, match="the sizes differ"):
        command.run("agentsd-x", raised(RuntimeError("the sizes differ")))


def test_warnings_of_the_package_are_shown_and_no_others(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        for _ in range(2):
            warnings.warn("few\nsteps", AgentSDWarning, stacklevel=1)
            warnings.warn("of another library", stacklevel=1)

    before = warnings.showwarning
    assert command.run("agentsd-x", work) == 0
    assert capsys.readouterr().err == "agentsd-x: warning: few steps\n"
    assert warnings.showwarning is before


@pytest.mark.parametrize("program", COMMANDS)
def test_an_unknown_option_is_one_line(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert COMMANDS[program](["--no-such-option"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{program}: error: ")
    assert f"(see {program}" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("text", "value"), [("1", 1), ("07", 7), ("9", 9)])
def test_whole_numbers(text: str, value: int) -> None:
    assert command.whole(1, 9)(text) == value


@pytest.mark.parametrize("text", ["0", "10", "-1", "1.0", "", "one", "²", "9" * 5000])
def test_what_is_no_whole_number_in_the_range(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = command.Parser(prog="agentsd-x")
    parser.add_argument("--steps", type=command.whole(1, 9))
    assert command.run("agentsd-x", lambda: parser.parse_args([f"--steps={text}"])) == 2
    assert f"argument --steps: must be a whole number from 1 to 9, not {text!r}" in capsys.readouterr().err


def test_a_run_of_few_steps_is_warned_of_on_the_command_line(
    tiny_pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--prompt", "x", "--model", str(tiny_pipeline_folder), "--preset", "turbo", "--steps", "6", "--quiet"]
    assert generate.main([*words, "--set", "steps/max_gap=null", "--output", str(tmp_path / "a.png")]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(told) == 1
    assert "agentsd-generate: warning: interval of steps is 3: in a run of 6 steps, " in told[0]
