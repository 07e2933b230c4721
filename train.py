"""Train MoVE-KD: several frozen vision encoders distilled into the one CLIP student of a LLaVA-style VLM.

    python train.py --tiny                  # the whole method on a laptop CPU, nothing downloaded   (4 min, 2 once stage 0 is made)
    python train.py --tiny --lambda-kd 0    # the same without distillation; every Config field is a flag   (2 min)
    python train.py --tiny --data D/train.json --eval-data D/test.json --image-folder D     # your own LLaVA-format set
    python -m tools.ask runs/tiny           # ask the result about its held-out pictures   (10 s)

    python -m tools.plan --full             # what the real run wants of your GPUs, before you have them   (30 s)
    python train.py --full --data-root D    # CLIP-L, EVA-02-L, ConvNeXt-XXL, Vicuna-7B on LLaVA's data, one process a GPU
    torchrun --nnodes 2 --nproc-per-node 8 ... train.py --full --data-root D                # the same on several nodes
    python train.py --resume runs/full      # go on where the last checkpoint stands, on any number of GPUs

Two stages, as LLaVA's recipe: stage 1 aligns (captions; trains experts, adapters, projector), stage 2 finetunes
(conversations; trains all but the teachers). One loss in both:

    L_total = L_text + lambda_kd L_kd + balance_weight L_balance
"""

import argparse
import dataclasses
import json
import math
import platform
import resource
import shutil
import sys
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin

import timm
import torch
import torchvision
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

import data
from data import COUNTS, InputError, normalise
from kd_loss import TeacherWeight, TokenWeight, kd_loss, teacher_weights, token_weights
from model import VLM, Ensemble, PretrainedLLM, Student, TinyLLM, flop_counter, load_released, released_config, text_loss
from mole import BalanceForm, MoleForm, MoleInit, RouterGrad, balance_loss, expert_shares, mole_layers
from teachers import (AdapterDirection, AdapterForm, ClipEncoder, TeacherCache, Teachers, VisionEncoder, adapt, adapt_student, build_adapters,
                      digest, find_weights, is_real, parse_spec)
from tools import scale
from tools.plots import plot_curves, plot_samples

# ---------------------------------------------------------------------------------------------------------------------
# Config: every field is a flag (--lambda-kd 0), is saved in the run's config.json, and has its reason beside it


@dataclass
class Config:
    """One run. The defaults are the TINY preset; FULL below changes names and numbers, never the code that runs."""

    out: str = "runs/tiny"                  # the run folder
    seed: int = 0                           # sets everything random in a run: new weights, order, dropout
    device: Literal["cpu", "cuda", "auto"] = "cpu"      # TINY is made for a laptop's; "auto": a GPU if there is one

    # data: "" means the built-in tiny world
    data: str = ""                          # stage 2, LLaVA-format JSON
    eval_data: str = ""                     # held-out questions of the same format
    pretrain_data: str = ""                 # stage 1 captions; without it stage 1 uses `data`
    image_folder: str = ""                  # what the "image" of a record is relative to; default: the folder of `data`
    data_root: str = ""                     # a folder with LLaVA's 558k captions and 665k conversations, laid out as its documentation says
    skip_bad: bool = False                  # leave out rows that cannot be used, each counted and printed; else the first is an error
    eval_split: Literal["test", "validation"] = "test"  # of the tiny world; tune on validation, so that test stays unread
    n_pretrain: int = COUNTS["pretrain"]   # how much of the tiny world; reasons in data.py
    n_train: int = COUNTS["train"]
    n_described: int = COUNTS["described"]
    n_text: int = COUNTS["text"]
    n_eval: int = COUNTS["eval"]
    image_size: int = 96                    # px of the loader's square image: the largest that an encoder asks for
    max_length: int = 2048                  # tokens of a conversation, image included; LLaVA's limit; what is longer is cut
    group_batches: int = 1                  # batches sorted by length together, pictures and text apart; 1: as they come, 8: little padding
    workers: int = 0                        # processes that load images; 0: this one does, which is faster for pictures in memory

    # encoders: a timm name, the input resolution, and what shrinks it. Teachers differ in width, token count and resolution.
    teachers: tuple[str, ...] = ("clip", "eva", "convnext")
    clip: str = "vit_base_patch16_clip_quickgelu_224 img_size=48 patch_size=8 embed_dim=96 depth=4 num_heads=4"   # 36 x 96
    eva: str = "eva02_tiny_patch14_224 img_size=64 patch_size=8 embed_dim=80 depth=3 num_heads=4"                 # 64 x 80
    convnext: str = "convnext_atto img_size=128 depths=(1,1,2,1) dims=(16,32,64,128) ls_init_value=None"                             # 16 x 128
    sam: str = "samvit_large_patch16.sa1b img_size=1024"                                                          # 4096 x 256; the tiny world makes none
    weights: str = ""                       # a folder with the encoders' files, TIMM_NAME.safetensors, .pth, .pt or .bin; "": timm's hub
    init_from: str = ""                     # a checkpoint of the authors' layout, or a run folder of ours, to start student, projector and LLM from

    student: Literal["trained", "frozen", "ensemble"] = "trained"   # "frozen": LLaVA-1.5; "ensemble": all teachers side by side, no student
    compile: Literal["off", "on"] = "off"   # torch.compile of student and teachers; "on" may help on CUDA (tools.bench measures it), never needed
    cache_teachers: str = "runs/teachers"   # a folder that keeps what the teachers say of the training images, for all epochs and runs; "": none

    # mixture of LoRA experts; "row" is the README's table of what paper and released code do
    mole_experts: int = 3                   # the paper's; 0: none
    mole_rank: int = 8                      # of one expert; 32 at width 1024
    mole_alpha: float = 8.0                 # scale alpha / rank
    mole_dropout: float = 0.0               # 0.05 in the released runs; a run of minutes does without
    mole_form: MoleForm = "ffn"             # row 1
    mole_router_grad: RouterGrad = "straight_through"   # row 2; "none" is the paper's formula, in which only a balance loss trains it
    mole_init: MoleInit = "zero"            # row 3; so that the student starts as CLIP

    # loss
    lambda_kd: float = 1.0                  # weight of L_kd
    kd_alpha: float = 0.4                   # CLIP's fixed share of the teacher weights
    kd_token_weight: TokenWeight = "paper"                          # row 4
    kd_teacher_weight: TeacherWeight = "paper"                      # row 5
    kd_teacher_grad: Literal["detached", "attached"] = "detached"   # row 6
    kd_collapse: Literal["none", "second_softmax"] = "none"         # row 7
    adapter_form: AdapterForm = "token_mixing"                      # row 8
    adapter_direction: AdapterDirection = "teacher_to_student"      # the other one is AM-RADIO's
    balance_weight: float = 0.01            # row 9; of the released code, the paper has no such term
    balance_form: BalanceForm = "per_layer"  # row 9

    # LLM
    llm: str = ""                           # a folder or hub name of any causal LM of transformers; "": the tiny one, sized by lm_
    lm_dim: int = 96
    lm_depth: int = 3
    lm_heads: int = 4
    lm_hidden: int = 256                    # SwiGLU's inner width, 8/3 of lm_dim

    # stages
    stage0_scale: float = 1.0               # multiplies the steps of each stage-0 pretraining; small for a smoke run
    stage1_epochs: float = 1.0              # LLaVA's
    stage1_batch: int = 64                  # four times stage 2's: captions are short
    stage1_lr: float = 1e-3                 # LLaVA's
    stage2_epochs: float = 5.0              # LLaVA's is 1, of 665k conversations; here there are 2,500
    stage2_batch: int = 16                  # small: at these sizes steps matter more than smooth gradients
    stage2_lr: float = 1e-3                 # a 7B LLM wants 2e-5; at width 96 that would not move
    warmup: float = 0.03                    # share of the steps, LLaVA's
    grad_clip: float = 1.0                  # norm; so that one odd batch cannot undo a short run
    max_steps: int = 0                      # stop each stage after so many steps; 0 = run it all

    # scale: no value here changes what is computed, but for bf16's rounding, the balance loss, whose shares are those of a micro-batch, and the masks
    # that LoRA dropout draws, which are those of a process
    processes: int = 0                      # on this machine; 0: one for each GPU, on a CPU one
    micro_batch: int = 0                    # at most so many samples at once in one process; the rest of its part of a batch follows. 0: all
    precision: Literal["fp32", "bf16"] = "fp32"     # "bf16": of arithmetic, with fp32 master weights and losses; no gain on a CPU
    recompute: bool = False                 # activation checkpointing: a third more arithmetic, the memory of a block in place of all
    save_every: int = 0                     # steps between checkpoints to resume from, and one after stage 1; 0: only when a SIGTERM comes
    keep: int = 2                           # checkpoints

    log_every: int = 10                     # steps
    max_new_tokens: int = 16                # of a generated answer; an endless one must end
    eval_batch: int = 256                   # questions answered at once


