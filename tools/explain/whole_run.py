"""All of a finished run: its VLM, its adapters, its teachers, and the model at its start."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

from data import InputError
from model import Ensemble, MoVEKD
from plumbing import build, finished_run
from plumbing.config import Config
from real.released_checkpoint import released_config
from teachers import Teachers


class WholeRun(NamedTuple):
    """A run as it was trained, and as it was before."""

    c: Config
    tokenizer: object
    model: MoVEKD               # trained
    start: MoVEKD | None        # at step 0, with new adapters; None for the authors' checkpoint
    teachers: Teachers | None   # likewise; without distillation CLIP alone


def load_whole_run(folder: Path, device: str = "auto", weights: str = "") -> WholeRun:
    """Return a run with its adapters, teachers and start; `weights` replaces its --weights."""
    vlm, tokenizer, c = finished_run.load_run(folder, device)
    if isinstance(vlm.student, Ensemble):
        raise InputError(f"{folder}: is the baseline that sees with all encoders; it has no "
                         "student to look into")
    if released_config(folder):
        c.lambda_kd = 0.0
        model = build.build_movekd(c, vlm, Teachers({}))
        return WholeRun(c, tokenizer, model.to(c.device).eval(), None, None)
    names = c.teachers if c.lambda_kd else ("clip",)
    c = dataclasses.replace(c, out=str(folder), teachers=names, weights=weights or c.weights)
    sources = build.weights_of_run(c)
    teachers = build.build_teachers(c, sources).to(c.device)
    model = build.build_movekd(c, vlm, teachers)
    tensors = finished_run.read_run_tensors(folder)
    for name in model.adapters:     # fewer than the run has if it did not distil
        for part in ("adapters", "target_norms"):
            module = getattr(model, part)[name]
            finished_run.fill_module(module, tensors, f"{part}.{name}.", folder)
    # Step 0: the pretrained weights, or the run that it was started from. A real LLM is not loaded
    # twice: the trained one stands in its place.
    start_vlm = build.build_vlm(c, tokenizer, sources, vlm.llm if c.llm else None)
    if c.init_from and not c.llm:
        finished_run.load_vlm(start_vlm, Path(c.init_from))
    elif c.init_from:
        start_vlm.student = finished_run.load_student(c.init_from)[0]
    start = build.build_movekd(c, start_vlm, teachers)
    start.target_norms.load_state_dict(model.target_norms.state_dict())
    return WholeRun(c, tokenizer, model.to(c.device).eval(), start.to(c.device).eval(), teachers)
