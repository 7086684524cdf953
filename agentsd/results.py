"""Files that appear complete or not at all, the environment of a measurement, and measured tables in documents."""

import importlib.metadata
import json
import os
import platform
import re
import secrets
import subprocess
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image


def _write(path: Path, content: bytes, put: Callable[[Path, Path], None]) -> None:
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with unfinished.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        put(unfinished, path)
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise
    finally:
        unfinished.unlink(missing_ok=True)


def _link(unfinished: Path, path: Path) -> None:
    try:
        os.link(unfinished, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: claim the name, then replace the claim
        path.touch(exist_ok=False)
        os.replace(unfinished, path)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that appears complete or not at all; an OSError names it."""
    _write(path, content, os.replace)


def claim(path: Path, content: bytes) -> None:
    """Write a file that appears complete or not at all; FileExistsError if the name is taken."""
    _write(path, content, _link)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON; ValueError names the file if it is not."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from None


def png(image: "Image", text: Mapping[str, str] | None = None) -> bytes:
    """A PNG file with text chunks; the same image and text make the same bytes."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, value)
    stream = BytesIO()
    image.save(stream, "PNG", pnginfo=info)
    return stream.getvalue()


def write_image(path: Path, image: "Image", *, text: Mapping[str, str] | None = None) -> None:
    write_bytes(path, png(image, text))


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a matplotlib figure in the format of the file's suffix, complete or not at all, and close it."""
    import matplotlib.pyplot as plt

    stream = BytesIO()
    # Without a date, the same figure makes the same bytes.
    figure.savefig(stream, format=path.suffix[1:], metadata={"Date": None} if path.suffix == ".svg" else {})
    plt.close(figure)
    write_bytes(path, stream.getvalue())


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = False) -> str:
    """A table for a terminal; with numbers, all columns but the first are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    pads = [str.ljust, *[str.rjust if numbers else str.ljust] * (len(widths) - 1)]
    rule = ["─" * width for width in widths]
    lines = [[pad(cell, n) for pad, cell, n in zip(pads, line, widths, strict=True)] for line in (header, rule, *rows)]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def machine(environment: Mapping[str, Any]) -> str:
    """An environment in a few words."""
    about = "{device}, {threads} threads, torch {torch}, diffusers {diffusers}"
    return about.format_map(environment)


def filled(document: Path, mark: str, text: str | Callable[[list[str]], str]) -> str:
    """A document with another text between the lines `<!-- mark WORD … -->` and `<!-- /mark -->`.

    Args:
        document: where it is.
        mark: the first word of the lines.
        text: what to put there, or what makes it of the words after the mark.
    """
    pattern = re.compile(rf"(<!-- {re.escape(mark)} ([^>\n]*)-->\n).*?(<!-- /{re.escape(mark)} -->)", re.DOTALL)

    def put(found: re.Match[str]) -> str:
        content = text if isinstance(text, str) else text(found[2].split())
        return f"{found[1]}\n{content.strip()}\n\n{found[3]}"

    after, count = pattern.subn(put, document.read_text(encoding="utf-8"))
    if not count:
        raise ValueError(f"{document} has no lines <!-- {mark} --> and <!-- /{mark} --> to put tables between")
    return after


def put_between(document: Path, mark: str, text: str) -> None:
    """Replace what is between the lines `<!-- mark … -->` and `<!-- /mark -->` of a document."""
    write_text(document, filled(document, mark, text))


def version(package: str) -> str | None:
    """Of an installed package; None where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(device: str) -> dict[str, Any]:
    """Date, versions, device, threads and commit."""
    import torch

    names = ("torch", "diffusers", "transformers", "agentsd", "tomesd", "DeepCache", "tgate")
    cuda = torch.device(device).type == "cuda"
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "python": platform.python_version(),
        **{name: found for name in names if (found := version(name))},
        "device": torch.cuda.get_device_name(device) if cuda else _cpu(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "threads": torch.get_num_threads(),
        "commit": _output("git", "rev-parse", "HEAD"),
    }


def _output(*command: str) -> str | None:
    """The first line that a command prints beside this file; None where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return next(iter(done.stdout.splitlines()), None)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
