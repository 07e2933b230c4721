"""The pictures of a run: its curves and its held-out samples."""

import json
from pathlib import Path

import torch
from matplotlib.figure import Figure

from data import normalise


def plot_curves(folder: Path) -> None:
    """curves.png from log.jsonl: the loss terms and each teacher's own loss, both stages end to end."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(11, 3.6), layout="tight")
    axes = figure.subplots(1, 2)
    offset = max((line["step"] + 1 for line in lines if line["stage"] == 1), default=0)
    for axis, prefix in zip(axes, ("L_", "kd_")):
        for name in dict.fromkeys(k for line in lines for k in line if k.startswith(prefix)):
            points = [(line["step"] + offset * (line["stage"] - 1), line[name]) for line in lines if name in line]
            axis.plot(*zip(*points), label=name.replace("kd_", "L_kd, "), linewidth=1)
        axis.axvline(offset, color="grey", linewidth=0.5)
        axis.set(xlabel="step (stage 1 | stage 2)", yscale="log")
        if axis.lines[1:]:  # without distillation there is no teacher to draw
            axis.legend(fontsize=8)
    save_figure(figure, folder / "curves.png")


def plot_samples(path: Path, rows: list[dict], answers: list[str], get_image) -> None:
    """samples.png: held-out images with question, answer and the model's answer (green right, red wrong)."""
    with_image = [i for i, row in enumerate(rows) if "image" in row["record"]]
    order = torch.randperm(len(with_image), generator=torch.Generator().manual_seed(0)).tolist()
    figure = Figure(figsize=(15, 7.5), layout="tight")
    axes = figure.subplots(3, 7)
    for axis in axes.flat:
        axis.axis("off")
    for axis, i in zip(axes.flat, (with_image[k] for k in order)):
        axis.imshow(get_image(rows[i]["record"]["image"]).permute(1, 2, 0).numpy())
        good = normalise(answers[i]) == rows[i]["answer"]
        axis.set_title(f"{rows[i]['question'][:40]}\n{rows[i]['answer'][:25]} | {answers[i][:25]}", fontsize=9, parse_math=False,
                       color="green" if good else "red")
    figure.suptitle("held-out images: question, answer | the model's answer")
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, dpi=80, format="png")
    temporary.rename(path)
