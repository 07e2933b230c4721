"""From a command line or a config.json to a checked Config."""

import argparse
import dataclasses
import typing
from pathlib import Path
from typing import Annotated, Literal

import timm
import torch

from data import read_json
from plumbing.cli import InputError, Parser
from plumbing.config import (ENCODERS, EVALUATION, MACHINE, PRESETS, RECIPE_NAMES, RENAMED,
                             Config, recipe)
from plumbing.encoder_weights import is_real
from plumbing.released_checkpoint import released_config
from teachers import ClipEncoder, VisionEncoder, parse_spec


def flag(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


def plain_type(field: dataclasses.Field):
    """str, bool, int, float, tuple or a Literal: the type of a field without its range."""
    if typing.get_origin(field.type) is tuple:
        return tuple
    if typing.get_origin(field.type) is Annotated:
        return typing.get_args(field.type)[0]
    return field.type


def add_field(parser: Parser, field: dataclasses.Field) -> None:
    """Make a flag of a field of Config."""
    kind = plain_type(field)
    options = {"type": kind}
    if typing.get_origin(kind) is Literal:  # check_value looks at it, as at a config.json's
        options = {"metavar": "{" + ",".join(typing.get_args(kind)) + "}"}
    elif kind is tuple:
        options = {"type": str, "nargs": "+"}
    elif kind is bool:
        options = {"action": argparse.BooleanOptionalAction}
    parser.add_argument(flag(field.name), default=argparse.SUPPRESS,
                        help=f"default {field.default!r}", **options)


def parse_config(argv: list[str] | None, description: str = "") -> Config:
    """The Config of a new run. Raises InputError for an unknown flag or a value that cannot be."""
    return parse_flags(argv, description)[0]


def parse_flags(argv: list[str] | None, description: str = "") -> tuple[Config, str]:
    """The Config, and what is to be done: "train", "resume" or "evaluate"."""
    parser = Parser(description)
    start = parser.add_mutually_exclusive_group(required=True)
    for name, text in (("tiny", "laptop CPU, no download"),
                       ("small", "real encoders and LLM of middle size"),
                       ("full", "the real encoders and LLM on GPUs")):
        start.add_argument(f"--{name}", dest="preset", action="store_const", const=name, help=text)
    start.add_argument("--config", metavar="FILE", help="the config.json of an earlier run")
    start.add_argument("--resume", metavar="RUN", help="a run folder, to go on from its last "
                       f"checkpoint; with {', '.join(map(flag, MACHINE))} only")
    start.add_argument("--evaluate", metavar="RUN", help="a run folder, to evaluate it; with "
                       f"{', '.join(map(flag, EVALUATION))} only")
    parser.add_argument("--recipe", choices=RECIPE_NAMES,
                        help="rows 1-9 of docs/differences.md as in the paper, or as released")
    for field in dataclasses.fields(Config):
        add_field(parser, field)

    flags = vars(parser.parse_args(argv))
    starts = {key: flags.pop(key) for key in ("resume", "evaluate")}
    preset, file, name = (flags.pop(key) for key in ("preset", "config", "recipe"))
    for mode, may_change in (("resume", MACHINE), ("evaluate", EVALUATION)):
        if starts[mode]:
            return of_a_run(Path(starts[mode]), mode, may_change, flags, name), mode
    base = load_config(Path(file)) if file else PRESETS[preset]
    rows = recipe(name) if name else {}
    c = dataclasses.replace(base, **{**rows, **flags})
    c.teachers = tuple(c.teachers)  # argparse gives a list
    if c.init_from:
        c = with_init(c)
    check_config(c)
    return c, "train"


def of_a_run(run: Path, mode: str, may_change: tuple, flags: dict, recipe_name: str | None
             ) -> Config:
    """The Config of a run that is resumed or evaluated, with the few flags that may change it."""
    fixed = [flag(key) for key in flags if key not in may_change]
    if recipe_name:
        fixed.insert(0, "--recipe")
    if fixed:
        raise InputError(f"{fixed[0]}: with --{mode} a run keeps what its config.json says; only "
                         f"{', '.join(map(flag, may_change))} may be given")
    c = dataclasses.replace(load_config(run / "config.json"), **{"out": str(run), **flags})
    check_config(c, trains=mode != "evaluate")
    return c


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
    if isinstance(values.get("teachers"), list):
        values["teachers"] = tuple(values["teachers"])  # JSON has lists only
    for field in dataclasses.fields(Config):
        if field.name in values:
            check_value(f"{path}: {field.name}", field, values[field.name])
    return Config(**values)


# ------------------------------------------------------------------------------------------------
# Checks


def check_value(name: str, field: dataclasses.Field, value) -> None:
    """Raise InputError if a value is not of its field's type or not in its range.

    `name` is what the line calls it: the flag, or the file and the key.
    """
    kind = plain_type(field)
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value not in choices or not isinstance(value, str):
            raise InputError(f"{name} {value!r}: must be one of {', '.join(choices)}")
        return
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        wanted = {tuple: "a list of names", str: "a text", bool: "true or false",
                  int: "a whole number", float: "a number"}[kind]
        raise InputError(f"{name} {value!r}: must be {wanted}")
    if kind is tuple and not (value and all(isinstance(item, str) for item in value)):
        raise InputError(f"{name} {value!r}: must be a list of at least one name")
    if typing.get_origin(field.type) is Annotated:
        low, high = field.type.__metadata__[0]
        if not low <= value <= high:  # nan is in no range
            raise InputError(f"{name} {value}: must be between {low:,} and {high:,}")


def check_config(c: Config, trains: bool = True) -> None:
    """Raise InputError, which names the flag and the remedy, for what cannot run.

    An evaluation (not `trains`) needs no training set beside its held-out one.
    """
    for field in dataclasses.fields(Config):
        check_value(flag(field.name), field, getattr(c, field.name))
    unique = len(set(c.teachers)) == len(c.teachers)
    if c.teachers[0] != "clip" or not set(c.teachers) <= set(ENCODERS) or not unique:
        raise InputError(f"--teachers {' '.join(c.teachers)}: must start with clip and be among "
                         f"{' '.join(ENCODERS)}, each once")
    check_data_flags(c, trains)
    for name in ENCODERS:
        check_spec(name, getattr(c, name))
    for name in c.teachers:
        if name not in ("clip", "eva", "convnext") and not is_real(getattr(c, name)):
            raise InputError(f"--{name} {getattr(c, name)}: stage 0 makes no such model of the "
                             "tiny world; name one with real weights")
        check_encoder(name, getattr(c, name))
    if c.student in ("frozen", "ensemble") and (c.lambda_kd or c.mole_experts):
        raise InputError(f"--student {c.student}: nothing is distilled and no expert trained; add "
                         "--lambda-kd 0 --mole-experts 0")
    if c.student == "experts" and not c.mole_experts:
        raise InputError("--student experts: there is none; give --mole-experts at least 1")
    if not c.llm and c.lm_dim % (2 * c.lm_heads):
        raise InputError(f"--lm-heads {c.lm_heads}: --lm-dim {c.lm_dim} must be a multiple of "
                         "twice the heads, for the rotary position embedding turns pairs")
    if not c.stage1_epochs and not c.stage2_epochs:
        raise InputError("--stage1-epochs 0 and --stage2-epochs 0: one of the stages must be run")


def check_data_flags(c: Config, trains: bool) -> None:
    """Raise InputError for flags of data that do not go together."""
    if c.data and c.data_root:
        raise InputError("--data and --data-root: name one of them")
    if trains and not c.data_root and bool(c.data) != bool(c.eval_data):
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


def check_encoder(name: str, spec: str) -> None:
    """Raise InputError for an encoder that cannot serve. It is built without its numbers."""
    kind = ClipEncoder if name == "clip" else VisionEncoder
    try:
        with torch.device("meta"):
            encoder = kind(spec)
            image = torch.empty(1, 3, encoder.image_size, encoder.image_size)
            features = encoder.net.forward_features(image)      # (1, prefix + n_i, d_i) or a map
    except Exception as e:  # whatever timm makes of arguments that do not go together
        fault = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise InputError(f"--{name} {spec!r}: cannot be built: {fault[:200]}") from None
    net = encoder.net
    if name == "clip" and getattr(net, "cls_token", None) is None:
        raise InputError(f"--clip {spec!r}: has no [CLS] token, whose attention weighs the tokens; "
                         "name a CLIP ViT")
    if hasattr(net, "patch_embed"):
        stride = net.patch_embed.patch_size[0]
    else:
        stride = net.feature_info[-1]["reduction"]
    if encoder.image_size % stride:
        raise InputError(f"--{name} {spec!r}: img_size {encoder.image_size} is no multiple of "
                         f"{stride}, the pixels of a token: a rim would not be seen")
    if features.ndim == 4:
        grid = features.shape[2:]
    else:
        side = round((features.shape[1] - net.num_prefix_tokens) ** 0.5)
        grid = (side, side)
    tokens = features.shape[1] - net.num_prefix_tokens if features.ndim == 3 else grid.numel()
    if grid[0] != grid[1] or grid[0] ** 2 != tokens or tokens != encoder.num_tokens:
        raise InputError(f"--{name} {spec!r}: its {tokens} tokens are no square grid")
