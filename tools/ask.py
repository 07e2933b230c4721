"""Ask a trained run about an image.

    python -m tools.ask runs/tiny                               # its own held-out samples (10 s)
    python -m tools.ask runs/tiny photo.png "what colour?"      # any image file
"""

import sys
from pathlib import Path

from plumbing.cli import Parser, run
from plumbing.config import Config
from plumbing.evaluate import answer, questions_of, score
from plumbing.finished_run import load_run
from plumbing.sets import load_sets, student_size
from real.image_files import load_image
from tiny.llm import WordTokenizer


def main(argv: list[str] | None = None) -> None:
    """Answer one question about one image, or the run's own held-out samples."""
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path,
                        help="a run folder of train.py, LLaVA-1.5, or the authors' checkpoint")
    parser.add_argument("image", type=Path, nargs="?",
                        help="an image file; without it, the run's held-out samples")
    parser.add_argument("question", nargs="?")
    parser.add_argument("--n", type=int, default=14, help="how many held-out samples (default 14)")
    args = parser.parse_args(argv)
    if args.image and not args.question:
        parser.error(f"a question is missing: python -m tools.ask {args.run} {args.image} "
                     '"what colour?"')
    if args.image:
        load_image(args.image, 16)  # a bad one ends it now
    vlm, tokenizer, c = load_run(args.run)
    if args.image:
        print(ask(c, vlm, tokenizer, args.image, args.question))
        return
    sets = load_sets(c)
    if "eval" not in sets:
        parser.error(f"{args.run} has no held-out set: python -m tools.ask {args.run} IMAGE "
                     '"QUESTION"')
    print_samples(c, vlm, tokenizer, *sets["eval"], args.n)


def ask(c: Config, vlm, tokenizer, image: Path, question: str) -> str:
    """Return the answer to a question about an image file."""
    if not c.llm:
        unknown = [w for w in WordTokenizer.words(question) if w not in tokenizer.ids]
        if unknown:
            print(f"note: the run has never seen the word(s) {', '.join(unknown)}", file=sys.stderr)
    turn = {"from": "human", "value": f"<image>\n{question}"}
    record = {"image": str(image), "conversations": [turn]}
    picture = load_image(image, student_size(c))
    return answer(c, vlm, tokenizer, [record], lambda name: picture)[0]


def print_samples(c: Config, vlm, tokenizer, records: list[dict], get_image, n: int) -> None:
    """Print question, truth and answer of the first n held-out samples."""
    rows = questions_of(records)[:n]
    answers = answer(c, vlm, tokenizer, [row["record"] for row in rows], get_image)
    for row, given in zip(rows, answers, strict=True):
        mark = {0: "wrong", 1: "right"}.get(score(row, given), "partly right")
        image = row["record"].get("image", "(no image)")
        print(f"{image}  {row['question']}  {row['answers'][0]}  ->  {given}  ({mark})")


if __name__ == "__main__":
    run(main)