ENCODERS = ("clip", "eva", "convnext", "sam")  # the fields of Config that specify one
MACHINE = {"device", "processes", "micro_batch", "workers", "recompute", "save_every", "keep", "log_every"}  # what a resumed run may change
TINY = Config()
FULL = dataclasses.replace(
    TINY, out="runs/full", device="cuda", image_size=1024, cache_teachers="", precision="bf16", recompute=True, workers=8, group_batches=8,
    micro_batch=16, save_every=500,
    clip="vit_large_patch14_clip_quickgelu_336.openai img_size=336",                    # 576 x 1024
    eva="eva02_large_patch14_448.mim_m38m_ft_in22k img_size=1024 patch_size=16",        # 4096 x 1024
    convnext="convnext_xxlarge.clip_laion2b_soup img_size=1024",                        # 1024 x 3072
    llm="lmsys/vicuna-7b-v1.5",
    mole_rank=32, mole_alpha=1.0, mole_dropout=0.05, lambda_kd=0.5, kd_alpha=0.8,
    stage1_epochs=1, stage1_batch=256, stage1_lr=1e-3, stage2_epochs=1, stage2_batch=128, stage2_lr=2e-5, eval_batch=16, max_new_tokens=64)
SMALL = dataclasses.replace(  # one consumer GPU, or a patient laptop: smaller models, the same code and data; nobody has tuned it
    FULL, out="runs/small", device="auto", image_size=512, workers=2, micro_batch=8,
    clip="vit_base_patch16_clip_quickgelu_224.openai img_size=224",                     # 196 x 768
    eva="eva02_base_patch14_448.mim_in22k_ft_in22k img_size=448",                       # 1024 x 768
    convnext="convnext_base.clip_laion2b img_size=512",                                 # 256 x 1024
    sam="samvit_base_patch16.sa1b img_size=1024",                                       # 4096 x 256
    llm="HuggingFaceTB/SmolLM2-135M-Instruct", stage2_lr=1e-4)  # five times 7B's, a guess: narrower nets take larger steps
PRESETS = {"tiny": TINY, "small": SMALL, "full": FULL}
RECIPES = {  # --recipe: rows 1-9 of the README's table at once
    "paper": dict(mole_form="ffn", mole_router_grad="none", mole_init="zero", kd_token_weight="paper", kd_teacher_weight="paper",
                  kd_teacher_grad="detached", kd_collapse="none", adapter_form="token_mixing", balance_weight=0.0, balance_form="per_layer"),
    "released": dict(mole_form="fc1_fc2", mole_router_grad="none", mole_init="kaiming", kd_token_weight="released",
                     kd_teacher_weight="released", kd_teacher_grad="attached", kd_collapse="second_softmax", adapter_form="released",
                     balance_weight=0.01, balance_form="pooled"),
}


def parse_config(argv: list[str] | None) -> Config:
    """Flags from the fields of Config. Raises InputError for an unknown flag or a value of the wrong type."""
    return parse_flags(argv)[0]


