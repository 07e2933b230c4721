"""Does MoVE-KD help, which component of it, and why?  Variants of one run over several seeds.

    python -m tools.compare                 # 13 variants, 5 seeds -> compare.md, compare.png
    python -m tools.compare --quick         # the five that matter, one seed (5 min on 2 cores)
    python -m tools.compare --ladder        # the paper's components, then ours, step by step
    python -m tools.compare --ablation      # ours with more or fewer components
    python -m tools.compare --shares        # CLIP's weight, both directions of the adapters
    python -m tools.compare --mole          # when does MoLE help?
    python -m tools.compare --probe         # what each teacher knows (30 s)
    python -m tools.compare --arms movekd no-kd --eval-split validation --out runs/tune

The results are under runs/compare. The last line is for tuning: never on the test split. Flags that
are not its own go to every run. Variants share data, stages, initial weights and the teachers'
outputs; a run that has its result is not run again, so an interrupted comparison goes on.
"""

from pathlib import Path

from plumbing.build import build_teachers, pretrained_weights
from plumbing.cli import Parser, run
from plumbing.files import read_json
from plumbing.flags import parse_config
from plumbing.sets import build_tokenizer, load_sets
from plumbing.teacher_outputs import cache_teachers
from tools.compare.report import T_QUANTILE, compare, plot, table
from tools.compare.runs import probe, train_all
from tools.compare.variants import EXPERIMENTS, VARIANTS

ANSWERED = """\
Held-out accuracy in %, mean ± 95 % interval over the seeds; cost of the vision side at inference,
% of CLIP's; TFLOPs of the training; difference in macro accuracy to other variants, by seed."""
PROBED = """\
What an encoder's tokens hold, in %, whatever the LLM makes of them: a linear probe of the pooled
tokens per attribute, and how much of a teacher's pooled tokens is linear in them. CLIP's are also
those of the student before training."""


def build_parser() -> Parser:
    """Return the parser of the tool's own flags."""
    parser = Parser(__doc__)
    parser.prog = "python -m tools.compare"
    parser.add_argument("--seeds", type=int, choices=range(1, len(T_QUANTILE) + 2),
                        help="how many; default 1, 3 or 5, by experiment")
    choice = parser.add_mutually_exclusive_group()
    for name in ("quick", "ladder", "ablation", "shares", "mole", "probe"):
        choice.add_argument(f"--{name}", dest="experiment", action="store_const", const=name)
    choice.add_argument("--arms", nargs="+", choices=VARIANTS, metavar="VARIANT",
                        help=f"of: {' '.join(VARIANTS)}")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    return parser


def main(argv: list[str] | None = None) -> None:
    """Train all variants of an experiment, then write its report."""
    args, rest = build_parser().parse_known_args(argv)
    experiment = args.experiment or ("arms" if args.arms else "compare")

    # What all runs share: the stage-0 models, and the teachers' outputs for the training images.
    c = parse_config(["--tiny", *rest])
    sets = load_sets(c)
    tokenizer = build_tokenizer(c, sets)
    weights = pretrained_weights(c, sets["train"][0], tokenizer)
    teachers = build_teachers(c, weights)
    probed = {name: [probe(net, weights)] for name, net in teachers.encoders.items()}
    if experiment == "probe":
        print("\n".join([PROBED, "", *table(probed)]))
        return
    cache = args.out / "teachers"
    cache_teachers(teachers, cache, [sets["pretrain"], sets["train"]])

    # The runs, seed by seed.
    seeds = dict.fromkeys(args.arms, 5) if args.arms else EXPERIMENTS[experiment]
    if args.seeds:
        seeds = dict.fromkeys(seeds, args.seeds)
    runs = {}
    for seed in range(max(seeds.values())):
        for variant in [variant for variant in seeds if seed < seeds[variant]]:
            folder = args.out / variant / str(seed)
            runs[folder] = ["--tiny", *VARIANTS[variant][1].split(), *rest, "--seed", str(seed),
                            "--out", str(folder), "--cache-teachers", str(cache)]
    train_all(runs, weights)

    # The report.
    answers = {}
    for folder in runs:
        numbers = read_json(folder / "numbers.json")
        numbers["answers"]["TFLOPs"] = read_json(folder / "result.json")["tflops"]
        answers.setdefault(folder.parent.name, []).append(numbers["answers"])
        if numbers["probe"]:
            probed.setdefault(folder.parent.name, []).append(numbers["probe"])
    compare(answers)
    counts = "Seeds: " + ", ".join(f"{name} {count}" for name, count in seeds.items())
    text = "\n".join([ANSWERED, counts, "", *table(answers), "", PROBED, "", *table(probed), ""])
    (args.out / f"{experiment}.md").write_text(text, encoding="utf-8")
    plot(answers, args.out / f"{experiment}.png")
    print(text)


if __name__ == "__main__":
    run(main)
