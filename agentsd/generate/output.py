"""Names for pictures: nothing is overwritten."""

import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL.Image import Image

from agentsd.results import claim, png

_OTHER_FORMATS = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


class Output:
    """Where pictures go: a numbered name in a folder for each, or one file that must not exist yet.

    Each is written under its name and, where there are several pictures to one name, with a suffix for each.
    """

    def __init__(self, path: Path, count: int, suffixes: Sequence[str] = ("",)):
        if path.suffix.lower() in _OTHER_FORMATS:
            raise ValueError(f"--output {path} must end in .png or be a folder: pictures are written as PNG")
        self.path = path
        self.suffixes = suffixes
        self.is_file = path.suffix.lower() == ".png" and not path.is_dir()
        self.folder = path.parent if self.is_file else path
        if self.is_file and count > 1:
            raise ValueError(f"--output {path} is one file, but {count} images are to be made: name a folder")
        for target in self._targets(path.with_suffix("")) if self.is_file else []:
            if target.exists():
                raise ValueError(f"--output {target} exists already; nothing is overwritten")

    def check(self) -> None:
        """Make the folder and try whether it takes files."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.folder):
            pass

    def save(self, pictures: Sequence[tuple[Image, str]]) -> list[Path]:
        """Write pictures, one for each suffix, each with its generation parameters; return their names."""
        files = [png(image, {"parameters": text}) for image, text in pictures]
        for stem in [self.path.with_suffix("")] if self.is_file else self._stems():
            targets = self._targets(stem)
            if any(target.exists() for target in targets):
                continue
            try:
                for target, content in zip(targets, files, strict=True):
                    claim(target, content)
            except FileExistsError:  # somebody else took the name a moment ago
                continue
            return targets
        raise ValueError(f"--output {self.path} exists by now; nothing is overwritten")

    def _targets(self, stem: Path) -> list[Path]:
        return [stem.with_name(f"{stem.name}{suffix}.png") for suffix in self.suffixes]

    def _stems(self) -> Iterator[Path]:
        matches = [re.match(r"agentsd-(\d+)", path.name) for path in self.folder.glob("agentsd-*.png")]
        number = max((int(match[1]) for match in matches if match), default=0)
        while True:
            number += 1
            yield self.folder / f"agentsd-{number:04d}"