def parse_flags(argv: list[str] | None) -> tuple[Config, bool]:
    """The Config, and whether the run goes on from a checkpoint."""
    parser = data.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    preset = parser.add_mutually_exclusive_group(required=True)
    preset.add_argument("--tiny", dest="preset", action="store_const", const="tiny", help="laptop CPU, no download")
    preset.add_argument("--small", dest="preset", action="store_const", const="small", help="real encoders and LLM of middle size")
    preset.add_argument("--full", dest="preset", action="store_const", const="full", help="the real encoders and LLM on GPUs")
    preset.add_argument("--config", metavar="FILE", help="the config.json of an earlier run")
    preset.add_argument("--resume", metavar="RUN", help=f"a run folder, to go on from its last checkpoint; may be given with {', '.join(sorted(MACHINE))}")
    parser.add_argument("--recipe", choices=RECIPES, help="rows 1-9 of the README's table as in the paper, or as in the released code")
    for field in dataclasses.fields(Config):
        kind = {"choices": get_args(field.type)} if get_origin(field.type) is Literal else {"type": field.type}
        if get_origin(field.type) is tuple:
            kind = {"type": str, "nargs": "+"}
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        parser.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS, help=f"default {field.default!r}", **kind)
    flags = vars(parser.parse_args(argv))
    preset, file, run, recipe = (flags.pop(name) for name in ("preset", "config", "resume", "recipe"))
    if run:
        if fixed := ["--recipe"] * bool(recipe) + ["--" + name.replace("_", "-") for name in flags if name not in MACHINE]:
            raise InputError(f"{fixed[0]}: a resumed run keeps what its config.json says; give --resume with {', '.join(sorted(MACHINE))} only")
        config = dataclasses.replace(load_config(Path(run) / "config.json"), **{"out": run} | flags)
    else:
        config = dataclasses.replace(load_config(Path(file)) if file else PRESETS[preset], **RECIPES.get(recipe, {}) | flags)
    config.teachers = tuple(config.teachers)  # argparse gives a list
    if config.init_from and not run:
        config = with_init(config)
    check_config(config)
    return config, bool(run)


def with_init(c: Config) -> Config:
    """What a checkpoint to start from decides: the student's shape and experts, and the LLM."""
    folder = Path(c.init_from)
    if released := released_config(folder):
        return dataclasses.replace(c, llm=str(folder), mole_form="fc1_fc2", **released[0])
    theirs = load_config(folder / "config.json")
    return dataclasses.replace(c, **{name: getattr(theirs, name) for name in ("clip", "mole_experts", "mole_rank", "mole_alpha", "mole_form", "llm", "lm_dim",
                                                                              "lm_depth", "lm_heads", "lm_hidden")})


def load_config(path: Path) -> Config:
    """The Config of a JSON file; missing keys take TINY's value. Raises InputError for a key that Config lacks."""
    values = data.read_json(path)
    if not isinstance(values, dict):
        raise InputError(f"{path}: is not a JSON object")
    if unknown := sorted(set(values) - {field.name for field in dataclasses.fields(Config)}):
        raise InputError(f"{path}: unknown key {unknown[0]!r}; a config has the keys of Config in train.py")
    config = Config(**values)
    config.teachers = tuple(config.teachers)  # JSON has lists only
    return config


def check_config(c: Config) -> None:
    """Combinations that cannot run: one line that names the flag and the mend."""
    if c.teachers[0] != "clip" or not set(c.teachers) <= set(ENCODERS) or len(set(c.teachers)) < len(c.teachers):
        raise InputError(f"--teachers {' '.join(c.teachers)}: must start with clip and be among {' '.join(ENCODERS)}, each once")
    if c.data and c.data_root:
        raise InputError("--data and --data-root: name one of them")
    if not c.data_root and bool(c.data) != bool(c.eval_data):
        raise InputError("--data and --eval-data go together: name a training set and a held-out set")
    if c.eval_data and c.data_root and not c.image_folder:
        raise InputError("--eval-data with --data-root needs --image-folder, the folder its images are relative to")
    if c.cache_teachers and c.student != "ensemble" and c.skip_bad:
        raise InputError("--skip-bad: the teachers' cache reads every image beforehand; add --cache-teachers ''")
    if c.pretrain_data and not c.data:
        raise InputError("--pretrain-data needs --data and --eval-data")
    for name in ENCODERS:
        try:
            model, *_ = parse_spec(getattr(c, name))
        except (ValueError, KeyError, SyntaxError):
            raise InputError(f"--{name} {getattr(c, name)!r}: must read 'TIMM_NAME img_size=PIXELS key=value ...'") from None
        if not timm.is_model(model):
            raise InputError(f"--{name} {model}: timm has no such model; timm.list_models() names them")
    if "sam" in c.teachers and not is_real(c.sam):
        raise InputError(f"--sam {c.sam}: stage 0 makes no SAM of the tiny world; name one with real weights")
    if c.student != "trained" and (c.lambda_kd or c.mole_experts):
        raise InputError(f"--student {c.student}: nothing is distilled and no expert trained; add --lambda-kd 0 --mole-experts 0")
    if not 0 <= c.kd_alpha <= 1:
        raise InputError(f"--kd-alpha {c.kd_alpha}: CLIP's share of the teacher weights must be between 0 and 1")
    for name in ("n_pretrain", "n_train", "n_eval", "stage1_batch", "stage2_batch", "log_every", "eval_batch", "mole_rank",
                 "max_new_tokens", "group_batches", "keep"):
        if getattr(c, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(c, name)}: must be at least 1")


def check_place(c: Config) -> None:
    """That data and GPU are there, before any process is started."""
    if c.data_root:
        data.llava_layout(Path(c.data_root))
    elif not c.data and is_real(c.clip):
        raise InputError("a real CLIP and no data: name --data-root DIR for LLaVA's sets, or --data FILE and --eval-data FILE")
    if c.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no GPU here; --device cpu runs the same, slowly, and `python -m tools.plan` says what GPUs it wants")


# ---------------------------------------------------------------------------------------------------------------------
# Data and models of a run


