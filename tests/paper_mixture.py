"""Sample sizes in the shape of the paper's second stage: its seven tasks with plausible lengths."""

import numpy as np

from qwenvl_jax.data.mixture import STAGE_2_SAMPLES

PICTURE = 258  # 256 slots between two tags
BOX, QUAD_LINE = 22, 46  # tokens


def task_lengths(task: str, count: int, random: np.random.Generator) -> np.ndarray:
    """Returns int [count] lengths in tokens, the picture's among them."""

    def words(median: float, spread: float, most: int) -> np.ndarray:
        drawn = np.exp(random.normal(np.log(median), spread, count))
        return np.clip(drawn.astype(np.int64), 1, most)

    match task:
        case "caption":
            return PICTURE + 7 + words(14, 0.5, 120)
        case "vqa":
            return PICTURE + 3 + words(9, 0.35, 40) + words(2, 0.8, 60)
        case "grounded_caption":
            boxes = np.minimum(1 + random.poisson(1.2, count), 8)
            return PICTURE + 8 + words(14, 0.4, 60) + (BOX + 2) * boxes
        case "ref_grounding":
            return PICTURE + 4 + words(6, 0.5, 40) + BOX * (1 + (random.random(count) < 0.1))
        case "grounded_captioning":
            return PICTURE + 5 + BOX + words(6, 0.5, 40)
        case "ocr":
            lines = np.clip(random.geometric(1 / 12, count), 1, 60)
            return PICTURE + 6 + QUAD_LINE * lines + random.integers(-20, 80, count)
        case _:
            return 1 + words(500, 1.1, 20_000)


def task_sizes(num_samples: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns task -> int32 [n, 2] sizes (tokens without slots, pictures), by Table 3's counts."""
    random = np.random.default_rng(seed)
    total = sum(STAGE_2_SAMPLES.values())
    sizes = {}
    for task, count in STAGE_2_SAMPLES.items():
        pictures = int(task != "text")
        lengths = task_lengths(task, round(num_samples * count / total), random)
        column = np.full(len(lengths), pictures)
        sizes[task] = np.stack([lengths - 256 * pictures, column], axis=1).astype(np.int32)
    return sizes
