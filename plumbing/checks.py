"""What cannot run is refused before any work: one line, which names the flag and the remedy."""

import dataclasses
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

import numpy as np
import timm
import torch
from timm.models import VisionTransformer

from data import InputError, conversation_ids, row_name
from plumbing.build import build_encoder, build_student, real_weights, stage0_encoders
from plumbing.config import ENCODERS, STAND_INS, Config, flag, is_real, plain_type
from plumbing.evaluate import normalise, questions_of
from plumbing.files import library_errors
from plumbing.processes import Machine, launched, wanted_processes
from plumbing.sets import PREFETCH, llava_layout, training_size
from teachers import parse_spec

SHARED_MEMORY = Path("/dev/shm")


def refuse_if(wrong, line: str) -> None:
    """Raise InputError with this line if something is wrong."""
    if wrong:
        raise InputError(line)


def check_value(name: str, field: dataclasses.Field, value) -> None:
    """Raise InputError, which begins with `name`, for a value of a wrong type or out of range."""
    kind = plain_type(field)
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        refuse_if(value not in choices or not isinstance(value, str),
                  f"{name} {value!r}: must be one of {', '.join(choices)}")
        return
    accepted = (int, float) if kind is float else kind
    wanted = {tuple: "a list of names", str: "a text", bool: "true or false",
              int: "a whole number", float: "a number"}[kind]
    refuse_if(not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool),
              f"{name} {value!r}: must be {wanted}")
    refuse_if(kind is tuple and not (value and all(isinstance(item, str) for item in value)),
              f"{name} {value!r}: must be a list of at least one name")
    if get_origin(field.type) is Annotated:
        low, high = field.type.__metadata__[0]
        refuse_if(not low <= value <= high,  # nan is in no range
                  f"{name} {value}: must be between {low:,} and {high:,}")


def check_config(c: Config, trains: bool = True) -> None:
    """Raise InputError for a Config that cannot run. An evaluation (not `trains`) needs less."""
    for field in dataclasses.fields(Config):
        check_value(flag(field.name), field, getattr(c, field.name))
    refuse_if(c.teachers[0] != "clip" or len(set(c.teachers) & set(ENCODERS)) < len(c.teachers),
              f"--teachers {' '.join(c.teachers)}: must start with clip and be among "
              f"{' '.join(ENCODERS)}, each once")
    refuse_if(c.data and c.data_root, "--data and --data-root: name one of them")
    refuse_if(trains and not c.data_root and bool(c.data) != bool(c.eval_data),
              "--data and --eval-data go together: name a training and a held-out set")
    refuse_if(c.eval_data and c.data_root and not c.image_folder,
              "--eval-data with --data-root needs --image-folder, the folder of its images")
    refuse_if(c.cache_teachers and c.student != "ensemble" and c.skip_bad,
              "--skip-bad: the teachers' cache reads every image; add --cache-teachers ''")
    refuse_if(c.pretrain_data and not c.data, "--pretrain-data needs --data and --eval-data")
    for name in ENCODERS:
        check_encoder(c, name)
    refuse_if(c.student in ("frozen", "ensemble") and (c.lambda_kd or c.mole_experts),
              f"--student {c.student}: nothing is distilled and no expert trained; add "
              "--lambda-kd 0 --mole-experts 0")
    refuse_if(c.student == "experts" and not c.mole_experts,
              "--student experts: there is none; give --mole-experts at least 1")
    refuse_if(not c.llm and c.lm_dim % (2 * c.lm_heads),
              f"--lm-heads {c.lm_heads}: --lm-dim {c.lm_dim} must be a multiple of twice that")
    refuse_if(not c.stage1_epochs and not c.stage2_epochs,
              "--stage1-epochs 0 and --stage2-epochs 0: one of the stages must be run")


TEACHER = ("cannot teach: it needs a ViT or a ConvNeXt of timm whose arguments go together: "
           "num_heads divides embed_dim, patch_size divides img_size")
STUDENT = ("cannot be the student: it needs a ViT with [CLS] and no registers, at least 2 blocks, "
           "each with norm1, attn.qkv with a bias and an mlp of fc1 and fc2; name a CLIP ViT of "
           "timm")