def load_sets(c: Config) -> dict[str, tuple]:
    """(records, get_image) of "pretrain", "train" and "eval", from disk or the tiny world: the one place that knows which."""
    if c.data_root:
        sets = {name: (data.read_records(file, folder, open_images=False, skip_bad=c.skip_bad), data.DiskImages(folder, c.image_size))
                for name, (file, folder) in data.llava_layout(Path(c.data_root)).items()}
        if c.eval_data:
            folder = Path(c.image_folder)
            sets["eval"] = data.read_records(Path(c.eval_data), folder), data.DiskImages(folder, c.image_size)
        return sets
    if not c.data:
        return {"pretrain": data.tiny_world("pretrain", c.n_pretrain), "train": data.tiny_world("train", c.n_train, c.n_described, c.n_text),
                "eval": data.tiny_world(c.eval_split, c.n_eval)}
    folder = Path(c.image_folder or Path(c.data).parent)
    get_image = data.DiskImages(folder, c.image_size)
    paths = {"pretrain": c.pretrain_data or c.data, "train": c.data, "eval": c.eval_data}
    return {name: (data.read_records(Path(path), folder, skip_bad=c.skip_bad), get_image) for name, path in paths.items()}


def pretrained_weights(c: Config, records: list[dict], tokenizer) -> tuple[dict[str, Path | str], float]:
    """Where each encoder's weights are (and the tiny LLM's): a real one's in --weights or on the hub, a toy's made by stage 0 unless
    it has been; and the TFLOPs of stage 0."""
    from tools.pretrain_tiny import stage0  # only the tiny preset makes its own pretrained models
    toys, tflops = stage0(c, records, tokenizer)
    return {name: find_weights(getattr(c, name), c.weights) for name in {"clip", *c.teachers} if is_real(getattr(c, name))} | toys, tflops


def build_vlm(c: Config, tokenizer, weights: dict[str, Path | str] | None = None, llm: PretrainedLLM | None = None) -> VLM:
    """The VLM; with weights given, the student starts as CLIP and the LLM as pretrained."""
    weights = weights or {}
    torch.manual_seed(c.seed)
    if c.student == "ensemble":
        student = Ensemble(build_teachers(c, weights))
    else:
        student = Student(c.clip, weights.get("clip"))
        student.add_experts(c.mole_experts, c.mole_rank, c.mole_alpha, c.mole_dropout, c.mole_router_grad, c.mole_form, c.mole_init)
    if c.llm:
        language = llm or PretrainedLLM(c.llm)
    else:
        language = TinyLLM(len(tokenizer.vocabulary), c.lm_dim, c.lm_depth, c.lm_heads, c.lm_hidden)
        if "llm" in weights:
            language.load_state_dict(load_file(weights["llm"]))
    torch.manual_seed(c.seed)  # again: with experts or without, the projector starts the same
    return VLM(student, language, tokenizer.image)


def build_teachers(c: Config, weights: dict[str, Path | str]) -> Teachers:
    return Teachers({name: (ClipEncoder if name == "clip" else VisionEncoder)(getattr(c, name), weights.get(name)) for name in c.teachers})


def fill_cache(c: Config, teachers: Teachers, sets: dict) -> None:
    """Let the teachers read their outputs for all training images from --cache-teachers, computing what it lacks."""
    source = {record["image"]: sets[name][1] for name in ("pretrain", "train") for record in sets[name][0] if "image" in record}
    images = sorted(source)
    stamp = digest(*(get_image.stamp([i for i in images if source[i] is get_image]) for get_image in dict.fromkeys(source.values())))
    where = " ".join(sorted({get_image.where for get_image in source.values()}))
    teachers.cache = {name: TeacherCache(Path(c.cache_teachers), name, encoder, images, lambda i: source[i](i), where, stamp)
                      for name, encoder in teachers.encoders.items()}


def load_run(folder: Path, device: str = "auto") -> tuple[VLM, data.WordTokenizer | data.PretrainedTokenizer, Config]:
    """The VLM of a finished run, or of the authors' checkpoint, ready to answer. Strict: every tensor of the file must find its place."""
    device = find_device(device)
    if released := released_config(folder):
        c = dataclasses.replace(FULL, llm=str(folder), **RECIPES["released"], **released[0])
        tokenizer = data.PretrainedTokenizer(c.llm)
        vlm = build_vlm(c, tokenizer, llm=PretrainedLLM(c.llm, released[1]))
        load_released(vlm, folder)
    else:
        c = load_config(folder / "config.json")
        tokenizer = data.PretrainedTokenizer(str(folder / "llm")) if c.llm else data.WordTokenizer(data.read_json(folder / "vocabulary.json"))
        vlm = build_vlm(c, tokenizer, llm=PretrainedLLM.from_config_of(folder / "llm") if c.llm else None)
        load_vlm(vlm, folder)
    c.device = device
    vlm = vlm.bfloat16() if c.precision == "bf16" and device == "cuda" else vlm.float()
    return vlm.to(device).eval(), tokenizer, c


def load_vlm(vlm: VLM, folder: Path) -> None:
    """Fill student, projector and LLM from a finished run of ours."""
    if not (files := sorted(folder.glob("model*.safetensors"))):
        raise InputError(f"{folder}: holds no model.safetensors; the run has not finished")
    weights = {name.removeprefix("vlm."): tensor for file in files for name, tensor in load_file(file).items() if name.startswith("vlm.")}
    try:
        vlm.load_state_dict(weights)
    except RuntimeError as e:
        raise InputError(f"{folder}: its weights do not fit its config.json: {str(e).splitlines()[1].strip()[:200]}") from None


def find_device(device: str) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


# ---------------------------------------------------------------------------------------------------------------------
# What each stage trains


def parts(vlm: VLM, adapters: nn.ModuleDict, teachers: Teachers) -> dict[str, list[nn.Parameter]]:
    """Every parameter of the run, by the part of the method it belongs to."""
    experts = {p for layer in mole_layers(vlm.student) for m in layer.experts() for p in m.parameters()}
    return {
        "student backbone": [p for p in vlm.student.parameters() if p not in experts],
        "student MoLE": [p for p in vlm.student.parameters() if p in experts],
        "projector": list(vlm.projector.parameters()),
        "LLM": list(vlm.llm.parameters()),
        **{f"adapter {name}": list(a.parameters()) for name, a in adapters.items()},
        **{f"teacher {name}": list(t.parameters()) for name, t in teachers.encoders.items()},
    }


