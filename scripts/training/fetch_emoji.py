#!/usr/bin/env python
"""Make the folder `emoji/` from the npm package that carries Microsoft's Fluent Emoji (needs npm).

python scripts/training/fetch_emoji.py
"""

import hashlib
import io
import subprocess
import tarfile
import tempfile
from pathlib import Path

from PIL import Image
from scenes import EMOJI, OBJECTS

PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
SHA256 = "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"
SIDE = 192


def download() -> bytes:
    """The package's tarball, with its checksum verified."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        content = next(Path(folder).glob("*.tgz")).read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != SHA256:
        raise SystemExit(f"{PACKAGE}: SHA-256 {found}, expected {SHA256}")
    return content


def main() -> None:
    """Write one picture for each object."""
    EMOJI.mkdir(exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(download())) as tar:
        for name, points in OBJECTS.items():
            member = tar.extractfile(f"package/assets/{points}.webp")
            assert member is not None
            picture = Image.open(member).convert("RGBA").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            picture.save(EMOJI / f"{name}.webp", quality=88, method=6)


if __name__ == "__main__":
    main()
