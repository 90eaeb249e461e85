"""Write `eval/data/*.npz` from the data sets that ship with scikit-learn and scikit-image.

Needed only to make the stored files anew, as are those two packages: ``python -m pitome_mllm_eval.training.make_data``.
"""

from pathlib import Path

import numpy as np
from PIL import Image

DATA = Path(__file__).parents[1] / "data"
PHOTOS = ("astronaut", "chelsea", "coffee", "camera", "rocket", "grass", "brick", "gravel")
TRAIN_SHARE = 0.6  # of each photograph's width; the rest is for validation and test backgrounds
HEIGHT = 176  # of every photograph
SCANS = (1197, 300, 300)  # train, validation, test


def digits() -> dict[str, np.ndarray]:
    """Handwritten digits (N, 8, 8) in 0..16 with their targets and the split each scan belongs to."""
    from sklearn.datasets import load_digits

    data, split = load_digits(), np.repeat(np.arange(3, dtype=np.uint8), SCANS)
    split = np.random.default_rng(0).permutation(split)
    return {"images": data.images.astype(np.uint8), "targets": data.target.astype(np.uint8), "split": split}


def photos() -> dict[str, np.ndarray]:
    """Each photograph scaled to one height and cut in two: left part for training, right part for evaluation."""
    import skimage.data

    out = {}
    for name in PHOTOS:
        image = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
        width = round(image.width * HEIGHT / image.height)
        pixels, cut = np.asarray(image.resize((width, HEIGHT), Image.Resampling.BOX)), round(width * TRAIN_SHARE)
        out[f"train_{name}"], out[f"eval_{name}"] = pixels[:, :cut], pixels[:, cut:]
    return out


if __name__ == "__main__":
    np.savez_compressed(DATA / "digits.npz", **digits())
    np.savez_compressed(DATA / "photos.npz", **photos())
