"""The tiny world: drawn scenes with captions, questions and answers, in place of a download.

    python -m tiny.world export runs/world      # the world as LLaVA-format JSON + PNG    (20 s)

tiny/scenes.py defines a scene, tiny/pictures.py draws it.
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
from tiny.scenes import ATTRIBUTES, QUESTIONS, sample_scenes


def attribute_words(scene: list[int]) -> dict[str, str]:
    """Return the word of each attribute of a scene."""
    return {name: ATTRIBUTES[name][i] for name, i in zip(ATTRIBUTES, scene, strict=True)}


def caption(scene: list[int], generator: torch.Generator, mention: float = 0.05) -> str:
    """Return a caption: the shape, often colour and background, the rest with chance `mention`."""
    word = attribute_words(scene)
    chance = dict.fromkeys(word, mention)
    chance["shape"] = 1.0
    chance["colour"] = chance["background"] = max(0.5, mention)
    draws = torch.rand(len(word), generator=generator) < torch.tensor(list(chance.values()))
    mentioned = dict(zip(word, draws.tolist(), strict=True))
    text = " ".join(word[a] for a in ("size", "pattern", "colour", "shape") if mentioned[a])
    article = "an" if text[0] in "aeiou" else "a"
    for attribute, joint in (("turn", "that leans"), ("place", "in the"), ("background", "on")):
        if mentioned[attribute]:
            text += f" {joint} {word[attribute]}"
    return f"{article} {text}"


def world_records(split: str, kind: str, n: int, seed: int = 0) -> list[dict]:
    """Return LLaVA-format records about n scenes.  `kind`:

    "caption"   stage 1: an image and its caption
    "chat"      stage 2: all four questions about one image, in random order
    "describe"  stage 2: a caption as the answer
    "text"      stage 2, no image: the scene is told in words first, as LLaVA's mix has pure text
    "question"  held out: one question per record, with its type
    """
    generator = torch.Generator().manual_seed(seed + 3_000_003)
    records = []
    for i, scene in enumerate(sample_scenes(split, n, seed).tolist()):
        name, image = f"{split}-{kind}-{i}", {"image": f"{split}-{seed}/{i}.png"}
        word = attribute_words(scene)
        turns = [(question, word[attribute]) for attribute, question in QUESTIONS.items()]
        order = torch.randperm(len(turns), generator=generator).tolist()
        if kind == "question":
            for attribute, turn in zip(QUESTIONS, turns, strict=True):
                records.append({"id": f"{name}-{attribute}", **image, "type": attribute,
                                "conversations": dialogue([turn], "<image>")})
            continue
        turns = [turns[j] for j in order]
        before = "<image>"
        if kind == "caption":
            turns = [("describe the image.\n<image>", caption(scene, generator))]
            before = ""
        elif kind == "describe":
            turns = [("describe the image.", caption(scene, generator))]
        elif kind == "text":
            image = {}
            before = caption(scene, generator, mention=1.0) + "."
        records.append({"id": name, **image, "conversations": dialogue(turns, before)})
    return records


def dialogue(questions: list[tuple[str, str]], before: str) -> list[dict]:
    """Return (question, answer) pairs as LLaVA's turns, with `before` as a first line."""
    turns = []
    for question, answer in questions:
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    if before:
        turns[0]["value"] = f"{before}\n{turns[0]['value']}"
    return turns


class WorldImages:
    """get_image for the records of one split: all n pictures drawn once, kept in memory."""

    source = "the tiny world"

    def __init__(self, split: str, n: int, seed: int = 0):
        self.images = render(sample_scenes(split, n, seed), seed)

    def __call__(self, name: str) -> torch.Tensor:
        return self.images[int(Path(name).stem)]

    def fingerprint(self, names: list[str]) -> str:
        return hashlib.sha256(self.images.numpy()).hexdigest()


@functools.cache
def tiny_set(name: str, n: int, n_described: int = 0, n_text: int = 0):
    """Return (records, get_image) of a set.  `name`:

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


def main(argv: list[str] | None = None) -> None:
    """Write records and pixels of all sets, as LLaVA-format JSON + PNG: `export FOLDER`."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("command", choices=["export"])
    parser.add_argument("folder", type=Path)
    for name, n in COUNTS.items():
        parser.add_argument(f"--n-{name}", type=int, default=n, help=f"default {n}, train.py's")
    args = parser.parse_args(argv)
    for name in COUNTS:
        n = getattr(args, f"n_{name}")
        least = 0 if name in ("described", "text") else 1
        if not least <= n <= 10_000_000:
            fail(f"--n-{name} {n}: must be between {least} and 10,000,000")
    sets = {
        "pretrain": tiny_set("pretrain", args.n_pretrain),
        "train": tiny_set("train", args.n_train, args.n_described, args.n_text),
        "validation": tiny_set("validation", args.n_eval),
        "test": tiny_set("test", args.n_eval),
    }
    try:
        for name, (records, get_image) in sets.items():
            names = {record["image"] for record in records if "image" in record}
            for image in tqdm(sorted(names), f"export {name}", leave=False):
                path = args.folder / image
                path.parent.mkdir(parents=True, exist_ok=True)
                TF.to_pil_image(get_image(image)).save(path)
            write_json(args.folder / f"{name}.json", records)
    except OSError as e:
        fail(f"{args.folder}: cannot be written: {e.strerror}")
    print(f"wrote {', '.join(f'{name}.json' for name in sets)} and images under {args.folder}")


def fail(message: str) -> None:
    """End with one line and exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