def set_trainable(stage: int, groups: dict[str, list[nn.Parameter]], student: str = "trained") -> str:
    """Freeze and unfreeze for a stage (1: experts, adapters, projector; 2: all but the teachers) and return the table of it. A student
    that is not "trained" is frozen in both."""
    rows = [f"stage {stage} {'':22}  parameters"]
    for name, parameters in groups.items():
        frozen = name.startswith("teacher") or (name.startswith("student") and student != "trained")
        trained = not frozen and (stage == 2 or name not in ("student backbone", "LLM"))
        for p in parameters:
            p.requires_grad_(trained)
        rows.append(f"  {name:28} {sum(p.numel() for p in parameters):12,}  {'trained' if trained else 'frozen'}")
    return "\n".join(rows)


# ---------------------------------------------------------------------------------------------------------------------
# The loss and the loop


class Part(NamedTuple):
    """A micro-batch's part of all answer tokens and of all images of the step, over all processes: means of parts, weighed so, add up to the mean."""

    text: float = 1.0
    images: float = 1.0


class Trained(nn.ModuleDict):
    """VLM and adapters under one roof, whose forward is the whole method: what is sharded, saved and exported as one."""

    def __init__(self, vlm: VLM, adapters: nn.ModuleDict):
        super().__init__({"vlm": vlm, "adapters": adapters})

    def forward(self, c: Config, teachers: Teachers, batch: dict, part: Part) -> tuple[torch.Tensor, dict]:
        return loss_terms(c, self["vlm"], teachers, self["adapters"], batch, part)


def loss_terms(c: Config, vlm: VLM, teachers: Teachers, adapters: nn.ModuleDict, batch: dict, part: Part = Part()) -> tuple[torch.Tensor, dict]:
    """One forward of the whole method: this part of L_total, and of every number worth logging, still as tensors.

    The images of part.images = 0 stand in for none (`share_work`): all parts run, for other processes wait for them, and count for nothing."""
    images = batch["images"]
    visual = vlm.student(images) if images is not None else None                        # V^s (B_img, n, d)
    shown = visual if part.images else visual[:0] if visual is not None else None       # (B_img or 0, n, d)
    logits = vlm(shown, batch["input_ids"], batch["attention_mask"])                    # (B, T, V)
    L_text = part.text * text_loss(logits, batch["labels"])
    L_kd = L_balance = L_text.new_zeros(())
    log, layers = {}, mole_layers(vlm.student)
    if images is not None and layers:
        L_balance = part.images * balance_loss(vlm.student, c.balance_form)
        log["experts"] = part.images * torch.stack([expert_shares(layer) for layer in layers])      # (L, E)
    if images is not None and c.lambda_kd:  # no image, no KD term
        outputs = teachers(images, batch["image_names"])
        w_tok = token_weights(outputs["clip"].cls_scores, c.kd_token_weight)            # (B_img, n)
        if c.adapter_direction == "teacher_to_student":
            V_t = adapt(outputs, adapters)                                              # m x (B_img, n, d)
            V_s = dict.fromkeys(V_t, visual)                                            # m x (B_img, n, d)
            w_tea = teacher_weights(outputs["clip"].cls, V_t, c.kd_alpha, c.kd_teacher_weight, c.kd_teacher_grad == "detached",
                                    c.kd_collapse == "second_softmax")                  # (B_img, m)
        else:
            V_s, V_t = adapt_student(visual, outputs, adapters)                         # m x (B_img, n_i, d_i) both
            # V^cls has no product with tokens of another space, so the teachers but CLIP share alike
            w_tea = teacher_weights(outputs["clip"].cls, V_t, c.kd_alpha, "uniform")    # (B_img, m)
        mean, per_teacher = kd_loss(V_s, V_t, w_tok, w_tea)
        L_kd = part.images * mean
        log |= {f"kd_{name}": part.images * value for name, value in per_teacher.items()}
        log |= {f"w_{name}": part.images * w for name, w in zip(V_t, w_tea.detach().mean(dim=0))}
    L_total = L_text + c.lambda_kd * L_kd + c.balance_weight * L_balance
    terms = {"L_text": L_text, "L_kd": L_kd, "L_balance": L_balance, "L_total": L_total}
    return L_total, {name: term.detach() for name, term in terms.items()} | log


@dataclass
class Progress:
    """Where a run stands, and what it has counted: all that a checkpoint keeps beside the tensors."""

    stage: int = 1
    step: int = 0                                       # steps done in the stage
    log_bytes: int = 0                                  # of log.jsonl
    skipped: int = 0                                    # rows that --skip-bad left out
    cut: int = 0                                        # conversations cut at --max-length
    flops: dict = dataclasses.field(default_factory=dict)    # of each stage: those of its first step times the steps


def is_sharded(c: Config) -> bool:
    return scale.world() > 1 or c.precision == "bf16"


def micro_batches(c: Config, batch: int) -> tuple[int, range]:
    """In how many micro-batches a batch is dealt out, and which of them are this process's."""
    here = math.ceil(batch / scale.world() / c.micro_batch) if c.micro_batch else 1
    return scale.world() * here, range(scale.rank() * here, (scale.rank() + 1) * here)


def share_work(c: Config, micro: list[dict], stop: bool) -> tuple[list[dict], list[Part], dict]:
    """This process's micro-batches of one step on its device, each with its Part; and the sums over all processes. If the models are sharded, a micro-batch
    without an image gets a blank one that counts for nothing: a process that left the student out would keep the others waiting, and a last micro-batch
    that left it out would not send the gradients that the ones before have added up."""
    for batch in micro:
        if "fault" in batch:
            raise InputError(f'{batch["fault"]}; --skip-bad leaves such rows out')
        for line in batch["skipped"]:
            tqdm.write(f"skipped: {line}", file=sys.stderr)
    own = [(int((batch["labels"][:, 1:] != data.IGNORE).sum()), len(batch["image_names"])) for batch in micro]
    counts = {"text": sum(text for text, _ in own), "images": sum(images for _, images in own), "tokens": sum(int(b["attention_mask"].sum()) for b in micro),
              "skipped": sum(len(b["skipped"]) for b in micro), "cut": sum(b["cut"] for b in micro), "stop": int(stop)}
    counts = {name: int(count) for name, count in scale.total({name: torch.tensor(count) for name, count in counts.items()}).items()}
    parts = [Part(text / max(1, counts["text"]), images / max(1, counts["images"])) for text, images in own]
    if is_sharded(c):
        blank = {"images": data.blank_image(c.image_size)[None], "image_names": [None]}
        micro = [batch if batch["images"] is not None else batch | blank for batch in micro]
    return [{k: v.to(c.device) if torch.is_tensor(v) else v for k, v in batch.items()} for batch in micro], parts, counts


