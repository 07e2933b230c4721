"""Does MoVE-KD help, which part of it, and why? Arms of one experiment, each a command line of train.py, over several seeds.

    python -m tools.compare                 # 12 arms x 5 seeds -> runs/compare/table.md, compare.png
    python -m tools.compare --seeds 1       # one pass, no intervals
    python -m tools.compare --arms movekd no-kd --eval-split validation --out runs/tune     # tuning: never on the test split

Flags that are not its own go to every arm. Arms share data, number of steps, initial weights and what the teachers say of the
images; run seed by seed, two processes of one thread each. A run that has its result is not run again, so an interrupted comparison goes on.
"""

import argparse
import contextlib
import dataclasses
import functools
import math
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import data
import train
from data import ASKED
from model import flop_counter
from teachers import VisionEncoder
from tools.plots import save_figure
from tools.pretrain_tiny import PROBE, explained, pooled, probe, probe_images, stage0

ARMS = {  # name: (what it is, flags of train.py)
    "llava": ("LLaVA-1.5: frozen CLIP", "--student frozen --lambda-kd 0 --mole-experts 0"),
    "no-kd": ("fine-tuned, MoLE, no KD", "--lambda-kd 0"),
    "no-mole": ("MoVE-KD without MoLE: plain fine-tuning with KD", "--mole-experts 0"),  # an ablation and a baseline in one
    "movekd": ("**MoVE-KD**", ""),
    "no-token-weight": ("MoVE-KD, token weights uniform", "--kd-token-weight uniform"),
    "no-teacher-weight": ("MoVE-KD, teacher weights uniform", "--kd-teacher-weight uniform"),
    "clip-only": ("teacher CLIP alone: fine-tuning that stays near CLIP", "--teachers clip"),  # how much of the gain is no teaching at all?
    "clip-eva": ("MoVE-KD, teachers CLIP + EVA", "--teachers clip eva"),
    "clip-convnext": ("MoVE-KD, teachers CLIP + ConvNeXt", "--teachers clip convnext"),
    "student-to-teacher": ("heads student -> teacher (AM-RADIO)", "--adapter-direction student_to_teacher"),
    "ensemble": ("multi-encoder VLM, nothing distilled", "--student ensemble --lambda-kd 0 --mole-experts 0"),
    "released": ("MoVE-KD, released code's arithmetic", "--recipe released --mole-alpha 0.25"),  # alpha / rank 1/32, theirs
}
T_QUANTILE = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t, 0.975, 1-9 degrees of freedom

# ---------------------------------------------------------------------------------------------------------------------
# Runs


