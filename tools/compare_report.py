"""The report of a comparison: means and intervals over the seeds, the table, its reading, the plot.

`results` is {arm: {"macro": [one a seed], "accuracy": [a dict a seed], "held": [a dict a seed, of
the arms that have a student]}}.
"""

import math
from pathlib import Path
from statistics import mean, stdev

from matplotlib.figure import Figure

from plumbing.plots import save_figure
from tiny.scenes import QUESTIONS

# Student's t, 0.975, 1-9 degrees of freedom
T_QUANTILE = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

# ------------------------------------------------------------------------------------------------
# Statistics


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval (Student's t); of a single value the width is nan"""
    if len(values) < 2:
        return mean(values), math.nan
    width = T_QUANTILE[len(values) - 2] * stdev(values) / len(values) ** 0.5
    return mean(values), width


def paired(values: list[float], base: list[float]) -> tuple[float, float]:
    """The interval of the differences, seed by seed.

    What the seeds share (order, projector) cancels.
    """
    return interval([a - b for a, b in zip(values, base, strict=True)])


def show(numbers: tuple[float, float], sign: str = "") -> str:
    """An interval as text; sign "+" writes the sign of a positive mean."""
    center, width = numbers
    text = f"{center:{sign}.1f}"
    return text if math.isnan(width) else f"{text} ± {width:.1f}"


def column(results: dict, arm: str, kind: str, name: str) -> list[float]:
    """One number of an arm, a seed after the other."""
    return [numbers[name] for numbers in results[arm][kind]]


# ------------------------------------------------------------------------------------------------
# Table


def report(results: dict, titles: dict[str, str], costs: dict[str, tuple[float, float]],
           before: dict[str, dict[str, float]], seeds: int) -> str:
    """table.md: accuracy, then probes, then the questions answered in numbers."""
    lines = [*accuracy_table(results, titles, costs, seeds), "", *probe_table(results, before), "",
             *reading(results)]
    return "\n".join(lines) + "\n"


def accuracy_table(results: dict, titles: dict[str, str], costs: dict[str, tuple[float, float]],
                   seeds: int) -> list[str]:
    """What each arm answers right, and what its vision side costs."""
    base = results.get("no-kd", {}).get("macro")
    lines = [f"Held-out accuracy in %, mean ± 95 % interval over {seeds} seed(s); difference to "
             "`no-kd` seed by seed; cost of the vision side at inference relative to CLIP.", "",
             f"| arm | macro | difference | {' | '.join(QUESTIONS)} | FLOPs | parameters |",
             "|" + "---|" * (len(QUESTIONS) + 5)]
    for arm, result in results.items():
        difference = ""
        if base and arm != "no-kd":
            difference = show(paired(result["macro"], base), "+")
        cells = [f"{titles[arm]} (`{arm}`)", show(interval(result["macro"])), difference]
        for asked in QUESTIONS:
            cells.append(show(interval(column(results, arm, "accuracy", asked))))
        cells += [f"{cost:.2f}x" for cost in costs[arm]]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def probe_table(results: dict, before: dict[str, dict[str, float]]) -> list[str]:
    """What the tokens hold: those of the encoders `before`, then V^s of each arm."""
    columns = [*QUESTIONS, "of eva", "of convnext"]
    lines = ["What an encoder's tokens hold, in %, whatever the LLM makes of them: a linear probe "
             "on the pooled tokens per attribute, and the share of each teacher's pooled tokens "
             "that is linear in them. First the teachers, then V^s of each arm.", "",
             f"| tokens of | {' | '.join(columns)} |", "|" + "---|" * (len(columns) + 1)]
    for name, held in before.items():
        cells = [f"{held[k]:.0f}" if k in held else "" for k in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for arm, result in results.items():
        if result["held"] and arm != "llava":  # LLaVA's student is CLIP, above
            cells = [show(interval(column(results, arm, "held", k))) for k in columns]
            lines.append(f"| `{arm}` | {' | '.join(cells)} |")
    return lines


def reading(results: dict) -> list[str]:
    """The questions of the experiment, answered by its numbers."""
    macro = {arm: result["macro"] for arm, result in results.items()}
    lines = []
    for arm, name in (("movekd", "MoVE-KD"), ("ours", "Our recipe")):
        if arm not in macro:
            continue
        for base in ("no-kd", "llava"):
            if base in macro:
                gain = show(paired(macro[arm], macro[base]), "+")
                lines.append(f"- {name} against `{base}`: {gain} points.")
        if "llava" in macro and "ensemble" in macro:
            gap = mean(macro["ensemble"]) - mean(macro["llava"])
            closed = 100 * (mean(macro[arm]) - mean(macro["llava"])) / gap
            lines.append(f"- From LLaVA-1.5 to the multi-encoder VLM it is {gap:.1f} points; "
                         f"{name} closes {closed:.0f} % of them.")
        if "no-kd" in macro:
            for skill, teacher in (("place", "EVA"), ("pattern", "ConvNeXt")):
                gain = paired(column(results, arm, "accuracy", skill),
                              column(results, "no-kd", "accuracy", skill))
                lines.append(f"- {skill}, the skill of {teacher}: {show(gain, '+')} points over "
                             "`no-kd`.")
    return lines


# ------------------------------------------------------------------------------------------------
# Plot


def plot(results: dict, path: Path) -> None:
    """compare.png: macro accuracy per arm (a tick a seed), and the mean per question type."""
    arms = list(results)[::-1]
    figure = Figure(figsize=(13, 0.45 * len(arms) + 1.6), layout="tight")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.2))
    for y, arm in enumerate(arms):
        macro = results[arm]["macro"]
        center, width = interval(macro)
        error = 0 if math.isnan(width) else width
        color = "C3" if arm in ("movekd", "ours") else "C0"
        left.errorbar(center, y, xerr=error, fmt="o", color=color, capsize=3)
        left.plot(macro, [y] * len(macro), "|", color="grey", markersize=8)
    left.set(xlabel="macro accuracy, %; mean, 95 % interval, seeds")
    left.set_yticks(range(len(arms)), arms)
    left.grid(axis="x", linewidth=0.3)

    cells = []
    for arm in arms:
        cells.append([mean(column(results, arm, "accuracy", asked)) for asked in QUESTIONS])
    right.imshow(cells, aspect="auto", origin="lower", cmap="RdYlGn", vmin=20, vmax=100)
    for y, row in enumerate(cells):
        for x, value in enumerate(row):
            right.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=9)
    right.set_xticks(range(len(QUESTIONS)), list(QUESTIONS), rotation=20)
    right.set_yticks([])
    save_figure(figure, path)