def run_stage(c: Config, trained: Trained, teachers: Teachers, dataset: data.Conversations, pad: int, log_file, progress: Progress,
              checkpoints: scale.Checkpoints, stop: scale.Stop, resume: Path | None) -> bool:
    """Train progress.stage from progress.step on; False if a SIGTERM ended it. AdamW without weight decay, cosine, warm-up."""
    stage = progress.stage
    batch_size, lr, epochs = (getattr(c, f"stage{stage}_{name}") for name in ("batch", "lr", "epochs"))
    parameters = [p for p in trained.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=True)
    if resume:
        scale.load(resume, trained, optimizer)
    steps = data.count_steps(len(dataset), batch_size, epochs)
    steps = min(steps, c.max_steps or steps)
    pieces, mine = micro_batches(c, batch_size)
    if pieces > min(batch_size, len(dataset)):
        raise InputError(f"--stage{stage}-batch {batch_size}: has no sample for each of {pieces} micro-batches; raise it or use fewer --processes")
    stream = iter(data.make_loader(dataset, batch_size, epochs, c.seed + stage, pad, c.group_batches, pieces, mine, progress.step, c.workers))
    trained.train()
    bar = tqdm(range(progress.step, steps), total=steps, initial=progress.step, desc=f"stage {stage}", mininterval=1, disable=scale.rank() > 0)
    clock, tokens = time.perf_counter(), 0
    for step in bar:
        micro, parts, counts = share_work(c, [next(stream) for _ in mine], stop.came)
        torch.manual_seed((c.seed * 1_000_003 + stage * 1_000_000 + step) * 1_009 + scale.rank())  # dropout: a resumed run draws what the straight one drew
        log, counter = {}, flop_counter()
        with counter if str(stage) not in progress.flops else nullcontext():
            for i, (batch, part) in enumerate(zip(micro, parts)):
                scale.sync_gradients(trained, on=i == len(micro) - 1)
                # --- the method ---
                loss, terms = trained(c, teachers, batch, part)
                (loss * scale.world()).backward()  # FSDP takes the mean over the processes, of what is a sum over them
                # --- plumbing ---
                log |= {name: log[name] + term if name in log else term for name, term in terms.items()}
        log = {name: term for name, term in scale.total(log).items() if counts["images"] or name.startswith("L_")}
        if not log["L_total"].isfinite():
            name = next(name for name, term in log.items() if not term.isfinite().all())
            raise InputError(f"{name} is {log[name].item()} at stage {stage}, step {step}: lower --stage{stage}-lr {lr}")
        if str(stage) not in progress.flops:
            progress.flops[str(stage)] = steps * scale.total({"": torch.tensor(float(counter.get_total_flops()), dtype=torch.float64)})[""].item()
        log["grad_norm"] = scale.whole(nn.utils.clip_grad_norm_(parameters, c.grad_clip))
        optimizer.param_groups[0]["lr"] = log["lr"] = lr * rate(step, steps, c.warmup)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += counts["tokens"]
        progress.step, progress.skipped, progress.cut = step + 1, progress.skipped + counts["skipped"], progress.cut + counts["cut"]
        if (step % c.log_every == 0 or step == steps - 1) and log_file:
            write_log(log_file, progress, log, tokens / (time.perf_counter() - clock))
        due = c.save_every and (progress.step % c.save_every == 0 or progress.step == steps and stage == 1)
        if due or counts["stop"]:
            progress.log_bytes = log_file.tell() if log_file else 0
            checkpoints.save(f"stage{stage}-{progress.step:08}", trained, optimizer, dataclasses.asdict(progress))
        if counts["stop"]:
            return False
    return True


def rate(step: int, steps: int, warmup: float) -> float:
    """The share of the learning rate: a linear warm-up, then half a cosine down to 0."""
    warm = max(1, round(warmup * steps))
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def write_log(file, progress: Progress, log: dict, speed: float) -> None:
    """A line for programs, without a clock in it, so that one seed makes one log; and a line to read."""
    log = {name: value.tolist() if torch.is_tensor(value) else value for name, value in log.items()}
    log |= {name: count for name in ("skipped", "cut") if (count := getattr(progress, name))}
    file.write(json.dumps({"stage": progress.stage, "step": progress.step - 1} | log) + "\n")
    file.flush()
    numbers = "  ".join(f"{name} {value:.3g}" for name, value in log.items() if isinstance(value, float))
    experts = "  experts " + " ".join("/".join(f"{100 * s:.0f}" for s in layer) for layer in log["experts"]) if "experts" in log else ""
    tqdm.write(f"stage {progress.stage} step {progress.step - 1}  {numbers}{experts}  {speed:.0f} tokens/s")


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation: exact match of the generated answer, per question type


def questions_of(records: list[dict]) -> list[dict]:
    """One question a row: {record (cut after that question), answer, type}. A later turn keeps the turns before it."""
    rows = []
    for record in records:
        turns = record["conversations"]
        for i in range(0, len(turns), 2):
            question = turns[i]["value"].replace("<image>", "").strip()
            rows.append({"record": {**record, "conversations": turns[:i + 1]}, "question": question,
                         "answer": normalise(turns[i + 1]["value"]), "type": record.get("type", question)})
    count = Counter(row["type"] for row in rows)
    return [row if count[row["type"]] >= 10 else {**row, "type": "other"} for row in rows]  # free questions: too few to rate alone


