"""What all commands share: their options, messages and exit codes."""

import argparse
import io
import math
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

from tqdm import tqdm

from agentsd.config import AgentSDWarning


class Parser(argparse.ArgumentParser):
    """Bad options are a ValueError, which `run` prints."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=110)


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """The type of an option that is a whole number."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low or (high is not None and value > high):
            allowed = f"from {low}" if high is None else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"must be a whole number {allowed}, not {text!r}")
        return value

    return read


def number(text: str) -> float:
    """The type of an option that is a number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, not {text!r}")
    return value


def say(program: str, line: str) -> None:
    """Print a line to the standard error, above any progress bar."""
    tqdm.write(f"{program}: {line}", file=sys.stderr)
    sys.stderr.flush()


def run(
    program: str,
    work: Callable[[], object],
    *,
    interrupted: Callable[[], str] = lambda: "interrupted",
    out_of_memory: str = "out of memory; --dtype float16 needs less",
) -> int:
    """Do a command's work; return its exit code: 0, or 2 after one line about bad input, or 130 after an interrupt.

    Of the warnings, those of this package are shown, in one line each.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without Unicode shows a table in question marks
            stream.reconfigure(errors="replace")

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        say(program, f"warning: {' '.join(str(message).split())}")

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("default", AgentSDWarning)
            warnings.showwarning = show
            work()
    except KeyboardInterrupt:
        say(program, interrupted())
        return 130
    except (ValueError, OSError) as error:
        say(program, f"error: {_sentence(error)}")
        return 2
    except (MemoryError, RuntimeError) as error:
        from accelerate.utils.memory import should_reduce_batch_size

        if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
            raise
        say(program, f"error: {out_of_memory}")
        return 2
    return 0


def _sentence(error: ValueError | OSError) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())


def quieten() -> None:
    """No messages and progress bars of diffusers and transformers."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