@functools.cache
def seen_by(name: str, path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """A teacher's pooled tokens of the probe's images; once a process."""
    teacher = VisionEncoder(getattr(train.TINY, name), path)
    return tuple(pooled(teacher, probe_images(split, n)[0]) for split, n in PROBE.items())


def eye(student, weights: dict[str, Path]) -> dict[str, float]:
    """What the student's V^s holds, whatever the LLM makes of it, all in %: the probe of each attribute, and how much of what each
    teacher but CLIP sees."""
    held = {f"of {name}": explained(student, seen_by(name, weights[name])) for name in ("eva", "convnext")}
    return {name: value for name, value in probe(student).items() if name in ASKED} | held


def run_arm(argv: list[str], weights: dict[str, Path]) -> None:
    """One run of train.py on one thread, its output in the run's folder, then what its student holds."""
    torch.set_num_threads(1)
    c = train.parse_config(argv)
    out = Path(c.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "eye.json").unlink(missing_ok=True)  # of an earlier run here
    with open(out / "output.txt", "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        train.main(argv)
        if c.student != "ensemble":
            vlm, _, _ = train.load_run(out)
            data.write_json(out / "eye.json", eye(vlm.student, weights))


def finished(argv: list[str]) -> bool:
    """Is this very run, same flags, done to the end?"""
    c = train.parse_config(argv)
    out = Path(c.out)
    if not (out / "result.json").exists() or not (c.student == "ensemble" or (out / "eye.json").exists()):
        return False
    return dataclasses.asdict(train.load_config(out / "config.json")) == dataclasses.asdict(c)


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval (Student's t); nan for the width of a single value."""
    if len(values) < 2:
        return mean(values), math.nan
    return mean(values), T_QUANTILE[len(values) - 2] * stdev(values) / len(values) ** 0.5


def paired(values: list[float], base: list[float]) -> tuple[float, float]:
    """The same of the differences, seed by seed: what the seeds share (order, projector) cancels."""
    return interval([a - b for a, b in zip(values, base, strict=True)])


def show(numbers: tuple[float, float], sign: str = "") -> str:
    center, width = numbers
    return f"{center:{sign}.1f}" + ("" if math.isnan(width) else f" ± {width:.1f}")


@torch.no_grad()
def encoder_cost(encoder) -> tuple[float, int]:
    """FLOPs per image and parameters of what runs at inference: images (1, 3, R, R) in, tokens out."""
    with (counter := flop_counter()):
        encoder.eval()(data.blank_image(data.WORLD_SIZE)[None])
    return counter.get_total_flops(), sum(p.numel() for p in encoder.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Report


def collect(runs: dict[tuple[str, int], list[str]]) -> dict[str, dict[str, list]]:
    """{arm: {"macro": [one a seed], "accuracy": [dict a seed], "eye": [dict a seed, if it has a student]}} of finished runs."""
    results: dict = {}
    for (arm, _), argv in runs.items():
        out = Path(train.parse_config(argv).out)
        result = data.read_json(out / "result.json")
        entry = results.setdefault(arm, {"macro": [], "accuracy": [], "eye": []})
        entry["macro"].append(result["macro_accuracy"])
        entry["accuracy"].append(result["accuracy"])
        entry["eye"] += [data.read_json(out / "eye.json")] if (out / "eye.json").exists() else []
    return results


def table(results: dict, costs: dict[str, tuple[float, float]], before: dict[str, dict[str, float]], seeds: int) -> str:
    """table.md: accuracy, then probes, then the three questions answered in numbers."""
    types = list(ASKED)
    base = results.get("no-kd", {}).get("macro")
    lines = [f"Held-out accuracy in %, mean ± 95 % interval over {seeds} seed(s); difference to `no-kd` seed by seed; cost of the vision side at "
             "inference relative to CLIP.", "",
             f"| arm | macro | difference | {' | '.join(types)} | FLOPs | parameters |", "|" + "---|" * (len(types) + 5)]
    for arm, r in results.items():
        per_type = [show(interval([accuracy[t] for accuracy in r["accuracy"]])) for t in types]
        difference = show(paired(r["macro"], base), "+") if base and arm != "no-kd" else ""
        lines.append(f"| {ARMS[arm][0]} (`{arm}`) | {show(interval(r['macro']))} | {difference} | {' | '.join(per_type)} | "
                     f"{costs[arm][0]:.2f}x | {costs[arm][1]:.2f}x |")
    columns = [*ASKED, "of eva", "of convnext"]
    lines += ["", "What an encoder's tokens hold, in %, whatever the LLM makes of them: a linear probe on the pooled tokens per attribute, and the share "
              "of each teacher's pooled tokens that is linear in them. First the teachers, then V^s of each arm.", "",
              f"| tokens of | {' | '.join(columns)} |", "|" + "---|" * (len(columns) + 1)]
    lines += [f"| {name} | {' | '.join(f'{held[k]:.0f}' if k in held else '' for k in columns)} |" for name, held in before.items()]
    lines += [f"| `{arm}` | {' | '.join(show(interval([held[k] for held in r['eye']])) for k in columns)} |"
              for arm, r in results.items() if r["eye"] and arm != "llava"]
    return "\n".join(lines + [""] + reading(results)) + "\n"


def reading(results: dict) -> list[str]:
    """The questions of the experiment, answered by its numbers."""
    macro = {arm: r["macro"] for arm, r in results.items()}
    lines = []
    for base in ("no-kd", "llava"):
        if {"movekd", base} <= set(macro):
            lines.append(f"- MoVE-KD against `{base}`: {show(paired(macro['movekd'], macro[base]), '+')} points.")
    if {"movekd", "llava", "ensemble"} <= set(macro):
        gap, closed = mean(macro["ensemble"]) - mean(macro["llava"]), mean(macro["movekd"]) - mean(macro["llava"])
        lines.append(f"- From LLaVA-1.5 to the multi-encoder VLM it is {gap:.1f} points; MoVE-KD closes {100 * closed / gap:.0f} % of them.")
    for skill, teacher in (("place", "EVA"), ("pattern", "ConvNeXt")):
        if {"movekd", "no-kd"} <= set(macro):
            with_kd, without = ([accuracy[skill] for accuracy in results[arm]["accuracy"]] for arm in ("movekd", "no-kd"))
            lines.append(f"- {skill}, the skill of {teacher}: {show(paired(with_kd, without), '+')} points over `no-kd`.")
    return lines


def plot(results: dict, path: Path) -> None:
    """compare.png: macro accuracy per arm (a dot a seed, the interval a bar) and the mean per question type."""
    types, arms = list(ASKED), list(results)[::-1]
    figure = Figure(figsize=(13, 0.45 * len(arms) + 1.6), layout="tight")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.2))
    for y, arm in enumerate(arms):
        macro = results[arm]["macro"]
        center, width = interval(macro)
        left.errorbar(center, y, xerr=0 if math.isnan(width) else width, fmt="o", color="C3" if arm == "movekd" else "C0", capsize=3)
        left.plot(macro, [y] * len(macro), "|", color="grey", markersize=8)
    left.set(xlabel="macro accuracy, %; mean, 95 % interval, seeds")
    left.set_yticks(range(len(arms)), arms)
    left.grid(axis="x", linewidth=0.3)
    cells = [[mean(accuracy[t] for accuracy in results[arm]["accuracy"]) for t in types] for arm in arms]
    right.imshow(cells, aspect="auto", origin="lower", cmap="RdYlGn", vmin=20, vmax=100)
    for y, row in enumerate(cells):
        for x, value in enumerate(row):
            right.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=9)
    right.set_xticks(range(len(types)), types, rotation=20)
    right.set_yticks([])
    save_figure(figure, path)


# ---------------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    parser = data.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, choices=range(1, len(T_QUANTILE) + 2), help="how many (default 5)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=f"of: {' '.join(ARMS)}")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    args, rest = parser.parse_known_args(argv)
    runs = {(arm, seed): ["--tiny", *ARMS[arm][1].split(), *rest, "--seed", str(seed), "--out", str(args.out / arm / str(seed))]
            for seed in range(args.seeds) for arm in args.arms}

    # what all runs share: the stage-0 models and what the teachers say of the training images
    c = train.parse_config(["--tiny", *rest])
    sets = train.load_sets(c)
    tokenizer = data.WordTokenizer.from_records(sets["pretrain"][0] + sets["train"][0])
    weights, _ = stage0(c, sets["train"][0], tokenizer)
    c.cache_teachers = str(args.out / "teachers")
    train.fill_cache(c, train.build_teachers(c, weights), sets)
    for flags in runs.values():
        flags += ["--cache-teachers", c.cache_teachers]

    args.out.mkdir(parents=True, exist_ok=True)
    missing = [flags for flags in runs.values() if not finished(flags)]
    with tqdm(total=len(runs), initial=len(runs) - len(missing), desc="arms x seeds") as bar, \
            ProcessPoolExecutor(max(1, min(os.cpu_count(), len(missing))), mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(run_arm, flags, weights) for flags in missing]):
            future.result()
            bar.update()

    eyes = {arm: train.build_vlm(train.parse_config(["--tiny", *ARMS[arm][1].split(), *rest]), tokenizer, weights).student
            for arm in {"llava", *args.arms}}
    costs = {arm: [of_arm / of_clip for of_arm, of_clip in zip(encoder_cost(eye), encoder_cost(eyes["llava"]))] for arm, eye in eyes.items()}
    results = collect(runs)
    before = {"CLIP, also the student before": eye(eyes["llava"], weights)}
    before |= {f"{name}, the teacher": probe(VisionEncoder(getattr(c, name), weights[name])) for name in ("eva", "convnext")}
    report = table(results, costs, before, args.seeds)
    (args.out / "table.md").write_text(report)
    plot(results, args.out / "compare.png")
    print(report)


if __name__ == "__main__":
    data.run(main)
