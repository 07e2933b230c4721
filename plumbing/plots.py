"""The pictures of a run: its curves and its held-out samples."""

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from plumbing.evaluate import score
from plumbing.files import read_json, replacing
from plumbing.run_folder import read_log

PANELS = (  # title, prefix of the names of its curves, scale of the axis
    ("losses", "L_", "log"),
    ("each teacher's own loss", "kd_", "log"),
    ("teacher weights W^tea, mean of a batch", "w_", "linear"),
    ("norm of the gradient, before it is clipped", "grad_norm", "log"),
)


def plot_curves(folder: Path, references: list[tuple]) -> None:
    """Draw curves.png from log.jsonl: losses, teachers, experts, held-out accuracy, all stages."""
    lines = read_log(folder)
    starts = {0: 0}     # of each stage on the axis
    for stage in (0, 1):
        steps = [line["step"] + 1 for line in lines if line["stage"] == stage]
        starts[stage + 1] = starts[stage] + max(steps, default=0)
    names = {}
    for line in lines:
        names.update(line)  # not every line has all of them
    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = list(figure.subplots(2, 3).flat)
    for axis, (title, prefix, scale) in zip(axes[:4], PANELS, strict=True):
        for name in [name for name in names if name.startswith(prefix)]:
            drawn = [line for line in lines if name in line]
            label = name if prefix in ("L_", name) else name.removeprefix(prefix)
            axis.plot(steps_of(drawn, starts), [line[name] for line in drawn], label=label, lw=1)
        axis.set(title=title, yscale=scale)
        if prefix == "kd_":  # CLIP's starts at 0, which would squeeze the others
            axis.set_ylim(bottom=max(0.01, axis.get_ylim()[0]))
        if axis.lines:  # without distillation there is no teacher
            axis.legend(fontsize=8)
    plot_experts(axes[4], figure, lines, starts)
    axes[5].set(title="held-out accuracy, %", ylim=(0, 100))
    held_out = folder / "held_out.json"
    points = read_json(held_out) if held_out.exists() else []
    if points:
        axes[5].plot(steps_of(points, starts), [point["accuracy"] for point in points], marker="o")
        for name, mean, _, seeds in references:
            axes[5].axhline(mean, color="grey", linewidth=0.5)
            axes[5].text(0.01, mean, f"{name}, mean of {seeds} seeds", fontsize=7, va="bottom",
                         transform=axes[5].get_yaxis_transform())
    for axis in axes:
        if not axis.has_data():
            axis.text(0.5, 0.5, "none yet", ha="center", transform=axis.transAxes)
        for start in {*starts.values()} - {0}:
            axis.axvline(start, color="grey", linewidth=0.5)
        axis.set(xlabel="step; a line where a stage begins")
    save_figure(figure, folder / "curves.png")


def steps_of(lines: list[dict], starts: dict[int, int]) -> list[int]:
    """Return the steps of some lines, with those of a stage after those of the one before."""
    return [starts[line["stage"]] + line["step"] for line in lines]


def plot_experts(axis: Axes, figure: Figure, lines: list[dict], starts: dict) -> None:
    """Draw a stripe per expert, layer under layer: its fraction of the tokens at each step."""
    drawn = [line for line in lines if "experts" in line]
    axis.set(title="each expert's fraction of the tokens, one stripe per expert")
    if not drawn:
        return
    fractions = torch.tensor([line["experts"] for line in drawn])       # (lines, layers, E)
    _, layers, count = fractions.shape
    steps = steps_of(drawn, starts)
    mesh = axis.pcolormesh([*steps, steps[-1] + 1], range(layers * count + 1),
                           fractions.flatten(1).T, vmin=0, vmax=1, cmap="magma")
    for layer in range(1, layers):
        axis.axhline(layer * count, color="white", linewidth=1.5)
    axis.set_yticks([(layer + 0.5) * count for layer in range(layers)],
                    [f"layer {layer + 1}" for layer in range(layers)], fontsize=8)
    axis.invert_yaxis()
    figure.colorbar(mesh, ax=axis)


def plot_samples(path: Path, rows: list[dict], answers: list[str], get_image: Callable) -> None:
    """Draw images with question, answer and the model's answer (green right, red wrong)."""
    pictured = [i for i, row in enumerate(rows) if "image" in row["record"]]
    # torch's generator, not Python's: it chose those of docs/samples.png
    order = torch.randperm(len(pictured), generator=torch.Generator().manual_seed(0)).tolist()
    figure = Figure(figsize=(17.5, 10), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.12)  # titles must not touch other pictures
    axes = figure.subplots(3, 7, subplot_kw={"frame_on": False, "xticks": [], "yticks": []})
    for axis, k in zip(axes.flat, order, strict=False):    # as many as there are
        row, given = rows[pictured[k]], answers[pictured[k]]
        image = get_image(row["record"]["image"])
        if isinstance(image, dict):
            image = image[max(image)]
        axis.imshow(image.permute(1, 2, 0).numpy())
        color = "green" if score(row, given) == 1 else "red"
        texts = (row["question"], row["answers"][0], given)
        question, truth, given = (" ".join(text.split()) for text in texts)
        title = f"{question[:40]}\n{truth[:25]} | {given[:25]}"
        axis.set_title(title, fontsize=12, pad=5, parse_math=False, color=color)
    figure.suptitle("question, true answer | the model's answer (green: right)", fontsize=15)
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG atomically."""
    with replacing(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # that the font lacks: it draws a box
        figure.savefig(temporary, dpi=80, format="png")
