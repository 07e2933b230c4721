"""What cannot run is refused before any work: one line, which names the flag and the remedy."""

import dataclasses
import importlib.util
import os
import shutil
import typing
from pathlib import Path
from typing import Annotated, Literal

import timm
import torch

from data import InputError, conversation_ids, row_name
from plumbing.build import stage0_encoders
from plumbing.config import ENCODERS, STAND_INS, Config, flag, is_real, plain_type
from plumbing.launcher import launched, wanted_processes
from plumbing.sets import PREFETCH, image_bytes, llava_layout, training_size
from teachers import ClipEncoder, VisionEncoder, parse_spec

SHARED_MEMORY = Path("/dev/shm")

# ------------------------------------------------------------------------------------------------
# A Config by itself


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
    check_encoders(c)
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


def check_encoders(c: Config) -> None:
    """Raise InputError for an encoder that timm does not know, or that cannot serve."""
    for name in ENCODERS:
        spec = getattr(c, name)
        try:
            model, *_ = parse_spec(spec)
        except (ValueError, KeyError, SyntaxError):
            raise InputError(f"--{name} {spec!r}: must read 'TIMM_NAME img_size=PIXELS key=value "
                             "...'") from None
        if not timm.is_model(model):
            raise InputError(f"--{name} {model}: timm has no such model; timm.list_models() names "
                             "them")
    for name in c.teachers:
        spec = getattr(c, name)
        if name not in STAND_INS and not is_real(spec):
            raise InputError(f"--{name} {spec}: stage 0 makes no such model of the tiny world; "
                             "name one with real weights")
        check_encoder(name, spec)


def check_encoder(name: str, spec: str) -> None:
    """Raise InputError for an encoder that cannot serve. It is built without numbers, and run."""
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
    if features.ndim == 4:
        tokens = features.shape[2] * features.shape[3]
    else:
        tokens = features.shape[1] - net.num_prefix_tokens
    if encoder.image_size % stride:
        raise InputError(f"--{name} {spec!r}: img_size {encoder.image_size} is no multiple of "
                         f"{stride}, the pixels of a token: a rim would not be seen")
    if (encoder.image_size // stride) ** 2 != tokens or tokens != encoder.num_tokens:
        raise InputError(f"--{name} {spec!r}: its {tokens} tokens are no square grid")


# ------------------------------------------------------------------------------------------------
# A Config on this machine


def find_device(device: str) -> str:
    """Return cuda, mps (Apple's GPU) or cpu; for "auto" the first of them that is here."""
    if device != "auto":
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_machine(c: Config, trains: bool) -> None:
    """Raise InputError for data, packages or devices that are not there, before any work.

    Call it once, before processes are started. An evaluation (not `trains`) needs less.
    """
    if c.data_root:
        llava_layout(Path(c.data_root))
    elif not c.data and is_real(c.clip):
        raise InputError("a real CLIP and no data: name --data-root DIR for LLaVA's sets, or "
                         "--data FILE and --eval-data FILE")
    if c.stage0_pictures == "data" and not (c.data and stage0_encoders(c)):
        raise InputError("--stage0-pictures data: trains the toy encoders of --tiny on the "
                         "pictures of --data FILE --eval-data FILE; name them, or leave the flag "
                         "out")
    if c.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise InputError(f"--tensorboard {c.tensorboard}: the package is not installed; pip "
                         "install tensorboard, or leave the flag out: curves.png has the same")
    if c.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no GPU here; --device cpu runs the same, "
                         "slowly, and `python -m tools.plan` says what GPUs it wants")
    if c.device == "mps" and not torch.backends.mps.is_available():
        raise InputError("--device mps: torch finds no Apple GPU here; --device auto takes what "
                         "there is")
    if trains and c.device == "mps" and c.precision == "bf16":
        raise InputError("--device mps: trains in fp32 only; add --precision fp32, or --device cpu")
    if trains and c.device == "mps" and (launched() or wanted_processes(c) > 1):
        raise InputError("--device mps: one process has the GPU; leave --processes out, or give "
                         "--device cpu")
    if trains:
        check_shared_memory(c)


def check_shared_memory(c: Config) -> None:
    """Raise InputError if the workers' batches do not fit in shared memory. Docker gives 64 MB.

    A worker would be killed in the middle of the run.
    """
    if not c.workers or not SHARED_MEMORY.is_dir():
        return
    samples = c.micro_batch or max(c.stage1_batch, c.stage2_batch)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", wanted_processes(c)))
    wanted = processes * c.workers * PREFETCH * samples * image_bytes(training_size(c))
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < wanted:
        raise InputError(
            f"{SHARED_MEMORY}: has {free / 1e6:,.0f} MB free, and {processes} x --workers "
            f"{c.workers} want {wanted / 1e6:,.0f} MB; in Docker start the container with "
            f"--shm-size={1 + wanted // 10 ** 9}g or --ipc=host, or give fewer --workers")


# ------------------------------------------------------------------------------------------------
# A Config and its data


def check_batch(c: Config, stage: int, rows: int, pieces: int) -> None:
    """Raise InputError if a stage's batch cannot be divided into so many micro-batches."""
    batch_size = getattr(c, f"stage{stage}_batch")
    if pieces > min(batch_size, rows):
        raise InputError(f"--stage{stage}-batch {batch_size}: has no sample for each of {pieces} "
                         "micro-batches; raise it or use fewer --processes")


def check_lengths(c: Config, sets: dict[str, tuple], tokenizer, n: int) -> None:
    """Raise InputError for a prompt that leaves no room for an answer.

    Of the training rows the first question is tried, of the held-out ones every question.
    """
    files = {"train": c.data or c.data_root, "eval": c.eval_data}
    for name in ("train", "eval"):
        records, _ = sets.get(name, ([], None))
        for row, record in enumerate(records):
            turns = record["conversations"]
            turns = turns[:1] if name == "train" else turns[:-1]
            # A token has at least one character: most rows need not be tokenised.
            if sum(len(turn["value"]) for turn in turns) + n + 300 < c.max_length:
                continue
            ids, _ = conversation_ids({**record, "conversations": turns}, "v1", tokenizer, n)
            if len(ids) >= c.max_length and not (name == "train" and c.skip_bad):
                place = f"{files[name] or 'the tiny world'}: {row_name(row, record)}"
                raise InputError(f"{place} has a prompt of {len(ids)} tokens, and --max-length is "
                                 f"{c.max_length}: shorten it or raise the flag")
