"""See the method at work: one image through one training step, as a page to look at.

    python -m tools.explain runs/tiny                     # its first held-out picture (10 s)
    python -m tools.explain runs/tiny --row 7             # another
    python -m tools.explain runs/tiny photo.png --question "what colour?" --answer red

Writes RUN/explain.html, one file that needs no network, and its pictures as PNG in RUN/explain/.
Works for runs of every preset, and for the authors' checkpoint, whose folder holds no teachers.
"""

import argparse
import dataclasses
from pathlib import Path

from plumbing.cli import Parser, run
from plumbing.config import Config
from plumbing.run_folder import read_log
from plumbing.sets import load_eval_set
from real.image_files import load_image
from tools.explain.numbers import explain_image
from tools.explain.page import render
from tools.explain.pictures import draw
from tools.explain.whole_run import load_whole_run


def main(argv: list[str] | None = None) -> None:
    """Explain one image of a run."""
    parser = Parser(__doc__)
    parser.prog = "python -m tools.explain"
    parser.add_argument("run", type=Path,
                        help="a run folder of train.py, or a checkpoint of the authors' layout")
    parser.add_argument("image", type=Path, nargs="?",
                        help="an image file; without it, one of the run's held-out pictures")
    parser.add_argument("--row", type=int, default=0, help="which held-out picture, from 0")
    parser.add_argument("--question", default="what shape?", help="to ask about the image file")
    parser.add_argument("--answer", default="", help="its true answer; \"\": what the model says, "
                        "so that L_text rates the model by itself")
    parser.add_argument("--weights", default="", help="folder of the encoders' files, if they are "
                        "no longer where the run found them")
    parser.add_argument("--out", type=Path, help="folder for explain.html (default: the run's)")
    args = parser.parse_args(argv)
    trained = load_whole_run(args.run, weights=args.weights)
    # one picture to draw, of which each encoder makes its view
    trained = trained._replace(c=dataclasses.replace(trained.c, image_views="one"))
    if args.image:
        name, image = args.image.name, load_image(args.image, trained.c.image_size)
        questions = [(args.question, args.answer)]
    else:
        name, image, questions = held_out_picture(parser, args, trained.c)
    explained = explain_image(trained, name, image, questions, last_teacher_weights(args.run))
    pictures = draw(explained)
    out = args.out or args.run
    write(out, render(explained, pictures), pictures)
    print(f"{out / 'explain.html'}: {name}; open it in a browser. Its {len(pictures)} pictures are "
          f"in {out / 'explain'}/")


def held_out_picture(parser: Parser, args: argparse.Namespace, c: Config) -> tuple:
    """Return (name, pixels, [(question, answer)]) of a picture of the run's held-out set."""
    held_out = load_eval_set(c)
    if held_out is None:
        parser.error(f"{args.run} has no held-out set: python -m tools.explain {args.run} IMAGE "
                     '--question "..."')
    records, get_image = held_out
    questions = {}
    for record in records:
        turns = [turn["value"].replace("<image>", "").strip() for turn in record["conversations"]]
        if "image" in record:
            rounds = zip(turns[::2], turns[1::2], strict=False)  # a last question has no answer
            questions.setdefault(record["image"], []).extend(rounds)
    names = list(questions)
    if not 0 <= args.row < len(names):
        parser.error(f"--row {args.row}: the held-out set has {len(names)} pictures, from 0")
    name = names[args.row]
    return name, get_image(name), questions[name]


def last_teacher_weights(folder: Path, lines: int = 10) -> dict[str, float]:
    """Return each teacher's mean weight over the last lines of the run's log that have one."""
    if not (folder / "log.jsonl").exists():
        return {}
    rows = [row for row in read_log(folder) if "w_clip" in row][-lines:]
    names = [name for name in (rows[0] if rows else ()) if name.startswith("w_")]
    return {name.removeprefix("w_"): sum(row[name] for row in rows) / len(rows) for name in names}


def write(out: Path, html: str, pictures: dict[str, bytes]) -> None:
    """Write the page, which replaces an older one when it is complete, and its pictures."""
    (out / "explain").mkdir(parents=True, exist_ok=True)
    for name, png in pictures.items():
        (out / "explain" / f"{name}.png").write_bytes(png)
    temporary = out / "explain.html.tmp"
    temporary.write_text(html, encoding="utf-8")
    temporary.replace(out / "explain.html")


if __name__ == "__main__":
    run(main)