@torch.no_grad()
def answer(c: Config, vlm: VLM, tokenizer, records: list[dict], get_image) -> list[str]:
    """The VLM's greedy answer to the last question of each record."""
    vlm.eval()
    prompts = data.Conversations(records, get_image, tokenizer, "v1", vlm.student.num_tokens, c.max_length)
    answers = []
    for i in tqdm(range(0, len(prompts), c.eval_batch), desc="answer", leave=False):
        batch = data.collate([prompts.item(k) for k in range(i, min(i + c.eval_batch, len(prompts)))], tokenizer.pad, side="left")
        images = batch["images"]
        visual = vlm.student(images.to(c.device)) if images is not None else None       # (B_img, n, d)
        ids = vlm.generate(visual, batch["input_ids"].to(c.device), batch["attention_mask"].to(c.device), tokenizer.eos,
                           c.max_new_tokens)                                            # (B, new)
        answers += [tokenizer.decode(row) for row in ids.tolist()]
    return answers


def accuracy_per_type(rows: list[dict], answers: list[str]) -> dict[str, float]:
    """Exact match in %, per question type."""
    right = {}
    for row, given in zip(rows, answers):
        right.setdefault(row["type"], []).append(normalise(given) == row["answer"])
    return {name: 100 * sum(hits) / len(hits) for name, hits in sorted(right.items())}


def evaluate(c: Config, vlm: VLM, tokenizer, records: list[dict], get_image) -> tuple[dict, list[dict], list[str]]:
    """Held-out accuracy per type beside its baselines (all in %): the same model on blank images, always the commonest answer of
    the type, and chance, one over the number of answers of the type."""
    rows = questions_of(records)
    questions = [row["record"] for row in rows]
    answers = answer(c, vlm, tokenizer, questions, get_image)
    # without a picture to tell them apart, equal questions have equal answers
    alike = {str(record["conversations"]): record for record in questions}
    blank = dict(zip(alike, answer(c, vlm, tokenizer, list(alike.values()), lambda name: data.blank_image(c.image_size))))
    blank = [blank[str(record["conversations"])] for record in questions]
    accuracy = accuracy_per_type(rows, answers)
    truth = {name: Counter(row["answer"] for row in rows if row["type"] == name) for name in accuracy}
    result = {
        "macro_accuracy": sum(accuracy.values()) / len(accuracy),
        "accuracy": accuracy,
        "blank_accuracy": accuracy_per_type(rows, blank),
        "majority_accuracy": {name: 100 * max(t.values()) / t.total() for name, t in truth.items()},
        "chance_accuracy": {name: 100 / len(t) for name, t in truth.items()},
    }
    return result, rows, answers


def print_result(result: dict, out: Path) -> None:
    """A table for the reader, then the last line, for programs: `result: ` and one JSON object."""
    if "accuracy" in result:
        print(f"\nheld-out accuracy, %{'':9} model   blank image   majority   chance")
        for name in result["accuracy"]:
            print(f"  {name[:26]:26} {result['accuracy'][name]:7.1f} {result['blank_accuracy'][name]:13.1f} "
                  f"{result['majority_accuracy'][name]:10.1f} {result['chance_accuracy'][name]:8.1f}")
        print(f"  {'macro':26} {result['macro_accuracy']:7.1f}\n")
    print(f"{result['seconds']} s, {result['seconds_stage0']} s of them stage 0; {result['tflops']} TFLOPs in the two stages, "
          f"{result['tflops_stage0']} in stage 0; peak {result['peak_rss_mb']} MB; everything is in {out}/")
    print("result: " + json.dumps(result))


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves behind


def save_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """folder/model.safetensors, or above 5 GB model-00001-of-0000N.safetensors and their index, as the hub's tools read them; the old ones go when
    the new are whole."""
    temporary = folder / "weights.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_torch_state_dict({name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}, temporary, metadata={"format": "pt"})
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    for file in temporary.iterdir():
        file.rename(folder / file.name)
    temporary.rmdir()


# ---------------------------------------------------------------------------------------------------------------------


def build_datasets(c: Config, sets: dict, tokenizer, n_image: int) -> dict[int, data.Conversations]:
    """Stage 1: captions, prompt "plain", or for want of captions conversations; text alone has nothing to align.
    Stage 2: conversations, prompt "v1"."""
    records, get_image = sets["pretrain"]
    pictured = [r for r in records if "image" in r]
    if not pictured:
        raise InputError(f"{c.pretrain_data or c.data}: no record has an image, so stage 1 has nothing to align")
    captions = not c.data or c.pretrain_data
    return {1: data.Conversations(pictured, get_image, tokenizer, "plain" if captions else "v1", n_image, c.max_length, c.skip_bad),
            2: data.Conversations(*sets["train"], tokenizer, "v1", n_image, c.max_length, c.skip_bad)}


def prepare(c: Config, sets: dict, tokenizer, weights: dict[str, Path | str]) -> tuple[Trained, Teachers]:
    """All models of a run, on their devices: the frozen teachers, and what is trained, sharded if there are several processes or bf16 is asked for."""
    released = released_config(Path(c.init_from)) if c.init_from else None
    vlm = build_vlm(c, tokenizer, weights, llm=PretrainedLLM(c.llm, released[1]) if released else None)
    if c.init_from:
        load_released(vlm, Path(c.init_from)) if released else load_vlm(vlm, Path(c.init_from))
    teachers = build_teachers(c, weights)
    torch.manual_seed(c.seed)
    if c.cache_teachers and c.lambda_kd:
        with scale.first_alone():
            fill_cache(c, teachers.to(c.device), sets)
    if c.precision == "bf16":
        teachers.bfloat16()
    adapters = build_adapters(teachers, vlm.student.num_tokens, vlm.student.dim, c.adapter_form, c.adapter_direction)
    trained = Trained(vlm, adapters)
    if c.recompute:
        scale.recompute(vlm.blocks)
    if is_sharded(c):
        scale.shard(trained, vlm.blocks, c.device, c.precision == "bf16")
    for name, encoder in teachers.encoders.items():  # CLIP stays whole: its [CLS] row reads the weights of a block from outside
        if scale.world() > 1 and name != "clip" and sum(p.numel() for p in encoder.parameters()) > scale.SHARD_TEACHERS_ABOVE:
            scale.shard_frozen(encoder, c.device)
    if c.compile == "on":
        for encoder in (vlm.student, *teachers.encoders.values()):
            encoder.compile()
    return trained if is_sharded(c) else trained.float().to(c.device), teachers.to(c.device)


