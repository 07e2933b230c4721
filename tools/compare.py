"""Does MoVE-KD help, which part of it, and why?  Arms of one experiment over several seeds.

    python -m tools.compare                 # 13 arms x 5 seeds -> table.md, compare.png
    python -m tools.compare --ladder        # the paper's components, then ours -> ladder.md, .png
    python -m tools.compare --shares        # CLIP's share, both directions -> shares.md, .png
    python -m tools.compare --mole          # when does MoLE help? -> mole.md, .png
    python -m tools.compare --arms movekd no-kd --eval-split validation --out runs/tune

The results are under runs/compare. The last line is for tuning: never on the test split. Flags that
are not its own go to every arm.

Each arm is a command line of train.py. Arms share data, number of steps, initial weights and what
the teachers say of the images; they run seed by seed, one process of one thread for each core. A
run that has its result is not run again, so an interrupted comparison goes on.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import train
from data import blank_image
from model import Student
from plumbing.build import build_encoder, build_teachers, build_vlm, pretrained_weights
from plumbing.cli import Parser, run
from plumbing.config import TINY
from plumbing.files import read_json, write_json
from plumbing.finished_run import load_run
from plumbing.flags import load_config, parse_config
from plumbing.sets import build_tokenizer, load_sets
from plumbing.teacher_outputs import cache_teachers
from tiny.pictures import WORLD_SIZE
from tiny.scenes import QUESTIONS
from tools.arms import ARMS, EXPERIMENTS, TITLES
from tools.compare_report import T_QUANTILE, accuracy_table, plot, report
from tools.ladder_report import ladder_table, plot_ladder, plot_mole, plot_shares, shares_table
from tools.measuring import count_flops
from tools.probe import PROBE, explained, pooled, probe, probe_images

TAUGHT = ("eva", "convnext")  # the teachers but CLIP

# ------------------------------------------------------------------------------------------------
# Runs


@functools.cache
def teacher_holds(name: str, path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """A teacher's pooled tokens of the probe's images; once a process."""
    teacher = build_encoder(TINY, name, {name: path})
    return tuple(pooled(teacher, probe_images(split, n)[0]) for split, n in PROBE.items())


def student_holds(student: Student, weights: dict[str, Path]) -> dict[str, float]:
    """What the student's V^s holds, in %, whatever the LLM makes of it.

    It is the probe of each attribute, and how much of what each teacher but CLIP sees.
    """
    held = {}
    for attribute, accuracy in probe(student).items():
        if attribute in QUESTIONS:
            held[attribute] = accuracy
    for name in TAUGHT:
        held[f"of {name}"] = explained(student, teacher_holds(name, weights[name]))
    return held


def arm_flags(arm: str, rest: list[str]) -> list[str]:
    """The command line of an arm, without seed and folder."""
    return ["--tiny", *ARMS[arm][1].split(), *rest]


def run_arm(argv: list[str], weights: dict[str, Path]) -> None:
    """One run of train.py on one thread, then what its student holds.

    Its output is in the run's folder.
    """
    torch.set_num_threads(1)
    c = parse_config(argv)
    out = Path(c.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "held.json").unlink(missing_ok=True)  # of an earlier run here
    with (open(out / "output.txt", "w", encoding="utf-8") as file, contextlib.redirect_stdout(file),
          contextlib.redirect_stderr(file)):
        train.main(argv)
        if c.student != "ensemble":
            vlm, _, _ = load_run(out)
            write_json(out / "held.json", student_holds(vlm.student, weights))


def finished(argv: list[str]) -> bool:
    """Is this very run, same flags, done to the end?"""
    c = parse_config(argv)
    out = Path(c.out)
    wanted = ["result.json"]
    if c.student != "ensemble":
        wanted.append("held.json")
    if not all((out / name).exists() for name in wanted):
        return False
    return dataclasses.asdict(load_config(out / "config.json")) == dataclasses.asdict(c)


def run_missing(runs: list[list[str]], weights: dict[str, Path]) -> None:
    """Run what has no result yet, as many at once as there are cores."""
    missing = [flags for flags in runs if not finished(flags)]
    workers = max(1, min(os.cpu_count(), len(missing)))
    done = len(runs) - len(missing)
    with (tqdm(total=len(runs), initial=done, desc="arms x seeds") as bar,
          ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool):
        jobs = [pool.submit(run_arm, flags, weights) for flags in missing]
        for job in as_completed(jobs):
            job.result()
            bar.update()


def collect(runs: dict[tuple[str, int], list[str]]) -> dict[str, dict[str, list]]:
    """The results of finished runs, as tools/compare_report.py wants them."""
    results = {}
    for (arm, _), argv in runs.items():
        out = Path(parse_config(argv).out)
        result = read_json(out / "result.json")
        entry = results.setdefault(arm, {"macro": [], "accuracy": [], "held": []})
        entry["macro"].append(result["macro_accuracy"])
        entry["accuracy"].append(result["accuracy"])
        if (out / "held.json").exists():
            entry["held"].append(read_json(out / "held.json"))
    return results


@torch.no_grad()
def encoder_cost(encoder: nn.Module) -> tuple[float, int]:
    """FLOPs per image and parameters of what runs at inference: images in, tokens out."""
    encoder.eval()
    image = blank_image(WORLD_SIZE)[None]                                       # (1, 3, R, R)
    return count_flops(lambda: encoder(image)), sum(p.numel() for p in encoder.parameters())


# ------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """Run all arms of an experiment, then write its report."""
    parser = Parser(__doc__)
    parser.add_argument("--seeds", type=int, choices=range(1, len(T_QUANTILE) + 2),
                        help="how many (default 5; fewer with --ladder, --shares, --mole)")
    choice = parser.add_mutually_exclusive_group()
    for name in ("ladder", "shares", "mole"):
        choice.add_argument(f"--{name}", dest="experiment", action="store_const", const=name)
    choice.add_argument("--arms", nargs="+", choices=ARMS, metavar="ARM",
                        help=f"of: {' '.join(ARMS)}")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    args, rest = parser.parse_known_args(argv)
    experiment = args.experiment or "main"
    arms, seeds = EXPERIMENTS[experiment]
    arms = args.arms or arms
    seeds = args.seeds or seeds

    # What all runs share: the stage-0 models, and what the teachers say of the training images.
    c = parse_config(["--tiny", *rest])
    sets = load_sets(c)
    tokenizer = build_tokenizer(c, sets)
    weights, _ = pretrained_weights(c, sets["train"][0], tokenizer)
    cache = args.out / "teachers"
    cache_teachers(build_teachers(c, weights), cache, [sets["pretrain"], sets["train"]])

    # The runs, seed by seed.
    runs = {}
    for seed in range(seeds):
        for arm in arms:
            out = args.out / arm / str(seed)
            runs[arm, seed] = [*arm_flags(arm, rest), "--seed", str(seed), "--out", str(out),
                               "--cache-teachers", str(cache)]
    args.out.mkdir(parents=True, exist_ok=True)
    run_missing(list(runs.values()), weights)

    results = collect(runs)
    write = WRITERS[experiment]
    print(write(results, args.out, seeds, rest, tokenizer, weights))


def write_main(results: dict, out: Path, seeds: int, rest: list[str], tokenizer,
               weights: dict) -> str:
    """table.md and compare.png."""
    # What the encoders hold before any distillation.
    llava = build_vlm(parse_config(arm_flags("llava", rest)), tokenizer, weights).student
    before = {"CLIP, also the student before": student_holds(llava, weights)}
    for name in TAUGHT:
        teacher = build_encoder(TINY, name, weights)
        before[f"{name}, the teacher"] = probe(teacher)
    costs = arm_costs(results, rest, tokenizer, weights)
    text = report(results, TITLES, costs, before, seeds)
    (out / "table.md").write_text(text, encoding="utf-8")
    plot(results, out / "compare.png")
    return text


def write_ladder(results: dict, out: Path, seeds: int, *_) -> str:
    """ladder.md and ladder.png."""
    text = ladder_table(results, seeds)
    (out / "ladder.md").write_text(text, encoding="utf-8")
    plot_ladder(results, out / "ladder.png")
    return text


def write_shares(results: dict, out: Path, seeds: int, *_) -> str:
    """shares.md and shares.png."""
    text = shares_table(results, seeds)
    (out / "shares.md").write_text(text, encoding="utf-8")
    plot_shares(results, out / "shares.png")
    return text


def write_mole(results: dict, out: Path, seeds: int, rest: list[str], tokenizer,
               weights: dict) -> str:
    """mole.md and mole.png."""
    costs = arm_costs(results, rest, tokenizer, weights)
    text = "\n".join(accuracy_table(results, TITLES, costs, seeds)) + "\n"
    (out / "mole.md").write_text(text, encoding="utf-8")
    plot_mole(results, out / "mole.png")
    return text


WRITERS = {"main": write_main, "ladder": write_ladder, "shares": write_shares, "mole": write_mole}


def arm_costs(arms: Iterable[str], rest: list[str], tokenizer, weights: dict) -> dict:
    """(FLOPs, parameters) of each arm's vision side, relative to CLIP, which is LLaVA's."""
    costs = {}
    for arm in {"llava", *arms}:
        student = build_vlm(parse_config(arm_flags(arm, rest)), tokenizer, weights).student
        costs[arm] = encoder_cost(student)
    clip_flops, clip_parameters = costs["llava"]
    return {arm: (flops / clip_flops, parameters / clip_parameters)
            for arm, (flops, parameters) in costs.items()}


if __name__ == "__main__":
    run(main)
