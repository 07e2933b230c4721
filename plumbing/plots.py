"""The pictures of a run: its curves and its held-out samples."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure

from plumbing.evaluate import normalise


def plot_curves(folder: Path) -> None:
    """curves.png from log.jsonl: the loss terms and each teacher's own loss, both stages."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(11, 3.6), layout="tight")
    offset = max((line["step"] + 1 for line in lines if line["stage"] == 1), default=0)
    for axis, prefix in zip(figure.subplots(1, 2), ("L_", "kd_")):
        names = [key for line in lines for key in line if key.startswith(prefix)]
        for name in dict.fromkeys(names):
            drawn = [line for line in lines if name in line]
            steps = [line["step"] + offset * (line["stage"] - 1) for line in drawn]
            label = name.replace("kd_", "L_kd, ")
            axis.plot(steps, [line[name] for line in drawn], label=label, linewidth=1)
        axis.axvline(offset, color="grey", linewidth=0.5)
        axis.set(xlabel="step (stage 1 | stage 2)", yscale="log")
        if axis.lines[1:]:  # without distillation there is no teacher to draw
            axis.legend(fontsize=8)
    save_figure(figure, folder / "curves.png")


def plot_samples(path: Path, rows: list[dict], answers: list[str], get_image: Callable) -> None:
    """Held-out images with question, answer and the model's answer (green right, red wrong)."""
    pictured = [i for i, row in enumerate(rows) if "image" in row["record"]]
    generator = torch.Generator().manual_seed(0)
    order = [pictured[k] for k in torch.randperm(len(pictured), generator=generator).tolist()]
    figure = Figure(figsize=(15, 8.6), layout="constrained")
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
        title = f"{row['question'][:40]}\n{row['answer'][:25]} | {given[:25]}"
        axis.set_title(title, fontsize=10, pad=5, parse_math=False, color=color)
    figure.suptitle("held-out images: question, answer | the model's answer")
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG atomically."""
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, dpi=80, format="png")
    temporary.rename(path)