def export(c: Config, out: Path, trained: Trained, tokenizer) -> None:
    """The final weights as one safetensors folder (several files if they are large), with the real LLM's config and tokenizer: all that load_run reads."""
    state = scale.whole_state(trained)
    if scale.rank():
        return
    if c.precision == "bf16":
        state = {name: t.bfloat16() if t.is_floating_point() else t for name, t in state.items()}
    save_weights(out, state)
    if c.llm:
        trained["vlm"].llm.model.config.save_pretrained(out / "llm")
        tokenizer.tokenizer.save_pretrained(out / "llm")


def main(argv: list[str] | None = None) -> None:
    """Data, stage 0, stage 1, stage 2, evaluation: a whole run and its folder."""
    start = time.perf_counter()
    argv = sys.argv[1:] if argv is None else argv
    c, resumed = parse_flags(argv)
    check_place(c)
    c.device = find_device(c.device)
    if not scale.launched() and (processes := c.processes or (torch.cuda.device_count() if c.device == "cuda" else 1)) > 1:
        sys.exit(scale.launch(__file__, argv, processes))
    if scale.launched() or c.precision == "bf16":
        scale.join(c.device, alone=not scale.launched())
    try:
        train(c, resumed, start)
    finally:
        if not scale.launched():  # those that are launched end with their process: leaving in disorder may wait for ever
            scale.leave()


def train(c: Config, resumed: bool, start: float) -> None:
    """The run in one process, or this process's part of it."""
    stop, out, first = scale.Stop(), Path(c.out), scale.rank() == 0
    checkpoints = scale.Checkpoints(out / "checkpoints", c.keep)
    if not resumed and scale.saved(checkpoints.folder):
        raise InputError(f"--out {out}: holds checkpoints of an earlier run; go on with `python train.py --resume {out}`, name another --out, or delete "
                         f"{checkpoints.folder}")
    resume, meta = scale.where(checkpoints.folder) if resumed else (None, {})
    progress, sets = Progress(**meta), load_sets(c)
    tokenizer = data.PretrainedTokenizer(c.llm) if c.llm else data.WordTokenizer.from_records(sets["pretrain"][0] + sets["train"][0])
    stage0_start = time.perf_counter()
    with scale.first_alone():
        weights, tflops_stage0 = pretrained_weights(c, sets["train"][0], tokenizer)
    seconds_stage0 = time.perf_counter() - stage0_start
    trained, teachers = prepare(c, sets, tokenizer, weights)
    datasets = build_datasets(c, sets, tokenizer, trained["vlm"].student.num_tokens)
    if first:
        begin(c, out, tokenizer)
    with open(out / "log.jsonl", "r+" if resumed else "w") if first else nullcontext() as log_file:
        if log_file and resumed:
            log_file.truncate(progress.log_bytes)
            log_file.seek(0, 2)
        whole = run_stages(c, trained, teachers, datasets, tokenizer.pad, log_file, progress, checkpoints, stop, resume)
    checkpoints.finish()
    if whole:
        export(c, out, trained, tokenizer)
    vlm = None if is_sharded(c) else trained["vlm"]
    del trained, teachers  # a GPU has no room for them and for what is loaded next
    scale.leave()
    if not first:
        return
    if not whole:
        print(f"stopped by SIGTERM at stage {progress.stage}, step {progress.step}; to go on: python train.py --resume {out}")
        return
    result = report(c, out, sets, tokenizer, vlm) | {
        "seconds": round(time.perf_counter() - start, 1), "seconds_stage0": round(seconds_stage0, 1), "tflops": round(sum(progress.flops.values()) / 1e12, 3),
        "tflops_stage0": round(tflops_stage0, 3), "peak_rss_mb": round(peak_rss_mb()), "seed": c.seed, "skipped": progress.skipped, "cut": progress.cut}
    if c.device == "cuda":
        result["peak_gpu_mb"] = round(torch.cuda.max_memory_allocated() / 2 ** 20)
    data.write_json(out / "result.json", result)
    print_result(result, out)


def begin(c: Config, out: Path, tokenizer) -> None:
    """What a run folder says from its first minute on. The result of an earlier run here goes: it is written last, and says that a run is whole."""
    (out / "result.json").unlink(missing_ok=True)
    data.write_json(out / "config.json", dataclasses.asdict(c))
    libraries = (torch, torchvision, timm, *((sys.modules["transformers"],) if c.llm else ()))
    data.write_json(out / "versions.json", {"python": platform.python_version()} | {m.__name__: m.__version__ for m in libraries})
    if not c.llm:
        data.write_json(out / "vocabulary.json", tokenizer.vocabulary)


def run_stages(c: Config, trained: Trained, teachers: Teachers, datasets: dict[int, data.Conversations], pad: int, log_file, progress: Progress,
               checkpoints: scale.Checkpoints, stop: scale.Stop, resume: Path | None) -> bool:
    """Both stages, or what is left of them; False if a SIGTERM ended the run."""
    groups = parts(trained["vlm"], trained["adapters"], teachers)
    for stage, dataset in datasets.items():
        if stage < progress.stage:
            continue
        if stage > progress.stage:
            progress.stage, progress.step, resume = stage, 0, None
        table = set_trainable(stage, groups, c.student)
        if log_file:
            print(table, flush=True)
        if not run_stage(c, trained, teachers, dataset, pad, log_file, progress, checkpoints, stop, resume):
            return False
    return True


def report(c: Config, out: Path, sets: dict, tokenizer, vlm: VLM | None) -> dict:
    """The pictures of a run and, if it has held-out questions, what it answers them with; a model that was sharded is read back from its folder."""
    plot_curves(out)
    if "eval" not in sets:
        return {}
    vlm = vlm or load_run(out, c.device)[0]
    result, rows, answers = evaluate(c, vlm, tokenizer, *sets["eval"])
    plot_samples(out / "samples.png", rows, answers, sets["eval"][1])
    return result


def peak_rss_mb() -> float:
    """Peak memory of the largest process of the run, this one or one of stage 0, in MB."""
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024


if __name__ == "__main__":
    data.run(main)
