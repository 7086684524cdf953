"""The scores of a protocol as columns of a table."""

from dataclasses import dataclass

from agentsd.evaluation.protocols import Scores


@dataclass(frozen=True)
class Column:
    """A score in the tables: `better` is less or more, `digits` are those after the point, `about` is one sentence."""

    key: str
    label: str
    better: str
    digits: int
    about: str

    @property
    def arrow(self) -> str:
        return {"less": "↓", "more": "↑"}.get(self.better, "")


def columns(scores: Scores) -> list[Column]:
    """Every score that there is, in the order of the tables."""
    from agentsd.demo.checker import ATTRIBUTES

    distance, stock = "to the reference in features of", "to the stock image of the same seed"
    right = "images in which the attribute checker finds all that is asked for, and nothing else"
    pytorch_fid, checker = "Inception, as pytorch-fid feeds it", "the embedded attribute checker"
    found = [
        ("inception_frechet", "FID", "less", 2, f"Fréchet distance {distance} Inception"),
        ("inception_kernel", "KID ×1000", "less", 3, f"kernel distance {distance} Inception"),
        ("inception_score", "IS", "more", 2, "inception score"),
        ("inception_precision", "precision (Inception)", "more", 3, "share within the reference"),
        ("inception_recall", "recall (Inception)", "more", 3, "share of the reference covered"),
        ("pytorch-fid_frechet", "FID (pytorch-fid)", "less", 2, f"Fréchet distance {distance} {pytorch_fid}"),
        ("dinov2_frechet", "FD-DINOv2", "less", 2, f"Fréchet distance {distance} DINOv2"),
        ("dinov2_kernel", "KD-DINOv2 ×1000", "less", 3, f"kernel distance {distance} DINOv2"),
        ("dinov2_precision", "precision (DINOv2)", "more", 3, "share within the reference"),
        ("dinov2_recall", "recall (DINOv2)", "more", 3, "share of the reference covered"),
        ("checker_frechet", "Fréchet distance (checker)", "less", 2, f"Fréchet distance {distance} {checker}"),
        ("checker_kernel", "kernel distance (checker) ×1000", "less", 3, f"kernel distance {distance} {checker}"),
        ("clip", "CLIP score", "more", 2, f"100 × cosine of image and prompt, {scores.clip}"),
        (
            "attributes_all",
            "all right, %",
            "more",
            1,
            right,
        ),
        ("psnr", "PSNR, dB", "more", 1, f"{stock}, median"),
        ("ssim", "SSIM", "more", 4, stock),
        ("ms-ssim", "MS-SSIM", "more", 4, stock),
        ("lpips", f"LPIPS ({scores.lpips})", "less", 4, stock),
        ("checker", "checker distance", "less", 4, f"LPIPS's formula on the attribute checker's layers, {stock}"),
        ("psnr_worst", "worst PSNR, dB", "more", 1, "of any image to its stock image"),
    ]
    read = "share of what is asked for that the attribute checker reads"
    found += [(f"attributes_{name}", f"{name}, %", "more", 1, f"{read}: {name}") for name in ATTRIBUTES]
    return [Column(*row) for row in found]
