"""The scores of a protocol as columns of a table."""

from dataclasses import dataclass

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
_STOCK = "to the stock image of the same seed"
# pair: label, better, digits, explanation
_PAIRS = {
    "psnr": ("PSNR, dB", "more", 1, f"{_STOCK}, median"),
    "ssim": ("SSIM", "more", 4, _STOCK),
    "ms-ssim": ("MS-SSIM", "more", 4, _STOCK),
    "lpips": ("LPIPS ({})", "less", 4, _STOCK),
    "checker": ("checker distance", "less", 4, "LPIPS's formula on the attribute checker's layers, to the stock image"),
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
            for name, about in (
                ("precision", "share within the reference"),
                ("recall", "share of the reference covered"),
            ):
                found.append(Column(f"{network}_{name}", f"{name} ({where})", "more", 3, about))
    if "clip" in scores.adherence:
        found.append(Column("clip", "CLIP score", "more", 2, f"100 × cosine of image and prompt, {scores.clip}"))
    attributes = []
    if "attributes" in scores.adherence:
        from agentsd.demo.checker import ATTRIBUTES

        about = "images in which the attribute checker finds all that is asked for, and nothing else"
        found.append(Column("attributes_all", "all right, %", "more", 1, about))
        about = "share of what is asked for that the attribute checker reads"
        attributes = [Column(f"attributes_{name}", f"{name}, %", "more", 1, f"{about}: {name}") for name in ATTRIBUTES]
    for name in scores.pairs:
        label, better, digits, about = _PAIRS[name]
        found.append(Column(name, label.format(scores.lpips), better, digits, about))
    if "psnr" in scores.pairs:
        found.append(Column("psnr_worst", "worst PSNR, dB", "more", 1, "of any image to its stock image"))
    return found + attributes
