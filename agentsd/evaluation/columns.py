"""The scores of a protocol as columns of a table."""

from dataclasses import dataclass, replace

from agentsd.evaluation.protocols import Scores


@dataclass(frozen=True)
class Column:
    """A score in the tables.

    Attributes:
        key: its name in JSON.
        label: its name in tables.
        better: `less`, `more`, or empty where neither is.
        digits: after the point.
        about: one sentence.
    """

    key: str
    label: str
    better: str
    digits: int
    about: str

    @property
    def arrow(self) -> str:
        return {"less": "↓", "more": "↑"}.get(self.better, "")


# network: labels of the Fréchet and the kernel distance, and where the features come from
_DISTANCES = {
    "inception": ("FID", "KID ×1000", "Inception"),
    "pytorch-fid": ("FID (pytorch-fid)", None, "Inception, as pytorch-fid feeds it"),
    "dinov2": ("FD-DINOv2", "KD-DINOv2 ×1000", "DINOv2"),
    "checker": ("Fréchet distance (checker)", "kernel distance (checker) ×1000", "the embedded attribute checker"),
}
_PAIRS = {
    "psnr": Column("psnr", "PSNR, dB", "more", 1, "to the stock image of the same seed, median"),
    "ssim": Column("ssim", "SSIM", "more", 4, "to the stock image of the same seed"),
    "ms-ssim": Column("ms-ssim", "MS-SSIM", "more", 4, "to the stock image of the same seed"),
    "lpips": Column("lpips", "LPIPS ({})", "less", 4, "to the stock image of the same seed"),
    "checker": Column(
        "checker",
        "checker distance",
        "less",
        4,
        "LPIPS's formula on the attribute checker's layers, to the stock image",
    ),
}


def columns(scores: Scores) -> list[Column]:
    """The scores of a protocol, in the order of the tables; a folder may lack some."""
    found = []
    for network in scores.features:
        frechet, kernel, where = _DISTANCES[network]
        about = f"to the reference in features of {where}"
        found.append(Column(f"{network}_frechet", frechet, "less", 2, f"Fréchet distance {about}"))
        if kernel:
            found.append(Column(f"{network}_kernel", kernel, "less", 3, f"kernel distance {about}"))
        if network == "inception":
            found.append(Column("inception_score", "IS", "more", 2, "inception score"))
        if network in ("inception", "dinov2"):
            found += [
                Column(f"{network}_precision", f"precision ({where})", "more", 3, "share within the reference"),
                Column(f"{network}_recall", f"recall ({where})", "more", 3, "share of the reference that is covered"),
            ]
    if "clip" in scores.adherence:
        found.append(Column("clip", "CLIP score", "more", 2, f"100 × cosine of image and prompt, {scores.clip}"))
    attributes = []
    if "attributes" in scores.adherence:
        from agentsd.demo.checker import ATTRIBUTES

        about = "images in which the attribute checker finds all that is asked for, and nothing else"
        found.append(Column("attributes_all", "all right, %", "more", 1, about))
        about = "share of what is asked for that the attribute checker reads"
        attributes = [Column(f"attributes_{name}", f"{name}, %", "more", 1, f"{about}: {name}") for name in ATTRIBUTES]
    found += [replace(_PAIRS[name], label=_PAIRS[name].label.format(scores.lpips)) for name in scores.pairs]
    if "psnr" in scores.pairs:
        found.append(Column("psnr_worst", "worst PSNR, dB", "more", 1, "of any image to its stock image"))
    return found + attributes
