"""The data: a tiny world to learn in, LLaVA-format files from disk, prompts and label masks, batches.

    python data.py export runs/world                        # the tiny world as LLaVA-format JSON + PNG   (20 s)
    python data.py check runs/world/train.json runs/world   # validate such a set, report every bad row   (5 s)

Both sources give the same two things: `records`, a list of LLaVA-format dictionaries

    {"id": "7", "image": "train/7.png", "conversations": [{"from": "human", "value": "<image>\\nwhat shape?"},
                                                          {"from": "gpt", "value": "heart"}, ...]}

and `get_image(name)`, a uint8 tensor (3, R, R). From there on a picture of the tiny world and a photograph on disk
take the same path. Letters: B samples, T tokens, R pixels of the square image, N scenes.
"""

import argparse
import functools
import hashlib
import itertools
import json
import math
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

IGNORE = -100  # a label that the loss skips (torch's cross_entropy default)


class InputError(ValueError):
    """Bad input from the user: one line that names the file, row or flag and the mend. main() prints it, exit status 2."""


# ---------------------------------------------------------------------------------------------------------------------
# The tiny world: one object with many independent attributes. One, because a tiny LLM does not learn in minutes to pick
# among several; many, so that the vision encoder is the bottleneck and not the language.

ATTRIBUTES = {
    "shape": ["arrow", "fish", "hammer", "heart", "house", "moon"],
    "colour": ["red", "orange", "yellow", "green", "blue", "purple"],
    "pattern": ["plain", "striped", "banded", "checked"],
    "place": ["northwest", "north", "northeast", "west", "centre", "east", "southwest", "south", "southeast"],
    "size": ["small", "medium", "large"],
    "turn": ["left", "straight", "right"],
    "background": ["sky", "grass", "sand", "snow"],
}
ASKED = ("shape", "colour", "pattern", "place")  # CLIP's captions name the first two; the others are skills of other teachers
QUESTIONS = {attribute: f"what {attribute}?" for attribute in ASKED}
WORLD_SIZE = 96  # px, the largest that an encoder of the TINY preset asks for
SPLITS = ("train", "validation", "test")
COUNTS = {  # of `train.py --tiny` and of the export
    "pretrain": 6000,  # captioned images: plentiful, as LLaVA's 558k captions are
    "train": 1000,     # images with questions and answers: scarce
    "described": 1000, # images with a caption for an answer, in stage 2 as in LLaVA's mix: they show much and say little
    "text": 500,       # dialogues without an image, as LLaVA's mix has them; the tiny LLM learns its language from these
    "eval": 500,       # held-out images, a question of each kind
}


def sample_scenes(split: str, n: int, seed: int = 0) -> torch.Tensor:
    """n scenes as attribute indices (N, 7), columns in the order of ATTRIBUTES; a seeded, endless deal.

    The splits are disjoint in the attribute tuple itself: a fixed random draw gives 10 % of all 46,656 tuples to "test",
    10 % to "validation", the rest to "train". No test scene has a twin in training, not even with other noise.
    """
    sizes = [len(v) for v in ATTRIBUTES.values()]
    owner = torch.randperm(math.prod(sizes), generator=torch.Generator().manual_seed(1234)) % 10  # the same for every seed
    tuples = {"test": owner == 0, "validation": owner == 1, "train": owner > 1}[split].nonzero()[:, 0]
    g = torch.Generator().manual_seed(seed * len(SPLITS) + SPLITS.index(split))
    index = tuples[torch.randint(len(tuples), (n,), generator=g)]
    columns = []
    for size in reversed(sizes):
        columns.append(index % size)
        index = index // size
    return torch.stack(columns[::-1], dim=1)                                            # (N, 7)


