"""The pictures of a run: its curves and its held-out samples."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from plumbing.evaluate import normalise
from plumbing.files import read_json
from plumbing.run_folder import read_log


MISSING = "\u25a1"  # a box
PANELS = (  # title, prefix of what is drawn, scale of the axis
    ("losses", "L_", "log"),
    ("each teacher's own loss", "kd_", "log"),
    ("teacher weights W^tea, mean of a batch", "w_", "linear"),
    ("norm of the gradient, before it is clipped", "grad_norm", "log"),
)


def plot_curves(folder: Path) -> None:
    """curves.png from log.jsonl: losses, teachers, experts, and held-out accuracy; both stages."""
    lines = read_log(folder)
    offset = max((line["step"] + 1 for line in lines if line["stage"] == 1), default=0)
    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = list(figure.subplots(2, 3).flat)
    for axis, (title, prefix, scale) in zip(axes, PANELS):
        names = [key for line in lines for key in line if key.startswith(prefix)]
        for name in dict.fromkeys(names):
            drawn = [line for line in lines if name in line]
            label = name if prefix == "L_" else name.removeprefix(prefix)
            axis.plot(steps_of(drawn, offset), [line[name] for line in drawn],
                      label=label or name, linewidth=1)
        axis.set(title=title, yscale=scale)
        if prefix == "kd_":  # CLIP's starts at 0, which would press all else together
            axis.set_ylim(bottom=max(0.01, axis.get_ylim()[0]))
        if axis.lines:  # without distillation there is no teacher to draw
            axis.legend(fontsize=8)
        else:
            axis.text(0.5, 0.5, "none", ha="center", transform=axis.transAxes)
    plot_experts(axes[4], figure, lines, offset)
    plot_held_out(axes[5], folder, offset)
    for axis in axes:
        axis.axvline(offset, color="grey", linewidth=0.5)
        axis.set(xlabel="step (stage 1 | stage 2)")
    save_figure(figure, folder / "curves.png")


def steps_of(lines: list[dict], offset: int) -> list[int]:
    """The steps of lines of the log, those of stage 2 after those of stage 1."""
    return [line["step"] + offset * (line["stage"] - 1) for line in lines]


def plot_experts(axis: Axes, figure: Figure, lines: list[dict], offset: int) -> None:
    """A stripe for each expert, layer under layer: its share of the tokens at each step."""
    drawn = [line for line in lines if "experts" in line]
    axis.set(title="experts' shares of the tokens: a stripe each")
    if not drawn:
        axis.text(0.5, 0.5, "none", ha="center", transform=axis.transAxes)
        return
    layers, count = len(drawn[0]["experts"]), len(drawn[0]["experts"][0])
    shares = [[share for layer in line["experts"] for share in layer] for line in drawn]
    steps = steps_of(drawn, offset)
    width = steps[1] - steps[0] if len(steps) > 1 else 1
    edges = [*steps, steps[-1] + width]
    mesh = axis.pcolormesh(edges, range(layers * count + 1), list(zip(*shares)), vmin=0, vmax=1,
                           cmap="magma")
    for layer in range(1, layers):
        axis.axhline(layer * count, color="white", linewidth=1.5)
    axis.set_yticks([(layer + 0.5) * count for layer in range(layers)],
                    [f"layer {layer + 1}" for layer in range(layers)], fontsize=8)
    axis.invert_yaxis()
    figure.colorbar(mesh, ax=axis)


def plot_held_out(axis: Axes, folder: Path, offset: int) -> None:
    """Held-out accuracy at the points where it was asked, and the whole set's at the end."""
    axis.set(title="held-out accuracy, %", ylim=(0, 100))
    file = folder / "held_out.json"
    points = read_json(file) if file.exists() else []
    if points:
        steps = [point["step"] + offset * (point["stage"] - 1) for point in points]
        axis.plot(steps, [point["accuracy"] for point in points], marker="o")
    else:
        axis.text(0.5, 0.5, "none before the end: result.json", ha="center",
                  transform=axis.transAxes)


def plot_samples(path: Path, rows: list[dict], answers: list[str], get_image: Callable) -> None:
    """Held-out images with question, answer and the model's answer (green right, red wrong)."""
    pictured = [i for i, row in enumerate(rows) if "image" in row["record"]]
    generator = torch.Generator().manual_seed(0)
    order = [pictured[k] for k in torch.randperm(len(pictured), generator=generator).tolist()]
    figure = Figure(figsize=(17.5, 10), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.12)  # titles must not touch other pictures
    axes = figure.subplots(3, 7)
    for axis in axes.flat:
        axis.axis("off")
    for axis, i in zip(axes.flat, order):
        row, given = rows[i], answers[i]
        image = get_image(row["record"]["image"])
        if isinstance(image, dict):
            image = image[max(image)]
        axis.imshow(image.permute(1, 2, 0).numpy())
        color = "green" if normalise(given) == row["answer"] else "red"
        question, truth, given = map(drawable, (row["question"], row["answer"], given))
        title = f"{question[:40]}\n{truth[:25]} | {given[:25]}"
        axis.set_title(title, fontsize=12, pad=5, parse_math=False, color=color)
    figure.suptitle("held-out images: question, true answer | the model's answer (green: right)",
                    fontsize=15)
    save_figure(figure, path)


def drawable(text: str) -> str:
    """A text in one line, a box in place of each character that the plots' font cannot draw."""
    known = known_characters()
    return "".join(c if ord(c) in known else MISSING for c in " ".join(text.split()))


@functools.cache
def known_characters() -> set[int]:
    """The code points that the plots' font can draw."""
    file = font_manager.findfont(font_manager.FontProperties())
    return set(font_manager.get_font(file).get_charmap())


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG atomically. One that a program on Windows holds open stays as it is."""
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, dpi=80, format="png")
    try:
        temporary.replace(path)
    except PermissionError:  # a viewer must not end a run
        temporary.unlink()
        print(f"note: {path}: is open in another program, and was not drawn anew", file=sys.stderr)
