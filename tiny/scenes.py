"""The scenes of the tiny world: one object, seven attributes.

One object, because a tiny LLM does not learn in minutes to pick among several; many attributes, so
that the vision encoder is the bottleneck and not the language. N is the number of scenes.
"""

import math

import torch

ATTRIBUTES = {
    "shape": ["arrow", "fish", "hammer", "heart", "house", "moon"],
    "colour": ["red", "orange", "yellow", "green", "blue", "purple"],
    "pattern": ["plain", "striped", "banded", "checked"],
    "place": ["northwest", "north", "northeast", "west", "centre", "east", "southwest", "south",
              "southeast"],
    "size": ["small", "medium", "large"],
    "turn": ["left", "straight", "right"],
    "background": ["sky", "grass", "sand", "snow"],
}
# CLIP's captions name the first two; the others are skills of other teachers
QUESTIONS = {name: f"what {name}?" for name in ("shape", "colour", "pattern", "place")}
SPLITS = ("train", "validation", "test")


def sample_scenes(split: str, n: int, seed: int = 0) -> torch.Tensor:
    """Return n scenes as attribute indices (N, 7), columns in the order of ATTRIBUTES.

    The splits are disjoint in the attribute tuple itself: a fixed random draw gives 10 % of all
    46,656 tuples to "test", 10 % to "validation", the rest to "train". No test scene has a twin in
    training, not even with other noise.
    """
    sizes = [len(values) for values in ATTRIBUTES.values()]
    fixed = torch.Generator().manual_seed(1234)  # the same for every seed
    owner = torch.randperm(math.prod(sizes), generator=fixed) % 10
    owned = {"test": owner == 0, "validation": owner == 1, "train": owner > 1}[split]
    tuples = owned.nonzero()[:, 0]
    generator = torch.Generator().manual_seed(seed * len(SPLITS) + SPLITS.index(split))
    index = tuples[torch.randint(len(tuples), (n,), generator=generator)]
    columns = []
    for size in reversed(sizes):
        columns.append(index % size)
        index = index // size
    return torch.stack(columns[::-1], dim=1)                                            # (N, 7)


def scene_geometry(scenes: torch.Tensor, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return each object's centre x, y and radius in half images, angle in radians, all (N,).

    They are the named attribute plus a jitter that never crosses into the next name's range.
    """
    generator = torch.Generator().manual_seed(seed + 1_000_003)
    jitter = torch.rand(len(scenes), 4, generator=generator) * 2 - 1                    # (N, 4)
    place, size, turn = (scenes[:, list(ATTRIBUTES).index(a)] for a in ("place", "size", "turn"))
    return {
        "x": (place % 3 - 1) / 3 + 0.01 * jitter[:, 0],
        "y": (place // 3 - 1) / 3 + 0.01 * jitter[:, 1],
        "radius": torch.tensor([0.42, 0.52, 0.63])[size] * (1 + 0.02 * jitter[:, 2]),
        "angle": (turn - 1) * 0.4 + 0.06 * jitter[:, 3],
    }
