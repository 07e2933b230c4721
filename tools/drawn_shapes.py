"""easy-VQA, a public set of drawn shapes, as LLaVA-format JSON: a world that is not the tiny one.

    pip install easy-vqa                    # 5,000 pictures, 48,248 questions, MIT licence (3 MB)
    python -m tools.drawn_shapes D          # writes D/train.json, D/test.json and their pictures

All questions about a training picture are one conversation, in an order drawn once; a test question
is a record of its own, with its type: shape, colour, or whether one is there ("has ...").
"""

import importlib.util
import random
import shutil
from pathlib import Path

from data import read_json, write_json
from plumbing.cli import InputError, Parser, run

SHAPES = {"circle", "rectangle", "triangle"}
COLOURS = {"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"}


def question_type(question: str, answer: str) -> str:
    """What a question asks for, by its answer, or if that is yes or no by its own words."""
    if answer in SHAPES:
        return "shape"
    if answer in COLOURS:
        return "colour"
    return "has shape" if SHAPES & set(question.rstrip("?").split()) else "has colour"


def conversation(pairs: list[tuple[str, str]]) -> list[dict]:
    """(question, answer) pairs as LLaVA's turns about one picture."""
    turns = []
    for question, answer in pairs:
        turns.append({"from": "human", "value": question})
        turns.append({"from": "gpt", "value": answer})
    turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    return turns


def training_records(asked: dict[int, list]) -> list[dict]:
    """A record a picture."""
    records = []
    chance = random.Random(0)
    for number, pairs in asked.items():
        shuffled = chance.sample(pairs, len(pairs))
        records.append({"id": str(number), "image": f"train/{number}.png",
                        "conversations": conversation(shuffled)})
    return records


def test_records(asked: dict[int, list]) -> list[dict]:
    """A record a question."""
    records = []
    for number, pairs in asked.items():
        for i, (question, answer) in enumerate(pairs):
            records.append({"id": f"{number}-{i}", "image": f"test/{number}.png",
                            "type": question_type(question, answer),
                            "conversations": conversation([(question, answer)])})
    return records


def package_folder() -> Path:
    """Where easy-VQA's files are. Raises InputError if it is not installed."""
    package = importlib.util.find_spec("easy_vqa")
    if package is None:
        raise InputError("easy-VQA is not installed; pip install easy-vqa")
    return Path(package.origin).parent / "data"


def main(argv: list[str] | None = None) -> None:
    """Write both splits."""
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, help="where to write")
    args = parser.parse_args(argv)
    source = package_folder()
    for split, records_of in (("train", training_records), ("test", test_records)):
        asked = {}
        for question, answer, number in read_json(source / split / "questions.json"):
            asked.setdefault(number, []).append((question, answer))
        records = records_of(asked)
        shutil.copytree(source / split / "images", args.folder / split, dirs_exist_ok=True)
        write_json(args.folder / f"{split}.json", records)
        print(f"{args.folder}/{split}.json: {len(records):,} records, {len(asked):,} pictures")


if __name__ == "__main__":
    run(main)
