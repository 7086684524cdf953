"""agentsd-generate: a prompt becomes a picture, stock or accelerated."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agentsd.cli import command
from agentsd.cli.arguments import ANY_MODEL, PROGRAM, build_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 2 after one line about bad input, or 130 after an interrupt."""
    finished: list[Path] = []
    return command.run(
        PROGRAM,
        lambda: _generate(vars(build_parser().parse_args(argv)), finished),
        interrupted=lambda: f"interrupted; images finished: {len(finished)}",
        out_of_memory="out of memory; a smaller --width and --height, --batch-size 1 or --dtype float16 need less",
    )


def _generate(given: dict[str, Any], finished: list[Path]) -> None:
    from agentsd import describe
    from agentsd.generate.request import check
    from agentsd.generate.run import Run, threads

    command.quieten()
    plan = check(given)
    quiet = plan.settings.quiet
    started = time.perf_counter()
    run = Run(plan)
    if not quiet:
        print(f"{run.summary}; loaded in {time.perf_counter() - started:.1f} s", flush=True)
    with threads(plan.settings.threads):
        for written in run.comparisons() if plan.settings.compare else run.images():
            finished.append(written.paths[0])
            print(*(written.paths if quiet else [f"{written.paths[0]}: {written.line}"]), sep="\n", flush=True)
    if not quiet:
        print("nothing is accelerated" if plan.config is None else describe(run.pipe))
        if plan.settings.model == "demo":
            print(ANY_MODEL)


if __name__ == "__main__":
    raise SystemExit(main())
