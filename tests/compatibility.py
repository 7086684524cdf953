"""docs/compatibility.md: every family with every operation, as the tests found it.

A test that finds out about a pair says so to the fixture `compatibility`, which holds it against the table, or with
`--write-compatibility` puts it there.
"""

from pathlib import Path

import pytest

TABLE = Path(__file__).parent.parent / "docs" / "compatibility.md"

HEAD = """# What works with what

Each row is a kind of pipeline, each column something that is done to a pipeline. The tests build the pipeline from
real diffusers classes with random weights and draw with the operation before `agentsd.apply`, with the operation after
it, and after `agentsd.remove`, on the CPU. *yes*: both orders give the same accelerated image, it is another than the
stock one, and removal gives the stock one back bit for bit. *refused*: together they raise an error that says why.
*–*: the operation does not apply.

*compile*: `torch.compile(pipe.unet)`, `pipe.unet.compile()` and `pipe.unet.compile_repeated_blocks()` with a backend
that runs the graphs as they were captured. The images are those without compilation, bit for bit, and the acceleration
breaks no graph in two. What Inductor makes of the graphs is not tried here. *perturb a layer*: a self-attention layer
has the hook by which diffusers' guiders perturb attention scores; it is unmodified while the others are accelerated.
*meta device and back*: the UNet and the ControlNets go to the device that has no memory and come back to the CPU, where
their weights are loaded again; no GPU was there to move to.

`pytest tests/hosts/test_operations.py tests/hosts/test_compiled.py --write-compatibility` writes this file; the tests
fail where they find otherwise.

"""

Cell = tuple[str, str]
"""A mark and the reason for it."""


class Compatibility:
    """What is known of pairs of a family and an operation."""

    def __init__(self, writing: bool) -> None:
        self.writing = writing
        self.known: dict[tuple[str, str], Cell] = read(TABLE.read_text("utf-8")) if TABLE.exists() else {}

    def __call__(self, family: str, operation: str, mark: str = "yes", reason: str = "") -> None:
        """A test found this."""
        if self.writing:
            self.known[family, operation] = mark, reason
        else:
            stands = self.known.get((family, operation), ("", ""))
            assert stands == (mark, reason), (
                f"{TABLE.name} has {stands} for {operation} with {family}: --write-compatibility renews it"
            )


def render(known: dict[tuple[str, str], Cell], rows: list[str], columns: list[str]) -> str:
    """The table as Markdown, with the reasons as notes below it."""
    notes: dict[str, int] = {}
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    for row in rows:
        cells = []
        for column in columns:
            mark, reason = known.get((row, column), ("", ""))
            cells.append(f"{mark} [{notes.setdefault(reason, len(notes) + 1)}]" if reason else mark)
        lines.append([row, *cells])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    below = "\n".join(f"{number}. {reason}" for reason, number in notes.items())
    return f"{HEAD}{table}\n\n{below}\n"


def read(text: str) -> dict[tuple[str, str], Cell]:
    """The inverse of `render`; a blank is left out."""
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    notes = dict(line.split(". ", 1) for line in text.splitlines() if line[:1].isdigit())
    known = {}
    for row, *cells in table[2:]:
        for column, cell in zip(table[0][1:], cells, strict=True):
            if cell:
                mark, _, note = cell.removesuffix("]").partition(" [")
                known[row, column] = mark, notes[note] if note else ""
    return known


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-compatibility",
        action="store_true",
        help=f"write what the tests of this run find into {TABLE.relative_to(TABLE.parent.parent)}",
    )


@pytest.fixture(scope="session")
def compatibility(request: pytest.FixtureRequest) -> Compatibility:
    """Return a function to say what a family and an operation make of each other."""
    found = Compatibility(request.config.getoption("--write-compatibility"))
    request.config.stash[FOUND] = found
    return found


FOUND = pytest.StashKey[Compatibility]()


def pytest_sessionfinish(session: pytest.Session) -> None:
    found = session.config.stash.get(FOUND, None)
    if found and found.writing:
        # Imported here: they import conftest, which imports this module.
        from families import FAMILIES
        from operations import COLUMNS

        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(render(found.known, list(FAMILIES), COLUMNS), encoding="utf-8")
