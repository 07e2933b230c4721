"""Does MoVE-KD help, which part of it, and why?  Arms of one experiment over several seeds.

    python -m tools.compare                 # 12 arms x 5 seeds (an hour on 2 cores)
    python -m tools.compare --seeds 1       # one pass, no intervals
    python -m tools.compare --arms movekd no-kd --eval-split validation --out runs/tune

The result is runs/compare/table.md and compare.png. The last line is for tuning: never on the test
split. Flags that are not its own go to every arm.

Each arm is a command line of train.py. Arms share data, number of steps, initial weights and what
the teachers say of the images; they run seed by seed, one process of one thread for each core. A
run that has its result is not run again, so an interrupted comparison goes on.
"""

import contextlib
import dataclasses
import functools
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import train
from data import blank_image, read_json, write_json
from model import Student
from plumbing.build import (build_encoder, build_teachers, build_tokenizer, build_vlm, load_sets,
                            pretrained_weights)
from plumbing.cli import Parser, run
from plumbing.config import TINY
from plumbing.flags import load_config, parse_config
from plumbing.run_folder import load_run
from plumbing.teacher_cache import cache_teachers
from tiny.pictures import WORLD_SIZE
from tiny.scenes import ASKED
from tools.compare_report import T_QUANTILE, plot, report
from tools.measuring import count_flops
from tools.probe import PROBE, explained, pooled, probe, probe_images

ARMS = {  # name: (what it is, flags of train.py)
    "llava": ("LLaVA-1.5: frozen CLIP", "--student frozen --lambda-kd 0 --mole-experts 0"),
    "no-kd": ("fine-tuned, MoLE, no KD", "--lambda-kd 0"),
    # an ablation and a baseline in one
    "no-mole": ("MoVE-KD without MoLE: plain fine-tuning with KD", "--mole-experts 0"),
    "movekd": ("**MoVE-KD**", ""),
    "no-token-weight": ("MoVE-KD, token weights uniform", "--kd-token-weight uniform"),
    "no-teacher-weight": ("MoVE-KD, teacher weights uniform", "--kd-teacher-weight uniform"),
    # how much of the gain is no teaching at all?
    "clip-only": ("teacher CLIP alone: fine-tuning that stays near CLIP", "--teachers clip"),
    "clip-eva": ("MoVE-KD, teachers CLIP + EVA", "--teachers clip eva"),
    "clip-convnext": ("MoVE-KD, teachers CLIP + ConvNeXt", "--teachers clip convnext"),
    "student-to-teacher": ("heads student -> teacher (AM-RADIO)",
                           "--adapter-direction student_to_teacher"),
    "ensemble": ("multi-encoder VLM, nothing distilled",
                 "--student ensemble --lambda-kd 0 --mole-experts 0"),
    # alpha / rank is 1/32, theirs
    "released": ("MoVE-KD, released code's arithmetic", "--recipe released --mole-alpha 0.25"),
}
TITLES = {arm: title for arm, (title, _) in ARMS.items()}
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
        if attribute in ASKED:
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
    with (open(out / "output.txt", "w") as file, contextlib.redirect_stdout(file),
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


# ------------------------------------------------------------------------------------------------
# What an arm's vision side costs at inference


def arm_student(arm: str, rest: list[str], tokenizer, weights: dict) -> nn.Module:
    """The vision side of an arm before training."""
    return build_vlm(parse_config(arm_flags(arm, rest)), tokenizer, weights).student


@torch.no_grad()
def encoder_cost(encoder: nn.Module) -> tuple[float, int]:
    """FLOPs per image and parameters of what runs at inference: images in, tokens out."""
    encoder.eval()
    image = blank_image(WORLD_SIZE)[None]                                       # (1, 3, R, R)
    return count_flops(lambda: encoder(image)), sum(p.numel() for p in encoder.parameters())


def relative_cost(encoder: nn.Module, clip: nn.Module) -> tuple[float, float]:
    """Both as multiples of CLIP's, which is LLaVA's vision side."""
    flops, parameters = encoder_cost(encoder)
    clip_flops, clip_parameters = encoder_cost(clip)
    return flops / clip_flops, parameters / clip_parameters


# ------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """Run all arms, then write the report."""
    parser = Parser(__doc__)
    parser.add_argument("--seeds", type=int, default=5, choices=range(1, len(T_QUANTILE) + 2),
                        help="how many (default 5)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM",
                        help=f"of: {' '.join(ARMS)}")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    args, rest = parser.parse_known_args(argv)

    # What all runs share: the stage-0 models, and what the teachers say of the training images.
    c = parse_config(["--tiny", *rest])
    sets = load_sets(c)
    tokenizer = build_tokenizer(c, sets)
    weights, _ = pretrained_weights(c, sets["train"][0], tokenizer)
    cache = args.out / "teachers"
    cache_teachers(build_teachers(c, weights), cache, [sets["pretrain"], sets["train"]])

    # The runs, seed by seed.
    runs = {}
    for seed in range(args.seeds):
        for arm in args.arms:
            out = args.out / arm / str(seed)
            runs[arm, seed] = [*arm_flags(arm, rest), "--seed", str(seed), "--out", str(out),
                               "--cache-teachers", str(cache)]
    args.out.mkdir(parents=True, exist_ok=True)
    run_missing(list(runs.values()), weights)

    llava = arm_student("llava", rest, tokenizer, weights)
    costs = {}
    for arm in args.arms:
        costs[arm] = relative_cost(arm_student(arm, rest, tokenizer, weights), llava)
    before = {"CLIP, also the student before": student_holds(llava, weights)}
    for name in TAUGHT:
        before[f"{name}, the teacher"] = probe(build_encoder(c, name, weights))

    # The report.
    results = collect(runs)
    text = report(results, TITLES, costs, before, args.seeds)
    (args.out / "table.md").write_text(text)
    plot(results, args.out / "compare.png")
    print(text)


if __name__ == "__main__":
    run(main)
