"""Ask a trained run about an image.

    python -m tools.ask runs/tiny                                       # its own held-out samples: question, truth, answer
    python -m tools.ask runs/tiny photo.png "what colour?"              # any image file
"""

import argparse
import sys
from pathlib import Path

import train
from data import Parser, WordTokenizer, load_image, normalise, run


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder of train.py, or a checkpoint of the authors' layout")
    parser.add_argument("image", type=Path, nargs="?", help="an image file; without it, the run's held-out samples")
    parser.add_argument("question", nargs="?")
    parser.add_argument("--n", type=int, default=14, help="how many held-out samples (default 14)")
    args = parser.parse_args(argv)
    if args.image and not args.question:
        parser.error(f'a question is missing: python -m tools.ask {args.run} {args.image} "what colour?"')
    vlm, tokenizer, c = train.load_run(args.run)
    if args.image:
        if not c.llm and (unknown := [w for w in WordTokenizer.words(args.question) if w not in tokenizer.ids]):
            print(f"note: the run has never seen the word(s) {', '.join(unknown)}", file=sys.stderr)
        record = {"image": str(args.image), "conversations": [{"from": "human", "value": f"<image>\n{args.question}"}]}
        print(train.answer(c, vlm, tokenizer, [record], lambda name: load_image(Path(name), c.image_size))[0])
        return
    sets = train.load_sets(c)
    if "eval" not in sets:
        parser.error(f'{args.run} has no held-out set: python -m tools.ask {args.run} IMAGE "QUESTION"')
    records, get_image = sets["eval"]
    rows = train.questions_of(records)[:args.n]
    answers = train.answer(c, vlm, tokenizer, [row["record"] for row in rows], get_image)
    for row, given in zip(rows, answers):
        mark = "right" if normalise(given) == row["answer"] else "wrong"
        print(f"{row['record'].get('image', '(no image)')}  {row['question']}  {row['answer']}  ->  {given}  ({mark})")


if __name__ == "__main__":
    run(main)
