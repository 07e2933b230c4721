"""The report of a comparison: means and intervals over the seeds in a table and a bar plot.

A report is made of {variant: [the numbers of a run, {name: value}, one dict per seed]}.
"""

import math
from pathlib import Path
from statistics import mean, stdev

from matplotlib.figure import Figure

from plumbing.plots import save_figure
from tools.compare.variants import VARIANTS

Numbers = dict[str, list[dict[str, float]]]
# Student's t, 0.975, 1-9 degrees of freedom
T_QUANTILE = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def interval(values: list[float]) -> tuple[float, float]:
    """Return the mean and the half width of its 95 % interval (Student's t), NaN for one value."""
    if len(values) < 2:
        return mean(values), math.nan
    width = T_QUANTILE[len(values) - 2] * stdev(values) / len(values) ** 0.5
    return mean(values), width


def show(values: list[float], sign: str = "") -> str:
    """Return an interval as text; sign "+" writes the sign of a positive mean."""
    center, width = interval(values)
    return f"{center:{sign}.1f}" + (f" ± {width:.1f}" if width >= 0.05 else "")


def compare(results: Numbers) -> None:
    """Add to each run its gain over other variants."""
    bases = [name for name in ("no-kd", "llava", "movekd", "ensemble") if name in results]
    for base in bases or results.keys() & {"ours"}:
        for variant in results.keys() - {base}:
            # seed by seed, as many as both have: common effects of a seed cancel
            for run, other in zip(results[variant], results[base], strict=False):
                run[f"over `{base}`"] = run["macro"] - other["macro"]


def table(results: Numbers) -> list[str]:
    """Return the lines of a table, a row per variant and a column per number."""
    names = dict.fromkeys(name for runs in results.values() for run in runs for name in run)
    lines = [f"| | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for variant, runs in results.items():
        cells = [f"{VARIANTS[variant][0]} (`{variant}`)" if variant in VARIANTS else variant]
        for name in names:
            values = [run[name] for run in runs if name in run]
            cells.append(show(values, "+" if name.startswith("over") else "") if values else "")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def plot(results: Numbers, path: Path) -> None:
    """Draw a bar per variant: its mean macro accuracy, and the 95 % interval of several seeds."""
    figure = Figure(figsize=(10, 0.35 * len(results) + 1), layout="constrained")
    axis = figure.subplots()
    for y, (variant, runs) in enumerate(results.items()):
        center, width = interval([run["macro"] for run in runs])
        error = 0 if math.isnan(width) else width
        axis.barh(y, center, xerr=error, color="C3" if variant in ("movekd", "ours") else "C0")
        axis.text(center + error + 0.5, y, f"{center:.1f}", va="center", fontsize=9)
    axis.set_yticks(range(len(results)), [VARIANTS[v][0].replace("*", "") for v in results])
    axis.invert_yaxis()
    axis.set(xlim=(0, 108), xlabel="macro accuracy, %; red: MoVE-KD and ours")
    save_figure(figure, path)