def check_encoder(c: Config, name: str) -> None:
    """Raise InputError for an encoder that timm lacks, or that cannot serve."""
    spec = getattr(c, name)
    try:
        model, size, options = parse_spec(spec)
        refuse_if(type(size) is not int or size < 1, "")
    except (ValueError, KeyError, SyntaxError, TypeError, InputError):
        line = f"--{name} {spec!r}: must read 'TIMM_NAME img_size=PIXELS key=value ...'"
        raise InputError(line) from None
    line = f"--{name} {model}: timm has no such model; timm.list_models(pretrained=True) names them"
    refuse_if(not timm.is_model(model), line)
    refuse_if(options.keys() & {"num_classes", "pretrained", "checkpoint_path"},
              f"--{name} {spec!r}: takes no num_classes, pretrained or checkpoint_path: the tag in "
              "the name asks for weights, and --weights DIR has files of your own")
    if name not in c.teachers:
        return
    refuse_if(name not in STAND_INS and not is_real(spec),
              f"--{name} {spec}: stage 0 makes no such model of the tiny world; name one with real "
              "weights")
    line = f"--{name} {spec!r}: {STUDENT if name == 'clip' else TEACHER}"
    # Build it without numbers, and run what a run runs.
    with library_errors(lambda e: f"{line} ({e})"), torch.device("meta"):
        encoder = build_encoder(c, name, {})
        net = encoder.net
        image = {size: torch.empty(1, 3, size, size, dtype=torch.uint8)}
        tokens = encoder(image).tokens                                  # (1, n_i, d_i)
        is_vit = hasattr(net, "patch_embed")
        stride = net.patch_embed.patch_size[0] if is_vit else net.feature_info[-1]["reduction"]
        fits = tokens.shape == (1, encoder.num_tokens, encoder.dim)
        if name == "clip":
            # other attention than this class's, and q_norm, are not in `cls_scores`
            fits = fits and isinstance(net, VisionTransformer) and net.num_prefix_tokens == 1
            fits = fits and isinstance(net.blocks[-1].attn.q_norm, torch.nn.Identity)
            fits = fits and net.pos_embed is not None   # stage 0 gives it numbers
            if c.student != "ensemble":
                fits = fits and build_student(c, {})(image).shape == tokens.shape
    refuse_if(size % stride,
              f"--{name} {spec!r}: img_size {size} is no multiple of {stride}, the pixels of a "
              "token: a rim would not be seen")
    refuse_if(not fits or (size // stride) ** 2 != encoder.num_tokens, line)


def find_device(device: str) -> str:
    """Return cuda, mps (Apple's GPU) or cpu; for "auto" the first of them that is here."""
    if device != "auto":
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_machine(c: Config, trains: bool) -> None:
    """Raise InputError for data, packages or devices that are not there. Call it in one process."""
    if c.data_root:
        llava_layout(Path(c.data_root))
    refuse_if(not c.data_root and not c.data and is_real(c.clip),
              "a real CLIP and no data: name --data-root DIR, or --data FILE and --eval-data FILE")
    refuse_if(c.stage0_pictures == "data" and not (c.data and stage0_encoders(c)),
              "--stage0-pictures data: trains the encoders of --tiny on --data; name --data FILE")
    refuse_if(c.tensorboard and importlib.util.find_spec("tensorboard") is None,
              "--tensorboard: the package is not installed: pip install tensorboard")
    refuse_if(c.device == "cuda" and not torch.cuda.is_available(),
              "--device cuda: torch finds no GPU here; --device cpu runs the same, slowly, and "
              "`python -m tools.plan` says what GPUs it wants")
    refuse_if(c.device == "mps" and not torch.backends.mps.is_available(),
              "--device mps: torch finds no Apple GPU here; --device auto takes what there is")
    if not trains:
        return
    real_weights(c)
    refuse_if(c.device == "mps" and c.precision == "bf16",
              "--device mps: trains in fp32 only; add --precision fp32, or --device cpu")
    refuse_if(c.device == "mps" and (launched() or wanted_processes(c) > 1),
              "--device mps: one process has the GPU; leave --processes out, or give --device cpu")
    check_shared_memory(c)


def check_shared_memory(c: Config) -> None:
    """Raise InputError if the workers' batches exceed shared memory: one would be killed later."""
    if not c.workers or not SHARED_MEMORY.is_dir():
        return
    samples = c.micro_batch or max(c.stage1_batch, c.stage2_batch)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", wanted_processes(c)))
    pixels = np.square(training_size(c)).sum()      # of one image, in all its views
    wanted = processes * c.workers * PREFETCH * samples * 3 * pixels
    free = shutil.disk_usage(SHARED_MEMORY).free
    refuse_if(free < wanted,
              f"{SHARED_MEMORY}: has {free / 1e6:,.0f} MB free, and {processes} x --workers "
              f"{c.workers} want {wanted / 1e6:,.0f} MB; in Docker start the container with "
              f"--shm-size={1 + wanted // 10 ** 9}g or --ipc=host, or give fewer --workers")


def check_rows(c: Config, sets: dict[str, tuple], machine: Machine) -> None:
    """Raise InputError for a stage without rows, or with fewer than its batch has micro-batches."""
    pictured = sum("image" in record for record in sets["pretrain"][0])
    for stage, rows in ((1, pictured), (2, len(sets["train"][0]))):
        if not getattr(c, f"stage{stage}_epochs"):
            continue
        refuse_if(not rows, f"{c.pretrain_data or c.data}: no record has an image, so stage 1 has "
                            "nothing to align; leave it out: --stage1-epochs 0")
        batch_size, (pieces, _) = getattr(c, f"stage{stage}_batch"), machine.micro_batches(stage)
        samples = min(batch_size, rows)
        lower = samples // machine.world * machine.world
        remedy = f"lower it to {lower}" if lower else "start fewer --processes"
        refuse_if(pieces > samples, f"--stage{stage}-batch {batch_size}: its {pieces} micro-batches"
                  f" want a sample each, and there are {samples}; {remedy}")


def check_lengths(c: Config, sets: dict[str, tuple], tokenizer, n: int) -> None:
    """Raise InputError for a prompt that leaves no room; print notes of unreachable answers."""
    for name, file in (("train", c.data or c.data_root), ("eval", c.eval_data)):
        records, _ = sets.get(name, ([], None))
        for row, record in enumerate(records):
            turns = record["conversations"]
            # The first question of a training row, every question of a held-out one.
            turns = turns[:1] if name == "train" else turns[:-1]
            # A token has at least one character: most rows need not be tokenised.
            if sum(len(turn["value"]) for turn in turns) + n + 300 < c.max_length:
                continue
            ids, _ = conversation_ids({**record, "conversations": turns}, "v1", tokenizer, n)
            if len(ids) >= c.max_length and not (name == "train" and c.skip_bad):
                place = f"{file or 'the tiny world'}: {row_name(row, record)}"
                raise InputError(f"{place} has a prompt of {len(ids)} tokens, and --max-length is "
                                 f"{c.max_length}: shorten it or raise the flag")
    if "eval" in sets:
        note_answers(c, sets["eval"][0], tokenizer)


def note_answers(c: Config, records: list[dict], tokenizer) -> None:
    """Print a note of the held-out answers that the LLM cannot give: unknown words, too long."""
    known = set(" ".join(map(normalise, [] if c.llm else tokenizer.vocabulary)).split())
    unknown, long = [], []
    rows = questions_of(records)
    for row in rows:
        new = [set(text.split()) - known for text in row["references"]]
        if not c.llm and all(new):
            unknown.append(f'"{min(new[0])}" in {row["name"]}')
        # A token has at least one byte; one more ends the answer. Most need not be tokenised.
        if all(len(text.encode()) + 1 >= c.max_new_tokens for text in row["answers"]):
            tokens = 1 + min(len(tokenizer.encode(text)) for text in row["answers"])
            if tokens > c.max_new_tokens:
                long.append((tokens, row["name"]))
    begin, of = f"note: {c.eval_data or 'the tiny world'}:", f"of {len(rows)} answers"
    if unknown:
        print(f"{begin} {len(unknown)} {of} cannot be said: they have words that training never "
              f"shows, as {unknown[0]}", file=sys.stderr)
    if long:
        tokens, name = max(long, key=lambda pair: pair[0])
        print(f"{begin} {len(long)} {of} are longer than --max-new-tokens {c.max_new_tokens}: the "
              f"longest has {tokens} tokens, in {name}: raise the flag", file=sys.stderr)
