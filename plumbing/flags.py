"""From a command line or a config.json to a checked Config."""

import argparse
import dataclasses
from pathlib import Path
from typing import Literal, get_args, get_origin

from data import InputError
from plumbing import config
from plumbing.checks import check_config, check_value
from plumbing.cli import Parser
from plumbing.config import EVALUATION, RESUME, Config, flag, is_real, plain_type
from plumbing.files import read_json


def parse_config(argv: list[str] | None, description: str = "") -> Config:
    """Return the Config of a new run. Raises InputError for an unknown flag or a bad value."""
    return parse_flags(argv, description)[0]


def parse_flags(argv: list[str] | None, description: str = "") -> tuple[Config, str, Path | None]:
    """Return the Config, the mode ("train", "resume" or "evaluate") and the run of the last two."""
    parser = Parser(description)
    start = parser.add_mutually_exclusive_group(required=True)
    for name, text in (("tiny", "laptop CPU, no download"),
                       ("small", "real encoders and LLM of middle size"),
                       ("full", "the real encoders and LLM on GPUs")):
        start.add_argument(f"--{name}", dest="preset", action="store_const", const=name, help=text)
    start.add_argument("--config", metavar="FILE", help="the config.json of an earlier run")
    start.add_argument("--resume", metavar="RUN", help="a run folder, to go on from its last "
                       f"checkpoint; with {', '.join(map(flag, RESUME))} only")
    start.add_argument("--evaluate", metavar="RUN", help="a run folder, to evaluate it; with "
                       f"{', '.join(map(flag, EVALUATION))} only")
    parser.add_argument("--recipe", choices=config.RECIPE_NAMES, default=argparse.SUPPRESS,
                        help="all of the method as in the paper (default), released, or ours")
    for field in dataclasses.fields(Config):
        kind = plain_type(field)
        options = {"type": kind}
        if get_origin(kind) is Literal:  # check_value looks at it, as at a config.json's
            options = {"metavar": "{" + ",".join(get_args(kind)) + "}"}
        elif kind is tuple:
            options = {"type": str, "nargs": "+"}
        elif kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(flag(field.name), default=argparse.SUPPRESS,
                            help=f"default {field.default!r}", **options)

    flags = vars(parser.parse_args(argv))
    for name, value in flags.items():
        flags[name] = tuple(value) if isinstance(value, list) else value
    preset, file = flags.pop("preset"), flags.pop("config")
    runs = {mode: flags.pop(mode) for mode in ("resume", "evaluate")}
    for mode, may_change in (("resume", RESUME), ("evaluate", EVALUATION)):
        if runs[mode]:
            run = Path(runs[mode])
            return of_a_run(run, mode, may_change, flags), mode, run
    base = load_config(Path(file)) if file else config.PRESETS[preset]
    rows = config.recipe(flags.pop("recipe")) if "recipe" in flags else {}
    c = dataclasses.replace(base, **{**rows, **flags})
    if c.init_from:
        c = with_init(c)
    check_config(c)
    return c, "train", None


def of_a_run(run: Path, mode: str, may_change: tuple, flags: dict) -> Config:
    """Return the Config of a run that is resumed or evaluated, changed by the few flags allowed."""
    fixed = [flag(key) for key in flags if key not in may_change]
    if fixed:
        raise InputError(f"{fixed[0]}: with --{mode} a run keeps what its config.json says; only "
                         f"{', '.join(map(flag, may_change))} may be given")
    base = load_config(run / "config.json") if mode == "resume" else config_to_use(run)[0]
    c = dataclasses.replace(base, **{"out": str(run), **flags})
    check_config(c, trains=mode != "evaluate")
    return c


def config_to_use(folder: Path) -> tuple[Config, tuple | None]:
    """Return the Config of a run, or of a LLaVA checkpoint and its `released_config`."""
    from real.released_checkpoint import released_config
    released = released_config(folder)
    if not released:
        return load_config(folder / "config.json"), None
    # Without CLIP in it, CLIP's file must lie in the folder.
    fields = {**config.recipe("released"), "mole_experts": 0, "teachers": ("clip",),
              "weights": str(folder), **released[0]}
    return dataclasses.replace(config.FULL, device="auto", llm=str(folder), **fields), released


def with_init(c: Config) -> Config:
    """Take the student's shape and experts, and the LLM, from the checkpoint to start from."""
    from real.released_checkpoint import released_config
    folder = Path(c.init_from)
    released = released_config(folder)
    if released:
        # the name of a real CLIP says what the CLIP teacher is
        fields = {**released[0], "clip": c.clip} if is_real(c.clip) else released[0]
        return dataclasses.replace(c, llm=str(folder), **fields)
    theirs = load_config(folder / "config.json")
    names = ("clip", "mole_experts", "mole_rank", "mole_alpha", "mole_form", "llm", "lm_dim",
             "lm_depth", "lm_heads", "lm_hidden")
    return dataclasses.replace(c, **{name: getattr(theirs, name) for name in names})


def load_config(path: Path) -> Config:
    """Read a Config from JSON; a missing key has TINY's value. A wrong one raises InputError."""
    values = read_json(path)
    if not isinstance(values, dict):
        raise InputError(f"{path}: is not a JSON object")
    fields = {field.name: field for field in dataclasses.fields(Config)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise InputError(f"{path}: unknown key {unknown[0]!r}; a config has the keys of Config in "
                         "plumbing/config.py")
    for name, value in values.items():
        if plain_type(fields[name]) is tuple and isinstance(value, list):
            values[name] = value = tuple(value)     # JSON has lists only
        check_value(f"{path}: {name}", fields[name], value)
    return Config(**values)
