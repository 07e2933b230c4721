"""Pictures and tables of the ladder, of CLIP's share, and of MoLE's regimes."""

import math
from pathlib import Path

from matplotlib.figure import Figure

from plumbing.plots import save_figure
from tools.arms import LADDER, LADDER_TITLES, MOLE, SHARES, TITLES, share_arm
from tools.compare_report import interval, show


def ladder_table(results: dict, seeds: int) -> str:
    """The rungs here, and the published numbers beside them."""
    lines = [f"Macro accuracy in % at tiny size, mean ± 95 % interval over {seeds} seed(s), and "
             "the paper's own component table (7B, average over its benchmarks; from a note on the "
             "paper, not from its text). The two need not agree.", "",
             "| rung | here | the paper, 7B |", "|---|---|---|"]
    for arm, published in LADDER.items():
        given = "" if published is None else f"{published:.1f}"
        macro = show(interval(results[arm]["macro"]))
        lines.append(f"| {LADDER_TITLES[arm]} (`{arm}`) | {macro} | {given} |")
    return "\n".join(lines) + "\n"


def plot_ladder(results: dict, path: Path) -> None:
    """ladder.png: the rungs here on the left, the published ones on the right."""
    rungs = list(LADDER)
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.6, 1))
    for i, arm in enumerate(rungs):
        y = len(rungs) - i
        center, width = interval(results[arm]["macro"])
        error = 0 if math.isnan(width) else width
        left.barh(y, center, xerr=error, color="C3" if arm in ("movekd", "ours") else "C0")
        left.text(center + error + 0.5, y, f"{center:.1f}", va="center", fontsize=9)
        if LADDER[arm] is not None:
            right.barh(y, LADDER[arm], color="C3" if arm == "movekd" else "C1")
            right.text(LADDER[arm] + 0.05, y, f"{LADDER[arm]:.1f}", va="center", fontsize=9)
    left.set_yticks(range(len(rungs), 0, -1), [LADDER_TITLES[arm] for arm in rungs])
    left.set(xlim=(60, 102), xlabel="macro accuracy, %", title="here, tiny world")
    right.set(xlim=(65, 68.6), xlabel="average of its benchmarks", title="the paper, 7B")
    save_figure(figure, path)


def shares_table(results: dict, seeds: int) -> str:
    """Accuracy over CLIP's share, in both directions of the adapters."""
    lines = [f"Macro accuracy in %, {seeds} seed(s), over CLIP's share of the teacher weights.", "",
             f"| CLIP's share | {' | '.join(str(share) for share in SHARES)} |",
             "|" + "---|" * (len(SHARES) + 1)]
    for direction, title in (("paper", "the paper's adapters, teacher -> student"),
                             ("ours", "our recipe's heads, student -> teacher")):
        cells = [show(interval(results[share_arm(direction, share)]["macro"])) for share in SHARES]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot_shares(results: dict, path: Path) -> None:
    """shares.png: the same as curves, between frozen CLIP and all encoders if they are there."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for direction, title, color in (("paper", "adapters teacher -> student (the paper)", "C0"),
                                    ("ours", "heads student -> teacher (our recipe)", "C3")):
        arms = [share_arm(direction, share) for share in SHARES]
        means = [interval(results[arm]["macro"])[0] for arm in arms]
        axis.plot(SHARES, means, "o-", color=color, label=title)
    axis.set(xscale="log", xlabel="CLIP's share of the teacher weights",
             ylabel="macro accuracy, %")
    axis.set_xticks(SHARES, [str(share) for share in SHARES])
    axis.minorticks_off()
    axis.grid(linewidth=0.3)
    axis.legend(fontsize=9)
    save_figure(figure, path)


def plot_mole(results: dict, path: Path) -> None:
    """mole.png: the regimes in which MoLE might help, each beside its baseline."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    for i, arm in enumerate(MOLE):
        y = len(MOLE) - i
        center, width = interval(results[arm]["macro"])
        error = 0 if math.isnan(width) else width
        axis.barh(y, center, xerr=error, color="C2" if "experts" in arm else "C0")
        axis.text(center + error + 0.5, y, f"{center:.1f}", va="center", fontsize=9)
    axis.set_yticks(range(len(MOLE), 0, -1), [TITLES[arm].strip("*") for arm in MOLE])
    axis.set(xlim=(50, 102), xlabel="macro accuracy, %")
    save_figure(figure, path)
