"""From a command line or a config.json to a checked Config."""

import argparse
import dataclasses
import inspect
import textwrap
from pathlib import Path
from typing import Literal, get_args

from data import InputError
from plumbing import config
from plumbing.checks import check_config, check_value
from plumbing.cli import Parser
from plumbing.config import EVALUATION, FIELDS, PRESETS, RESUME, Config, flag, is_real, plain_type
from plumbing.files import read_json

MODES = {"resume": RESUME, "evaluate": EVALUATION}  # and what each may change of a run


def parse_config(argv: list[str] | None, description: str = "") -> Config:
    """Return the Config of a new run. Raises InputError for an unknown flag or a bad value."""
    return parse_flags(argv, description)[0]


def parse_flags(argv: list[str] | None, description: str = "") -> tuple[Config, str, Path | None]:
    """Return the Config, the mode ("train", "resume" or "evaluate") and the run of the last two."""
    parser = Parser(description, epilog=fields_help(), argument_default=argparse.SUPPRESS,
                    usage="%(prog)s PRESET [--recipe NAME] [--out FOLDER] [flags, see below]")
    start = parser.add_mutually_exclusive_group(required=True)
    for name, text in (("tiny", "laptop CPU: stand-in encoders and LLM, no download"),
                       ("small", "one consumer GPU: encoders and LLM of middle size"),
                       ("full", "large GPUs: the paper's encoders, LLM and numbers")):
        start.add_argument(f"--{name}", dest="preset", action="store_const", const=name, help=text)
    start.add_argument("--config", metavar="FILE", help="the config.json of an earlier run")
    start.add_argument("--resume", metavar="RUN", help="go on from a run's last checkpoint")
    start.add_argument("--evaluate", metavar="RUN", help="evaluate a run again, or on --eval-data")
    parser.add_argument("--recipe", choices=config.RECIPE_NAMES, metavar="NAME",
                        help="paper (default), released, ours: RECIPES, plumbing/config.py")
    kinds = {bool: {"action": argparse.BooleanOptionalAction}, tuple: {"nargs": "+"}, Literal: {}}
    for name, field in FIELDS.items():
        options = kinds.get(plain_type(field), {"type": plain_type(field)})
        parser.add_argument(flag(name), help=argparse.SUPPRESS, **options)

    flags = vars(parser.parse_args(argv))
    for name, value in flags.items():
        flags[name] = tuple(value) if isinstance(value, list) else value
    for mode in MODES:
        if mode in flags:
            run = Path(flags.pop(mode))
            return of_a_run(run, mode, flags), mode, run
    file = flags.pop("config", None)
    c = load_config(Path(file)) if file else PRESETS[flags.pop("preset")]
    if "recipe" in flags:
        c = dataclasses.replace(c, **config.recipe(flags.pop("recipe"), c))
    c = dataclasses.replace(c, **flags)
    if c.init_from:
        c = with_init(c)
    check_config(c)
    return c, "train", None


def fields_help() -> str:
    """Return Config's fields for --help: their comments in its source, their values in PRESETS."""
    lines = []
    for line in inspect.getsource(Config).splitlines():
        code, _, text = line.partition("  # ")
        name = code.split(":")[0].strip()
        if name not in FIELDS:
            lines.append(text.replace("---", "\n---"))
            continue
        # of an encoder only timm's name; one value where all presets have the same
        values = [str(getattr(c, name)).split(" img")[0] or '""' for c in PRESETS.values()]
        shown = [" | ".join(values if len(set(values)) > 1 else values[:1])]
        if plain_type(FIELDS[name]) is Literal:
            shown += [choice for choice in get_args(FIELDS[name].type) if choice not in values]
        marks = " R" * (name in RESUME) + " E" * (name in EVALUATION)
        line = f"  {flag(name):21} {text.strip()} [{', '.join(shown)}]{marks}"
        lines += textwrap.wrap(line, 100, subsequent_indent="    ")
    return "\n".join(filter(None, lines))


def of_a_run(run: Path, mode: str, flags: dict) -> Config:
    """Return the Config of a run that is resumed or evaluated, changed by the few flags allowed."""
    fixed = [flag(key) for key in flags if key not in MODES[mode]]
    if fixed:
        raise InputError(f"{fixed[0]}: with --{mode} a run keeps what its config.json says; only "
                         f"{', '.join(map(flag, MODES[mode]))} may be given")
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
    fields = {**config.recipe("released", config.FULL), "mole_experts": 0, "teachers": ("clip",),
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
    unknown = sorted(set(values) - set(FIELDS))
    if unknown:
        raise InputError(f"{path}: unknown key {unknown[0]!r}; a config has the keys of Config in "
                         "plumbing/config.py")
    for name, value in values.items():
        if plain_type(FIELDS[name]) is tuple and isinstance(value, list):
            values[name] = value = tuple(value)     # JSON has lists only
        check_value(f"{path}: {name}", FIELDS[name], value)
    return Config(**values)
