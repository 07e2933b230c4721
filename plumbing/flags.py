"""From a command line or a config.json to a checked Config."""

import argparse
import dataclasses
import typing
from pathlib import Path
from typing import Literal

import timm

from data import read_json
from plumbing.cli import InputError, Parser
from plumbing.config import (ENCODERS, MACHINE, PRESETS, RECIPE_NAMES, RENAMED, Config, recipe)
from plumbing.encoder_weights import is_real
from plumbing.released_checkpoint import released_config
from teachers import parse_spec


def flag(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


def add_field(parser: Parser, field: dataclasses.Field) -> None:
    """Make a flag of a field of Config."""
    options = {"type": field.type}
    if typing.get_origin(field.type) is Literal:
        options = {"choices": typing.get_args(field.type)}
    elif typing.get_origin(field.type) is tuple:
        options = {"type": str, "nargs": "+"}
    elif field.type is bool:
        options = {"action": argparse.BooleanOptionalAction}
    parser.add_argument(flag(field.name), default=argparse.SUPPRESS,
                        help=f"default {field.default!r}", **options)


def parse_config(argv: list[str] | None, description: str = "") -> Config:
    """The Config of a new run. Raises InputError for an unknown flag or a value that cannot be."""
    return parse_flags(argv, description)[0]


def parse_flags(argv: list[str] | None, description: str = "") -> tuple[Config, bool]:
    """The Config, and whether the run goes on from a checkpoint."""
    parser = Parser(description)
    start = parser.add_mutually_exclusive_group(required=True)
    for name, text in (("tiny", "laptop CPU, no download"),
                       ("small", "real encoders and LLM of middle size"),
                       ("full", "the real encoders and LLM on GPUs")):
        start.add_argument(f"--{name}", dest="preset", action="store_const", const=name, help=text)
    start.add_argument("--config", metavar="FILE", help="the config.json of an earlier run")
    start.add_argument("--resume", metavar="RUN", help="a run folder, to go on from its last "
                       f"checkpoint; with {', '.join(map(flag, MACHINE))} only")
    parser.add_argument("--recipe", choices=RECIPE_NAMES,
                        help="rows 1-9 of docs/differences.md as in the paper, or as released")
    for field in dataclasses.fields(Config):
        add_field(parser, field)

    flags = vars(parser.parse_args(argv))
    preset, file, run, name = (flags.pop(key) for key in ("preset", "config", "resume", "recipe"))
    if run:
        fixed = [flag(key) for key in flags if key not in MACHINE]
        if name:
            fixed.insert(0, "--recipe")
        if fixed:
            raise InputError(f"{fixed[0]}: a resumed run keeps what its config.json says; give "
                             f"--resume with {', '.join(map(flag, MACHINE))} only")
        c = dataclasses.replace(load_config(Path(run) / "config.json"), **{"out": run, **flags})
    else:
        base = load_config(Path(file)) if file else PRESETS[preset]
        rows = recipe(name) if name else {}
        c = dataclasses.replace(base, **{**rows, **flags})
    c.teachers = tuple(c.teachers)  # argparse gives a list
    if c.init_from and not run:
        c = with_init(c)
    check_config(c)
    return c, bool(run)


def with_init(c: Config) -> Config:
    """A checkpoint to start from decides the student's shape and experts, and the LLM."""
    folder = Path(c.init_from)
    released = released_config(folder)
    if released:
        return dataclasses.replace(c, llm=str(folder), mole_form="fc1_fc2", **released[0])
    theirs = load_config(folder / "config.json")
    names = ("clip", "mole_experts", "mole_rank", "mole_alpha", "mole_form", "llm", "lm_dim",
             "lm_depth", "lm_heads", "lm_hidden")
    return dataclasses.replace(c, **{name: getattr(theirs, name) for name in names})


def load_config(path: Path) -> Config:
    """The Config of a JSON file; a missing key has TINY's value.

    Raises InputError for a key that Config lacks.
    """
    values = read_json(path)
    if not isinstance(values, dict):
        raise InputError(f"{path}: is not a JSON object")
    values = {RENAMED.get(key, key): value for key, value in values.items()}
    known = {field.name for field in dataclasses.fields(Config)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise InputError(f"{path}: unknown key {unknown[0]!r}; a config has the keys of Config in "
                         "plumbing/config.py")
    c = Config(**values)
    c.teachers = tuple(c.teachers)  # JSON has lists only
    return c


# ------------------------------------------------------------------------------------------------
# Checks


def check_config(c: Config) -> None:
    """Raise InputError, which names the flag and the remedy, for what cannot run."""
    unique = len(set(c.teachers)) == len(c.teachers)
    if c.teachers[0] != "clip" or not set(c.teachers) <= set(ENCODERS) or not unique:
        raise InputError(f"--teachers {' '.join(c.teachers)}: must start with clip and be among "
                         f"{' '.join(ENCODERS)}, each once")
    check_data_flags(c)
    for name in ENCODERS:
        check_spec(name, getattr(c, name))
    for name in c.teachers:
        if name not in ("clip", "eva", "convnext") and not is_real(getattr(c, name)):
            raise InputError(f"--{name} {getattr(c, name)}: stage 0 makes no such model of the "
                             "tiny world; name one with real weights")
    if c.student in ("frozen", "ensemble") and (c.lambda_kd or c.mole_experts):
        raise InputError(f"--student {c.student}: nothing is distilled and no expert trained; add "
                         "--lambda-kd 0 --mole-experts 0")
    if c.student == "experts" and not c.mole_experts:
        raise InputError("--student experts: there is none; give --mole-experts at least 1")
    if not 0 <= c.clip_share <= 1:
        raise InputError(f"--clip-share {c.clip_share}: CLIP's share of the teacher weights must "
                         "be between 0 and 1")
    for name in ("n_pretrain", "n_train", "n_eval", "stage1_batch", "stage2_batch", "log_every",
                 "eval_batch", "mole_rank", "max_new_tokens", "group_batches", "keep"):
        if getattr(c, name) < 1:
            raise InputError(f"{flag(name)} {getattr(c, name)}: must be at least 1")


def check_data_flags(c: Config) -> None:
    """Raise InputError for flags of data that do not go together."""
    if c.data and c.data_root:
        raise InputError("--data and --data-root: name one of them")
    if not c.data_root and bool(c.data) != bool(c.eval_data):
        raise InputError("--data and --eval-data go together: name a training and a held-out set")
    if c.eval_data and c.data_root and not c.image_folder:
        raise InputError("--eval-data with --data-root needs --image-folder, the folder its images "
                         "are relative to")
    if c.cache_teachers and c.student != "ensemble" and c.skip_bad:
        raise InputError("--skip-bad: the teachers' cache reads every image beforehand; add "
                         "--cache-teachers ''")
    if c.pretrain_data and not c.data:
        raise InputError("--pretrain-data needs --data and --eval-data")


def check_spec(name: str, spec: str) -> None:
    """Raise InputError for an encoder that timm does not know."""
    try:
        model, *_ = parse_spec(spec)
    except (ValueError, KeyError, SyntaxError):
        raise InputError(f"--{name} {spec!r}: must read 'TIMM_NAME img_size=PIXELS key=value "
                         "...'") from None
    if not timm.is_model(model):
        raise InputError(f"--{name} {model}: timm has no such model; timm.list_models() names them")
