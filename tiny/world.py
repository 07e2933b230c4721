"""The tiny world: drawn scenes with captions, questions and answers, in place of a download.

    python -m tiny.world export runs/world      # the world as LLaVA-format JSON + PNG    (20 s)

tiny/scenes.py says what a scene is, tiny/pictures.py draws it.
"""

import argparse
import functools
import hashlib
import sys
from pathlib import Path

import torch
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from plumbing.files import write_json
from tiny import COUNTS
from tiny.pictures import render
from tiny.scenes import ASKED, ATTRIBUTES, QUESTIONS, sample_scenes

# ------------------------------------------------------------------------------------------------
# Words


def caption(scene: list[int], generator: torch.Generator, mention: float = 0.05) -> str:
    """A caption as the web writes them: the shape, often its colour and what is behind it.

    Anything else is told only with chance `mention`.
    """
    word = {a: ATTRIBUTES[a][i] for a, i in zip(ATTRIBUTES, scene)}
    chance = {a: mention for a in word}
    chance["shape"] = 1.0
    chance["colour"] = chance["background"] = max(0.5, mention)
    draws = torch.rand(len(word), generator=generator) < torch.tensor(list(chance.values()))
    told = dict(zip(word, draws.tolist()))
    front = [word[a] for a in ("size", "pattern", "colour", "shape") if told[a]]
    joints = (("turn", "that leans"), ("place", "in the"), ("background", "on"))
    back = [f" {joint} {word[a]}" for a, joint in joints if told[a]]
    article = "an" if front[0][0] in "aeiou" else "a"
    return f"{article} {' '.join(front)}{''.join(back)}"


def world_records(split: str, kind: str, n: int, seed: int = 0) -> list[dict]:
    """LLaVA-format records about n scenes.  `kind`:

    "caption"   stage 1: an image and its caption
    "chat"      stage 2: all four questions about one image, in random order
    "describe"  stage 2: a caption as the answer
    "text"      stage 2, no image: the scene is told in words first, as LLaVA's mix has pure text
    "question"  held out: one question a record, with its type
    """
    generator = torch.Generator().manual_seed(seed + 3_000_003)
    records = []
    for i, scene in enumerate(sample_scenes(split, n, seed).tolist()):
        name, image = f"{split}-{kind}-{i}", f"{split}-{seed}/{i}.png"
        asked = []
        for attribute, k in zip(ATTRIBUTES, scene):
            if attribute in ASKED:
                asked.append((QUESTIONS[attribute], ATTRIBUTES[attribute][k]))
        order = torch.randperm(len(asked), generator=generator).tolist()
        shuffled = [asked[j] for j in order]
        if kind == "caption":
            turns = _turns([("describe the image.\n<image>", caption(scene, generator))])
        elif kind == "describe":
            turns = _turns([("<image>\ndescribe the image.", caption(scene, generator))])
        elif kind == "chat":
            turns = _turns(shuffled, before="<image>")
        elif kind == "text":
            turns = _turns(shuffled, before=caption(scene, generator, mention=1.0) + ".")
        if kind == "question":
            for attribute, pair in zip(ASKED, asked):
                records.append({"id": f"{name}-{attribute}", "image": image, "type": attribute,
                                "conversations": _turns([pair], before="<image>")})
        elif kind == "text":
            records.append({"id": name, "conversations": turns})
        else:
            records.append({"id": name, "image": image, "conversations": turns})
    return records


def _turns(pairs: list[tuple[str, str]], before: str = "") -> list[dict]:
    """(question, answer) pairs as LLaVA's turns; `before` is a line before the first question."""
    turns = []
    for question, answer in pairs:
        turns.append({"from": "human", "value": question})
        turns.append({"from": "gpt", "value": answer})
    if before:
        turns[0]["value"] = f"{before}\n{turns[0]['value']}"
    return turns


# ------------------------------------------------------------------------------------------------
# Sets


class WorldImages:
    """get_image for the records of one split: all n pictures drawn once, kept in memory."""

    source = "the tiny world"

    def __init__(self, split: str, n: int, seed: int = 0):
        self.images = render(sample_scenes(split, n, seed), seed)

    def __call__(self, name: str) -> torch.Tensor:
        return self.images[int(Path(name).stem)]

    def fingerprint(self, names: list[str]) -> str:
        """Changes when the pixels do."""
        return hashlib.sha256(self.images.numpy()).hexdigest()


@functools.cache
def tiny_set(name: str, n: int, n_described: int = 0, n_text: int = 0):
    """(records, get_image) of a set.  `name`:

    "pretrain"            stage 1: n captioned images
    "train"               stage 2: n images with four questions each, n_described more with a
                          caption, and n_text dialogues without an image
    "test", "validation"  held-out questions about n images
    """
    if name == "pretrain":
        return world_records("train", "caption", n, seed=1), WorldImages("train", n, seed=1)
    if name == "train":
        records = world_records("train", "chat", n)
        records += world_records("train", "describe", n + n_described)[n:]
        records += world_records("train", "text", n_text, seed=2)
        return records, WorldImages("train", n + n_described)
    return world_records(name, "question", n), WorldImages(name, n)


def export(folder: Path, sets: dict[str, tuple]) -> None:
    """Write the records and pixels of the sets as LLaVA-format JSON + PNG under `folder`."""
    for name, (records, get_image) in sets.items():
        names = sorted({record["image"] for record in records if "image" in record})
        for image in tqdm(names, desc=f"export {name}", leave=False):
            path = folder / image
            path.parent.mkdir(parents=True, exist_ok=True)
            TF.to_pil_image(get_image(image)).save(path)
        write_json(folder / f"{name}.json", records)


def main(argv: list[str] | None = None) -> None:
    """The command line: `export FOLDER`."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["export"])
    parser.add_argument("folder", type=Path)
    for name, n in COUNTS.items():
        parser.add_argument(f"--n-{name}", type=int, default=n, help=f"default {n}, train.py's")
    args = parser.parse_args(argv)
    sets = {
        "pretrain": tiny_set("pretrain", args.n_pretrain),
        "train": tiny_set("train", args.n_train, args.n_described, args.n_text),
        "validation": tiny_set("validation", args.n_eval),
        "test": tiny_set("test", args.n_eval),
    }
    try:
        export(args.folder, sets)
    except OSError as e:
        print(f"error: {args.folder}: cannot be written: {e.strerror}", file=sys.stderr)
        sys.exit(2)
    print(f"wrote {', '.join(f'{name}.json' for name in sets)} and images under {args.folder}")


if __name__ == "__main__":
    main()
