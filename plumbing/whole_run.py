"""All of a finished run: its VLM, the encoder adapters, the teachers, and the model at its start.

`finished_run.load_run` gives the VLM alone, which is all that answers questions.
"""

import dataclasses
from pathlib import Path
from typing import NamedTuple

from model import VLM, Ensemble, MoVEKD
from plumbing.build import (build_movekd, build_teachers, build_vlm, load_sets, load_student,
                            pretrained_weights)
from plumbing.cli import InputError
from plumbing.config import Config
from plumbing.released_checkpoint import released_config
from plumbing.finished_run import load_run, load_vlm
from plumbing.run_weights import fill_module, read_run_tensors, tensors_below
from teachers import Teachers


class WholeRun(NamedTuple):
    """A run as it was trained, and as it was before.

    The authors' checkpoint holds neither teachers nor what it started from: both are None then. A
    run without distillation has CLIP as its only teacher.
    """

    c: Config
    tokenizer: object
    model: MoVEKD               # trained
    start: MoVEKD | None        # as training found it: CLIP, and adapters that are new
    teachers: Teachers | None


def load_whole_run(folder: Path, device: str = "auto", weights: str = "") -> WholeRun:
    """A run with its adapters. `weights`: a folder of the encoders' files, in place of the run's.

    Stage 0 makes its models again if they are gone. Raises InputError.
    """
    vlm, tokenizer, c = load_run(folder, device)
    if isinstance(vlm.student, Ensemble):
        raise InputError(f"{folder}: is the baseline that sees with all encoders; it has no "
                         "student to look into")
    if released_config(folder):
        c.lambda_kd = 0.0
        model = build_movekd(c, vlm, Teachers({}))
        return WholeRun(c, tokenizer, model.to(c.device).eval(), None, None)
    names = c.teachers if c.lambda_kd else ("clip",)
    c = dataclasses.replace(c, teachers=names, weights=weights or c.weights)
    records = [] if c.llm else load_sets(c)["train"][0]
    sources, _ = pretrained_weights(c, records, tokenizer)
    teachers = build_teachers(c, sources).to(c.device)
    model = load_adapters(build_movekd(c, vlm, teachers), folder)
    start = build_movekd(c, start_vlm(c, tokenizer, sources, vlm), teachers)
    start.target_norms.load_state_dict(model.target_norms.state_dict())
    return WholeRun(c, tokenizer, model.to(c.device).eval(), start.to(c.device).eval(), teachers)


def load_adapters(model: MoVEKD, folder: Path) -> MoVEKD:
    """Fill the encoder adapters, and the statistics of their targets, from a run of ours."""
    tensors = read_run_tensors(folder)
    for part in ("adapters", "target_norms"):
        module = getattr(model, part)
        weights = {}
        for name in module:
            for key, tensor in tensors_below(tensors, f"{part}.{name}.").items():
                weights[f"{name}.{key}"] = tensor
        fill_module(module, weights, folder)
    return model


def start_vlm(c: Config, tokenizer, sources: dict, trained: VLM) -> VLM:
    """The VLM at step 0: the pretrained weights, or the run that it was started from.

    A real LLM is not loaded twice: the trained one stands in its place.
    """
    llm = trained.llm if c.llm else None
    vlm = build_vlm(c, tokenizer, sources, llm)
    if c.init_from and not c.llm:
        load_vlm(vlm, Path(c.init_from))
    elif c.init_from:
        vlm.student = load_student(c.init_from)[0]
    return vlm