def scene_geometry(scenes: torch.Tensor, seed: int = 0) -> dict[str, torch.Tensor]:
    """Where the object of each scene is: centre x, y and radius in units of half an image, angle in radians; each (N,).

    The named attribute plus a jitter that never crosses into the next name's range.
    """
    n, g = len(scenes), torch.Generator().manual_seed(seed + 1_000_003)
    jitter = torch.rand(n, 4, generator=g) * 2 - 1
    place, size, turn = (scenes[:, list(ATTRIBUTES).index(a)] for a in ("place", "size", "turn"))
    return {
        "x": (place % 3 - 1) / 3 + 0.01 * jitter[:, 0],
        "y": (place // 3 - 1) / 3 + 0.01 * jitter[:, 1],
        "radius": torch.tensor([0.42, 0.56, 0.74])[size] * (1 + 0.02 * jitter[:, 2]),
        "angle": (turn - 1) * 0.4 + 0.06 * jitter[:, 3],
    }


def _polygon(x: torch.Tensor, y: torch.Tensor, *edges: tuple[float, float, float]) -> torch.Tensor:
    """Signed distance to a convex polygon, the largest of its half planes a x + b y <= c; negative inside."""
    return torch.stack([(a * x + b * y - c) / math.hypot(a, b) for a, b, c in edges]).amax(0)


def _shape_distance(k: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Signed distance (negative inside) to shape k of ATTRIBUTES, pointing up, in a frame where it fills radius 1."""
    def box(x0, x1, y0, y1):
        return _polygon(x, y, (-1, 0, -x0), (1, 0, x1), (0, -1, -y0), (0, 1, y1))

    def disc(cx, cy, r):
        return torch.hypot(x - cx, y - cy) - r

    name, join = ATTRIBUTES["shape"][k], torch.minimum
    if name == "arrow":
        return join(_polygon(x, y, (1.1, -1, 1.0), (-1.1, -1, 1.0), (0, 1, 0.0)), box(-0.35, 0.35, -0.1, 1.0))
    if name == "fish":
        tail = _polygon(x, y, (0.8, -1, -0.3), (-0.8, -1, -0.3), (0, 1, 1.0))
        return join((torch.hypot(x / 0.6, (y + 0.2) / 0.8) - 1) * 0.6, tail)
    if name == "hammer":
        return join(box(-0.9, 0.9, -0.95, -0.3), box(-0.28, 0.28, -0.9, 1.0))
    if name == "heart":
        point = _polygon(x, y, (1, 1, 0.8), (-1, 1, 0.8), (0, -1, 0.28))
        return join(join(disc(-0.45, -0.38, 0.52), disc(0.45, -0.38, 0.52)), point)
    if name == "house":
        return join(box(-0.68, 0.68, -0.1, 0.9), _polygon(x, y, (1, -1, 0.98), (-1, -1, 0.98), (0, 1, 0.0)))
    return torch.maximum(disc(0, 0.1, 0.98), -disc(0, 0.68, 0.72))  # moon


_COLOURS = torch.tensor([[.95, .15, .15], [1., .60, .10], [1., .95, .25], [.15, .85, .25], [.25, .50, 1.], [.75, .30, .95]])
_BACKGROUNDS = torch.tensor([[[.45, .70, .95], [.85, .93, 1.]], [[.35, .60, .25], [.50, .75, .35]],   # sky, grass: top, bottom
                             [[.85, .75, .55], [.95, .88, .70]], [[.88, .88, .92], [.98, .98, 1.]]])    # sand, snow


# A pattern is paint on the surface, a mix of two waves across it: a sin(u) + b sin(v) + c sin(u) sin(v) + d.
_PAINT = torch.tensor([[0., 0, 0, -1], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 2, 0]])  # plain, striped, banded, checked


def render(scenes: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Pictures of scenes (N, 7): uint8 (N, 3, 96, 96). The same scenes and seed give the same bytes."""
    g = torch.Generator().manual_seed(seed + 2_000_003)
    geometry = scene_geometry(scenes, seed)
    chunks = []
    for i in range(0, len(scenes), 64):  # 64 at a time stay in the processor's cache
        chunks.append(_render_chunk(scenes[i:i + 64], {k: v[i:i + 64] for k, v in geometry.items()}, g))
    return torch.cat(chunks)


def _render_chunk(scenes: torch.Tensor, geometry: dict[str, torch.Tensor], g: torch.Generator) -> torch.Tensor:
    n, R = len(scenes), WORLD_SIZE
    shape, colour, pattern, background = (scenes[:, i] for i in (0, 1, 2, 6))
    line = (torch.arange(R) + 0.5) / R * 2 - 1
    Y, X = line[None, :, None], line[None, None, :]

    # background: a vertical gradient and a noise of its own kind
    top, bottom = _BACKGROUNDS[background].unbind(1)
    t = ((Y + 1) / 2)[:, None]                                                          # (1, 1, R, 1)
    gradient = top[:, :, None, None] * (1 - t) + bottom[:, :, None, None] * t           # (N, 3, R, 1)
    noise = torch.rand(n, 1, R, R, generator=g) - 0.5
    grain = torch.tensor([0.02, 0.16, 0.08, 0.10])[background][:, None, None, None]     # grass is rough, the sky smooth
    image = gradient + grain * noise                                                    # (N, 3, R, R)

    # the object's own frame: centred, turned, in pixels
    cx, cy, radius, angle = (geometry[k][:, None, None] for k in ("x", "y", "radius", "angle"))
    dx, dy, radius = (X - cx) * (R / 2), (Y - cy) * (R / 2), radius * (R / 2)
    cos, sin = angle.cos(), angle.sin()
    x, y = cos * dx + sin * dy, cos * dy - sin * dx                                     # (N, R, R)
    distance = torch.empty(n, R, R)
    for k in range(len(ATTRIBUTES["shape"])):
        rows = (shape == k).nonzero()[:, 0]
        distance[rows] = _shape_distance(k, x[rows] / radius[rows], y[rows] / radius[rows]) * radius[rows]
    inside = (0.5 - distance).clamp(0, 1)[:, None]                                      # one pixel of anti-aliasing
    rim = (1.5 - (distance + 1.5).abs()).clamp(0, 1)[:, None]                           # a dark outline, 2 px

    # the pattern: stripes 12 px wide and bands of 8 px, faint, whatever the object's size
    u, v = (x * (2 * math.pi / 12)).sin(), (y * (2 * math.pi / 8)).sin()                # (N, R, R)
    a, b, c, d = _PAINT[pattern].T[:, :, None, None]
    paint = (3 * (a * u + b * v + c * u * v + d)).clamp(-1, 1)[:, None]                 # (N, 1, R, R)
    body = (_COLOURS[colour] + 0.06 * torch.randn(n, 3, generator=g))[:, :, None, None]
    body = body * ((0.7 - 0.2 * paint) * (1 - 0.75 * rim))                              # (N, 3, R, R)
    image = torch.lerp(image, body, inside)                                             # (N, 3, R, R)
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def caption(scene: list[int], g: torch.Generator, mention: float = 0.05) -> str:
    """A caption as the web writes them: what it is, often its colour and what is behind it, anything else only with chance `mention`."""
    word = {a: ATTRIBUTES[a][i] for a, i in zip(ATTRIBUTES, scene)}
    chance = torch.tensor([1.0 if a == "shape" else max(0.5, mention) if a in ("colour", "background") else mention for a in word])
    said = dict(zip(word, (torch.rand(len(word), generator=g) < chance).tolist()))
    front = [word[a] for a in ("size", "pattern", "colour", "shape") if said[a]]
    back = [f" {before} {word[a]}" for a, before in (("turn", "that leans"), ("place", "in the"), ("background", "on")) if said[a]]
    return f"{'an' if front[0][0] in 'aeiou' else 'a'} {' '.join(front)}{''.join(back)}"


def world_records(split: str, kind: str, n: int, seed: int = 0) -> list[dict]:
    """Records of the tiny world. `kind`: "caption" (stage 1), "chat" (stage 2: all four questions about one image, in random order),
    "describe" (stage 2: a caption as the answer), "text" (stage 2, without an image: the scene is told in words first, as LLaVA's mix
    carries pure text), "question" (held out: one question a record, with its type)."""
    g = torch.Generator().manual_seed(seed + 3_000_003)
    records = []
    for i, scene in enumerate(sample_scenes(split, n, seed).tolist()):
        picture = {"image": f"{split}-{seed}/{i}.png"}
        asked = [(a, QUESTIONS[a], ATTRIBUTES[a][k]) for a, k in zip(ATTRIBUTES, scene) if a in ASKED]
        shuffled = [asked[j] for j in torch.randperm(len(asked), generator=g).tolist()]
        name = f"{split}-{kind}-{i}"
        if kind == "caption":
            records.append({"id": name, **picture, "conversations": _turns([("describe the image.\n<image>", caption(scene, g))])})
        elif kind == "describe":
            records.append({"id": name, **picture, "conversations": _turns([("describe the image.", caption(scene, g))], "<image>")})
        elif kind == "chat":
            records.append({"id": name, **picture, "conversations": _turns([(q, a) for _, q, a in shuffled], "<image>")})
        elif kind == "text":
            told = caption(scene, g, mention=1.0) + "."
            records.append({"id": name, "conversations": _turns([(q, a) for _, q, a in shuffled], told)})
        else:
            records += [{"id": f"{name}-{t}", **picture, "type": t, "conversations": _turns([(q, a)], "<image>")} for t, q, a in asked]
    return records


def _turns(pairs: list[tuple[str, str]], before: str = "") -> list[dict]:
    """(question, answer) pairs as LLaVA's turns, with `before` on a line of its own before the first question."""
    turns = [{"from": who, "value": text} for pair in pairs for who, text in zip(("human", "gpt"), pair)]
    if before:
        turns[0]["value"] = f"{before}\n{turns[0]['value']}"
    return turns


class WorldImages:
    """get_image for the records of one split: all n pictures drawn once, kept as uint8 in memory (27 KB each)."""

    where = "the tiny world"

    def __init__(self, split: str, n: int, seed: int = 0):
        self.images = render(sample_scenes(split, n, seed), seed)

    def __call__(self, name: str) -> torch.Tensor:
        return self.images[int(Path(name).stem)]

    def stamp(self, names: list[str]) -> str:
        """Changes when the pixels do."""
        return hashlib.sha256(self.images.numpy()).hexdigest()


def export_world(folder: Path, n_pretrain: int, n_train: int, n_described: int, n_text: int, n_eval: int) -> None:
    """Write the very records and pixels that `train.py --tiny` trains on as LLaVA-format JSON + PNG under `folder`."""
    sets = {"pretrain": tiny_world("pretrain", n_pretrain), "train": tiny_world("train", n_train, n_described, n_text),
            "test": tiny_world("test", n_eval), "validation": tiny_world("validation", n_eval)}
    for name, (records, get_image) in sets.items():
        for image in tqdm(sorted({r["image"] for r in records if "image" in r}), desc=f"export {name}", leave=False):
            path = folder / image
            path.parent.mkdir(parents=True, exist_ok=True)
            TF.to_pil_image(get_image(image)).save(path)
        write_json(folder / f"{name}.json", records)


@functools.cache
def tiny_world(name: str, n: int, n_described: int = 0, n_text: int = 0):
    """(records, get_image) of the four sets of the tiny world: "pretrain" n captioned images (stage 1); "train" n images with four questions
    each, n_described more with a caption, and n_text dialogues without an image (stage 2); "test", "validation" held-out questions
    about n images."""
    if name == "pretrain":
        return world_records("train", "caption", n, seed=1), WorldImages("train", n, seed=1)
    if name == "train":
        described = world_records("train", "describe", n + n_described)[n:]
        return (world_records("train", "chat", n) + described + world_records("train", "text", n_text, seed=2),
                WorldImages("train", n + n_described))
    return world_records(name, "question", n), WorldImages(name, n)


# ---------------------------------------------------------------------------------------------------------------------
# LLaVA-format files from disk


def write_json(path: Path, value) -> None:
    """Atomic: a reader sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    temporary.rename(path)


def record_fault(record) -> str | None:
    """What is wrong with one record, in words, or None. Files are not opened here."""
    if not isinstance(record, dict):
        return "is not an object {id, image, conversations}"
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        return 'has no "conversations" list'
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str) or turn.get("from") not in ("human", "gpt"):
            return f'conversations[{i}] is not {{"from": "human" or "gpt", "value": text}}'
        if turn["from"] != ("human", "gpt")[i % 2]:
            return f"conversations[{i}] is from {turn['from']}: human and gpt must take turns, human first"
    if len(turns) % 2 or not all(turn["value"].strip() for turn in turns[1::2]):
        return "has a question without an answer"
    if any("<image>" in turn["value"] for turn in turns[1::2]):
        return "has an <image> in an answer"
    images = sum(turn["value"].count("<image>") for turn in turns)
    if images != ("image" in record):
        return f'has {images} <image> token(s) but {"one" if "image" in record else "no"} "image" file'
    if "image" in record and (not isinstance(record["image"], str) or not record["image"]):
        return '"image" is not a file name'
    return None


def read_json(path: Path):
    """The value of a JSON file. Raises InputError if it is missing, unreadable or not JSON."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: not valid JSON: {e}") from None
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {e.strerror}") from None


def blank_image(size: int) -> torch.Tensor:
    """A picture of nothing, uint8 (3, size, size): CLIP's mean colour, zero after normalisation."""
    return torch.tensor([122, 116, 104], dtype=torch.uint8)[:, None, None].repeat(1, size, size)


def load_image(path: Path, size: int) -> torch.Tensor:
    """An image file as uint8 (3, size, size)."""
    try:
        with Image.open(path) as file:
            return square_image(file.convert("RGB"), size)                              # (3, size, size)
    except FileNotFoundError:
        raise InputError(f"{path}: no such image file") from None
    except Exception as e:  # PIL raises OSError, SyntaxError, ValueError, struct.error, ... for a broken file
        raise InputError(f"{path}: not a readable image ({type(e).__name__}); replace the file or drop its row") from None


def square_image(picture: Image.Image, size: int) -> torch.Tensor:
    """An RGB picture padded to a square (so that nothing is cut off and all encoders see one geometry), then resized: uint8 (3, size, size).
    The padding is CLIP's mean colour, as in LLaVA."""
    image = TF.pil_to_tensor(picture)                                                   # (3, h, w)
    _, h, w = image.shape
    side = max(h, w)
    left, top = (side - w) // 2, (side - h) // 2
    if h != w:
        canvas = blank_image(side)
        canvas[:, top:top + h, left:left + w] = image
        image = canvas                                                                  # (3, side, side)
    return TF.resize(image, [size, size], antialias=True)                               # (3, size, size)


class DiskImages:
    """get_image for the records of a file on disk; `image` is relative to `folder`."""

    def __init__(self, folder: Path, size: int):
        self.folder, self.size, self.where = Path(folder), size, str(Path(folder).resolve())

    def __call__(self, name: str) -> torch.Tensor:
        return load_image(self.folder / name, self.size)

    def stamp(self, names: list[str]) -> str:
        """Changes when a file does, by its size and time: half a million images cannot be read just to see that they are the same."""
        seen = [os.stat(self.folder / name) for name in names]
        return hashlib.sha256(repr([(s.st_size, s.st_mtime_ns) for s in seen]).encode()).hexdigest()


def row_faults(records: list, folder: Path | None) -> Iterator[tuple[int, str]]:
    """(row, what is wrong with it) of every bad row: its form, answers, <image> tokens, and with a folder a missing or corrupt image."""
    def fault_of(record) -> str | None:
        fault = record_fault(record)
        if fault is None and folder and "image" in record:
            try:
                load_image(folder / record["image"], 16)
            except InputError as e:
                fault = f"has a bad image: {e}"
        return fault

    with ThreadPoolExecutor() as pool, tqdm(total=len(records), desc="check", leave=False) as bar:  # decoding a picture leaves Python to other threads
        for start in range(0, len(records), 1000):
            for row, fault in enumerate(pool.map(fault_of, records[start:start + 1000]), start):
                bar.update()
                if fault:
                    yield row, fault


def read_list(path: Path) -> list:
    """The rows of a LLaVA-format file. A dialogue that begins in the middle, with an answer, loses that answer, as in LLaVA."""
    records = read_json(path)
    if not isinstance(records, list) or not records:
        raise InputError(f"{path}: must be a JSON list of records with at least one row")
    for record in records:
        match record:
            case {"conversations": [{"from": "gpt"}, _, *_]}:
                del record["conversations"][0]
    return records


def read_records(path: Path, folder: Path, open_images: bool = True, skip_bad: bool = False) -> list[dict]:
    """A LLaVA-format JSON list, every row and, unless they are too many to open, every image validated before anything is trained. Raises InputError for
    the first fault, or with skip_bad leaves such rows out and says so on stderr."""
    records, bad = read_list(path), {}
    for row, fault in row_faults(records, folder if open_images else None):
        if not skip_bad:
            raise InputError(f"{path}: row {row} {fault}; `python data.py check {path} {folder}` lists every bad row")
        print(f"skipped: {path}: row {row} {fault}", file=sys.stderr)
        bad[row] = fault
    if len(bad) == len(records):
        raise InputError(f"{path}: every row is bad, the first {bad[0]}")
    return [record for row, record in enumerate(records) if row not in bad]


LLAVA = {"pretrain": ("LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", "LLaVA-Pretrain/images"), "train": ("llava_v1_5_mix665k.json", ".")}
LLAVA_IMAGES = ("LLaVA-Pretrain/images", "coco/train2017", "gqa/images", "ocr_vqa/images", "textvqa/train_images", "vg/VG_100K", "vg/VG_100K_2")


def llava_layout(root: Path) -> dict[str, tuple[Path, Path]]:
    """(JSON file, folder its images are relative to) of LLaVA's "pretrain" (558k captions) and "train" (665k conversations) under `root`,
    laid out as LLaVA's docs/Data.md says. Raises InputError, with the layout, if a part is missing."""
    for part in (*(file for file, _ in LLAVA.values()), *LLAVA_IMAGES):
        if not (root / part).exists():
            raise InputError(f"--data-root {root}: has no {part}; LLaVA's layout (its docs/Data.md says where to get each) is "
                             f"{', '.join(file for file, _ in LLAVA.values())} and the image folders {', '.join(LLAVA_IMAGES)}")
    return {name: (root / file, root / folder) for name, (file, folder) in LLAVA.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Words: the tokenizer of the tiny LLM, the prompt templates, and which tokens carry the loss


class WordTokenizer:
    """One token a word or punctuation mark, lower case. The vocabulary is whatever the data holds; the role names are one
    token each, so that the real prompt template costs a tiny LLM nothing."""

    SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<image>", "USER:", "ASSISTANT:"]
    pad, unk, bos, eos, image = range(5)
    system = space = ""  # no instruction before the first question, no space before an answer: words are split anyway
    _pattern = re.compile("|".join(SPECIAL) + r"|\w+|[^\w\s]")

    def __init__(self, vocabulary: list[str]):
        self.vocabulary = vocabulary
        self.ids = {word: i for i, word in enumerate(vocabulary)}

    @classmethod
    def from_records(cls, records: list[dict]) -> "WordTokenizer":
        words = {w for r in records for turn in r["conversations"] for w in cls.words(turn["value"])}
        return cls(cls.SPECIAL + sorted(words - set(cls.SPECIAL)))

    @classmethod
    def words(cls, text: str) -> list[str]:
        return [w if w in cls.SPECIAL else w.lower() for w in cls._pattern.findall(text)]

    def encode(self, text: str) -> list[int]:
        return [self.ids.get(w, self.unk) for w in self.words(text)]

    def decode(self, ids: list[int]) -> str:
        """Text up to the end-of-sentence token, words joined by one space."""
        words = [self.vocabulary[i] for i in ids]
        return " ".join(words[:words.index("</s>")] if "</s>" in words else words)


@functools.cache
def ask_hub() -> None:
    """Call before a model hub is asked: where it cannot be reached, its tools would try for minutes; so they are told to look in their cache only."""
    from huggingface_hub import constants
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        constants.HF_HUB_OFFLINE, os.environ["HF_HUB_OFFLINE"] = True, "1"


def import_transformers():
    """The library, wanted only for a real LLM. Raises InputError if it is not installed."""
    try:
        import transformers
    except ImportError:
        raise InputError("a real LLM needs transformers, which is not installed: pip install -r requirements-full.txt") from None
    ask_hub()
    return transformers


def llm_error(name: str, what: str) -> InputError:
    return InputError(f"--llm {name}: {what}; name a folder with config.json, *.safetensors, and tokenizer.json or tokenizer.model (which needs sentencepiece and "
                      f"protobuf): the files of https://huggingface.co/{name}, if that is a name of the hub")


class PretrainedTokenizer:
    """The tokenizer of a real LLM, a folder or a name on the hub, behind the names that WordTokenizer has. Vicuna's instruction comes
    before the first question."""

    image = -200  # no word: VLM.splice puts the image's tokens there
    system = ("A chat between a curious user and an artificial intelligence assistant. "
              "The assistant gives helpful, detailed, and polite answers to the user's questions. ")

    def __init__(self, name: str):
        transformers = import_transformers()
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError, ImportError) as e:
            raise llm_error(name, f"its tokenizer cannot be loaded ({type(e).__name__})") from None
        self.eos = self.tokenizer.eos_token_id
        self.bos = self.eos if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id
        self.pad = self.eos  # never seen: the attention mask hides it, its label is IGNORE
        # each piece is encoded by itself, so that the mask is exact; a sentencepiece model starts every piece with a space of its own
        self.space = "" if self.tokenizer.tokenize("a")[0].startswith("\u2581") else " "

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def decode(self, ids: list[int]) -> str:
        """Text up to the end-of-sentence token."""
        return self.tokenizer.decode(ids[:ids.index(self.eos)] if self.eos in ids else ids).strip()


def normalise(answer: str) -> str:
    """Answers are compared by exact match of this: lower case, words and marks joined by one space."""
    return " ".join(WordTokenizer.words(answer.lower()))


def conversation_ids(record: dict, template: str, tokenizer, n_image: int) -> tuple[list[int], list[int]]:
    r"""Token ids and labels (T,), built piece by piece so that the mask is exact by construction. ^ marks what the loss sees:

        "plain" (captions)         <s><image>a red heart on grass</s>
                                             ^^^^^^^^^^^^^^^^^^^^^^^^
        "v1" (conversations)       <s>USER: <image>\nwhat shape? ASSISTANT: heart</s>USER: what colour? ASSISTANT: red</s>
                                                                            ^^^^^^^^^                              ^^^^^^^

    A real LLM has Vicuna's instruction before the first USER: and a space before each answer.
    "plain" drops the human's words: the image alone must explain the caption. `<image>` becomes n_image copies of the image token: the
    places where the VLM puts the student's tokens. A conversation that ends with a question ends after "ASSISTANT:".
    """
    ids, labels = [tokenizer.bos], [IGNORE]

    def add(new: list[int], learn: bool) -> None:
        ids.extend(new)
        labels.extend(new if learn else [IGNORE] * len(new))

    for turn in record["conversations"]:
        if turn["from"] == "gpt":
            space = tokenizer.space if template == "v1" else ""
            add(tokenizer.encode(space + turn["value"]) + [tokenizer.eos], learn=True)
            continue
        image = "<image>" * turn["value"].count("<image>")
        said = image
        if template == "v1":  # the image first, wherever the question has it, as LLaVA
            question = turn["value"].replace("<image>", "").strip()
            said = f"{tokenizer.system if turn is record['conversations'][0] else ''}USER: {image + chr(10) if image else ''}{question} ASSISTANT:"
        before, *after = said.split("<image>")
        add(tokenizer.encode(before), learn=False)
        for part in after:
            add([tokenizer.image] * n_image + tokenizer.encode(part), learn=False)
    return ids, labels


class Conversations(Dataset):
    """Records + images -> items {input_ids (T,), labels (T,), image uint8 (3, R, R) or None, its name, ...}, made when asked for.

    A conversation longer than max_length, its image's tokens counted, is cut there, as in LLaVA. What cannot be used (an image that cannot be read, no
    answer within max_length, a prompt that is too long) is an InputError in `item`. In dataset[i], which worker processes
    call, it is returned as {"fault": text}; or, with skip_bad, the next row that can be used comes in its place, with a list of what was skipped.
    """

    def __init__(self, records: list[dict], get_image, tokenizer, template: str, n_image: int, max_length: int, skip_bad: bool = False):
        self.records, self.get_image, self.tokenizer, self.template = records, get_image, tokenizer, template
        self.n_image, self.max_length, self.skip_bad = n_image, max_length, skip_bad

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> dict:
        skipped = []
        for row in itertools.chain(range(i, len(self)), range(i)):  # not a list: a set may have half a million rows
            try:
                return self.item(row) | {"skipped": skipped}
            except InputError as e:
                if not self.skip_bad:
                    return {"fault": str(e)}
                skipped.append(str(e))
        return {"fault": f"no row can be used; the first: {skipped[0]}"}

    def item(self, row: int) -> dict:
        record = self.records[row]
        ids, labels = conversation_ids(record, self.template, self.tokenizer, self.n_image)
        where, cut = f"row {row} (id {record.get('id')})", len(ids) > self.max_length
        if cut:
            if record["conversations"][-1]["from"] == "human":
                raise InputError(f"{where} has {len(ids)} tokens, more than --max-length {self.max_length}: shorten it or raise the flag")
            images = ids.count(self.tokenizer.image)
            ids, labels = ids[:self.max_length], labels[:self.max_length]
            if ids.count(self.tokenizer.image) < images or all(label == IGNORE for label in labels):
                raise InputError(f"{where} has no answer within --max-length {self.max_length} tokens: shorten it or raise the flag")
        try:
            image = self.get_image(record["image"]) if "image" in record else None      # (3, R, R)
        except InputError as e:
            raise InputError(f"{where} has a bad image: {e}; `python data.py check` finds all such rows beforehand") from None
        return {"input_ids": ids, "labels": labels, "image": image, "name": record.get("image"), "cut": cut}

    def sizes(self) -> list[tuple[bool, int]]:
        """(has an image, words of text) a row: what batches are grouped by, without a tokenizer."""
        return [("image" in r, sum(len(turn["value"].split()) for turn in r["conversations"])) for r in self.records]


def collate(items: list[dict], pad: int, side: str = "right") -> dict[str, torch.Tensor | None]:
    """A batch: input_ids, labels, attention_mask (B, T), padded on the right to train and on the left to generate, and
    images uint8 (B_img, 3, R, R) of the samples that have one, in order; None if none has (no image, no KD term). image_names: theirs.
    A fault among the items is passed on alone."""
    if faults := [item["fault"] for item in items if "fault" in item]:
        return {"fault": faults[0]}
    longest = max(len(item["input_ids"]) for item in items)

    def padded(rows: list[list[int]], value: int) -> torch.Tensor:
        fill = [[value] * (longest - len(row)) for row in rows]
        return torch.tensor([f + r if side == "left" else r + f for r, f in zip(rows, fill)])

    pictured = [item for item in items if item["image"] is not None]
    return {
        "input_ids": padded([item["input_ids"] for item in items], pad),                # (B, T)
        "labels": padded([item["labels"] for item in items], IGNORE),                   # (B, T)
        "attention_mask": padded([[1] * len(item["input_ids"]) for item in items], 0),  # (B, T)
        "images": torch.stack([item["image"] for item in pictured]) if pictured else None,            # (B_img, 3, R, R)
        "image_names": [item["name"] for item in pictured],
        "skipped": [line for item in items for line in item.get("skipped", ())],
        "cut": sum(item.get("cut", False) for item in items),
    }


def batch_order(dataset: Conversations, batch_size: int, seed: int, epoch: int, group: int = 1) -> list[list[int]]:
    """The rows of each batch of an epoch: a function of its arguments alone. A last, smaller batch is dropped, unless it is the only one.

    group > 1: samples with and without an image apart, and each shuffled run of `group` batches sorted by length before it is cut into batches, so
    that little is padding; then the batches are shuffled. What is left over of both kinds makes the mixed batches.
    """
    generator = torch.Generator().manual_seed(seed * 1_000 + epoch)
    order = torch.randperm(len(dataset), generator=generator).tolist()
    if group > 1:
        sizes, batches, rest = dataset.sizes(), [], []
        for pictured in (True, False):
            rows = [i for i in order if sizes[i][0] == pictured]
            for k in range(0, len(rows), batch_size * group):
                run = sorted(rows[k:k + batch_size * group], key=lambda i: sizes[i][1])
                cut = len(run) - len(run) % batch_size
                batches += [run[j:j + batch_size] for j in range(0, cut, batch_size)]
                rest += run[cut:]
        batches += [rest[j:j + batch_size] for j in range(0, len(rest), batch_size)]
        if len(batches) > 1 and len(batches[-1]) < batch_size:
            batches.pop()
        return [batches[k] for k in torch.randperm(len(batches), generator=generator).tolist()]
    return [order[k * batch_size:(k + 1) * batch_size] for k in range(max(1, len(dataset) // batch_size))]


def count_steps(rows: int, batch_size: int, epochs: float) -> int:
    return max(1, round(epochs * max(1, rows // batch_size)))


def make_loader(dataset: Conversations, batch_size: int, epochs: float, seed: int, pad: int, group: int = 1, pieces: int = 1, mine: range = range(1),
                start: int = 0, workers: int = 0) -> DataLoader:
    """Shuffled batches from step `start` on. Each is dealt out into `pieces` micro-batches, of which this process gets those in `mine`, one after
    the other."""
    steps, batches = count_steps(len(dataset), batch_size, epochs), []
    for epoch in range(math.ceil(epochs)):
        batches += batch_order(dataset, batch_size, seed, epoch, group)
    micro = [batch[k::pieces] for batch in batches[start:steps] for k in mine]
    return DataLoader(dataset, batch_sampler=micro, num_workers=workers, collate_fn=functools.partial(collate, pad=pad))


# ---------------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description="export the tiny world, or check a LLaVA-format set")
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write the tiny world as LLaVA-format JSON and PNG")
    export.add_argument("folder", type=Path)
    for name, n in COUNTS.items():
        export.add_argument(f"--n-{name}", type=int, default=n, help=f"default {n}, as in train.py --tiny")
    checker = commands.add_parser("check", help="report every bad row of a LLaVA-format set")
    checker.add_argument("file", type=Path)
    checker.add_argument("images", type=Path)
    args = parser.parse_args(argv)
    if args.command == "export":
        export_world(args.folder, args.n_pretrain, args.n_train, args.n_described, args.n_text, args.n_eval)
        print(f"wrote {args.folder}/pretrain.json, train.json, validation.json, test.json and their images")
        return
    records = read_list(args.file)
    found = list(row_faults(records, args.images))
    for row, fault in found:
        print(f"{args.file}: row {row} {fault}")
    print(f"{args.file}: {len(records)} rows, {len(found)} bad")
    if found:
        sys.exit(2)


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors are one line like all others."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str):
        raise InputError(f"{message} (--help lists the arguments)")


def run(program) -> None:
    """Run a program's main(); bad input ends it with one line on stderr and exit status 2."""
    try:
        program()
    except Exception as e:
        rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
        if rank or world > 1 and not isinstance(e, InputError):  # another process may know better what is wrong: then the launcher ends this one
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(3)
        if not isinstance(e, InputError):
            raise
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run(main)
