"""Config: every field is a flag (--lambda-kd 0), is saved with the run, and says why it is so.

The defaults stand here and nowhere else. They are the TINY preset, with the method of `--recipe
paper`; SMALL and FULL, below, change names and numbers, never the code that runs.
"""

import dataclasses
from typing import Annotated, Literal, get_origin

import tiny
from data import CaptionEnd
from kd_loss import TeacherWeight, TokenWeight
from mole import BalanceForm, MoleForm, MoleInit, RouterGrad
from teachers import AdapterDirection, AdapterForm, TargetNorm

Count = Annotated[int, (1, 10_000_000)]         # the lowest and the highest value, both included
CountOrZero = Annotated[int, (0, 10_000_000)]   # 0 switches something off
Processes = Annotated[int, (0, 1024)]
Fraction = Annotated[float, (0, 1)]
Weight = Annotated[float, (0, 1e6)]
Dropout = Annotated[float, (0, 0.95)]           # above it hardly anything is learnt


def encoder(spec: str):
    """Make a field that specifies an encoder: a timm name, its resolution, what shrinks it."""
    return dataclasses.field(default=spec, metadata={"encoder": True})


@dataclasses.dataclass
class Config:
    """One run."""
    out: str = "runs/tiny"                  # the run folder
    seed: Annotated[int, (0, 2 ** 32 - 1)] = 0  # sets everything random: weights, order, dropout
    device: Literal["cpu", "cuda", "mps", "auto"] = "cpu"   # "auto": a GPU if any; "mps": Apple's
    # --- data: "" means the built-in tiny world
    data: str = ""                          # stage 2, LLaVA-format JSON
    eval_data: str = ""                     # held-out questions of the same format
    pretrain_data: str = ""                 # stage 1 captions; without it stage 1 uses `data`
    image_folder: str = ""                  # images are relative to it; "": the folder of `data`
    data_root: str = ""                     # LLaVA's two sets, laid out as its docs say
    skip_bad: bool = False                  # leave unusable rows out; else the first is an error
    allow_outside: bool = False             # images may lie outside of the image folder
    allow_new_data: bool = False            # --resume goes on although rows or images have changed
    eval_split: Literal["test", "validation"] = "test"  # tune on validation: test stays unread
    n_pretrain: Count = tiny.COUNTS["pretrain"]  # of the tiny world; reasons in tiny/__init__.py
    n_train: Count = tiny.COUNTS["train"]
    n_described: CountOrZero = tiny.COUNTS["described"]
    n_text: CountOrZero = tiny.COUNTS["text"]
    n_eval: Count = tiny.COUNTS["eval"]
    image_size: Annotated[int, (16, 8192)] = 128  # px of the loader's square image, made into views
    image_views: Literal["one", "each"] = "one"     # "each": each encoder's size, from the original
    caption_end: CaptionEnd = "eos"         # of stage 1's captions; LLaVA's is "newline"
    max_length: Count = 2048                # tokens of a conversation; LLaVA's; longer ones are cut
    group_batches: Count = 1                # batches sorted by length together; 8: little padding
    workers: Processes = 0                  # processes that load images; 0 suits images in memory
    # --- encoders, which differ in width, token count and resolution
    teachers: tuple[str, ...] = ("clip", "eva", "convnext")     # names of the fields below
    clip: str = encoder(tiny.ENCODERS["clip"])          # 36 tokens x 96
    eva: str = encoder(tiny.ENCODERS["eva"])            # 64 x 80
    convnext: str = encoder(tiny.ENCODERS["convnext"])  # 16 x 128
    sam: str = encoder("samvit_large_patch16.sa1b img_size=1024")   # 4096 x 256; not in tiny
    weights: str = ""                       # folder of files named as timm's models; "": timm's hub
    init_from: str = ""                     # LLaVA-1.5, the authors' checkpoint or a run
    init_projector: str = ""                # LLaVA's mm_projector.bin, to start from
    # what of the student learns; "experts": MoLE alone; "frozen" and "ensemble" are baselines
    student: Literal["trained", "experts", "frozen", "ensemble"] = "trained"
    freeze: tuple[str, ...] = ()            # parts that never learn, as a stage's table names them
    lr_scale: tuple[str, ...] = ()          # PART=FACTOR of the learning rate, by the same names
    compile: Literal["off", "on"] = "off"   # torch.compile of all models; for CUDA
    cache_teachers: str = "runs/teachers"   # folder that keeps the teachers' outputs; "": none
    stage0: str = "runs/stage0"             # folder that keeps what stage 0 has trained
    # --- mixture of LoRA experts; "row" is a row of docs/differences.md
    mole_experts: CountOrZero = 3           # E, the paper's; 0: none
    mole_rank: Count = 8                    # r of one expert; 32 at width 1024
    mole_alpha: Weight = 8.0                # LoRA's alpha: the scale is alpha / rank
    mole_dropout: Dropout = 0.0             # released runs 0.05; a run of minutes does without
    mole_form: MoleForm = "ffn"             # row 1
    mole_router_grad: RouterGrad = "straight_through"   # row 2; "none", the formula, trains none
    mole_init: MoleInit = "zero"            # row 3; so that the student starts as CLIP
    # --- loss
    lambda_kd: Weight = 0.5                 # lambda, the weight of L_kd; the paper's
    clip_share: Fraction = 0.8              # CLIP's fixed share of the teacher weights; the paper's
    kd_token_weight: TokenWeight = "paper"                          # row 4
    kd_teacher_weight: TeacherWeight = "paper"                      # row 5
    kd_teacher_grad: Literal["detached", "attached"] = "detached"   # row 6
    kd_collapse: Literal["none", "second_softmax"] = "none"         # row 7
    adapter_form: AdapterForm = "token_mixing"                      # row 8
    adapter_direction: AdapterDirection = "teacher_to_student"      # the other is AM-RADIO's
    target_norm: TargetNorm = "layer"       # of the targets of student_to_teacher
    balance_weight: Weight = 0.0            # row 9; the paper's L_total has no such term
    balance_form: BalanceForm = "per_layer"                         # row 9
    # --- LLM
    prompt: Literal["v1", "chat"] = "v1"    # LLaVA's; "chat": the chat template of the LLM itself
    llm: str = ""                           # folder or hub name of a causal LM; "": the tiny one
    lm_dim: Count = tiny.LLM["dim"]         # D of the tiny one
    lm_depth: Count = tiny.LLM["depth"]
    lm_heads: Count = tiny.LLM["heads"]
    lm_hidden: Count = tiny.LLM["hidden"]   # SwiGLU's inner width, 8/3 of D
    # --- stages
    stage0_scale: Weight = 1.0              # multiplies stage 0's steps; small for a smoke run
    stage0_pictures: Literal["world", "data"] = "world"  # "data": the toys learn the set's own
    distil_epochs: Weight = 0.0             # before stage 1: L_kd alone, no LLM runs; ours alone
    distil_batch: Count = 64                # cheap without an LLM, and the targets are smooth
    distil_lr: Weight = 2e-3                # goes with the batch
    stage1_epochs: Weight = 1.0             # LLaVA's
    stage1_batch: Count = 16                # small: here steps matter more than smooth gradients
    stage1_lr: Weight = 1e-3                # LLaVA's
    stage2_epochs: Weight = 5.0             # LLaVA's is 1, of 665k; here 2,500. 0: left out
    stage2_batch: Count = 16                # likewise
    stage2_lr: Weight = 1e-3                # a 7B LLM wants 2e-5; at width 96 too little
    warmup: Fraction = 0.03                 # of the steps; LLaVA's
    grad_clip: Weight = 1.0                 # norm, against an odd batch; 0: no clipping
    max_steps: CountOrZero = 0              # stop each stage after so many steps; 0: run it all
    # --- machine: no value changes what is computed, except bf16's rounding, L_balance, which
    # counts the tokens of a micro-batch, and the masks that LoRA dropout draws in each process
    processes: Processes = 0                # on this machine; 0: one per GPU, one on a CPU
    micro_batch: CountOrZero = 0            # at most so many samples at once in a process; 0: all
    precision: Literal["fp32", "bf16"] = "fp32"     # of arithmetic; a few CPUs gain too
    recompute: bool = False                 # activation checkpointing: more time, less memory
    save_every: CountOrZero = 0             # steps between checkpoints; 0: only on SIGTERM
    keep: Count = 2                         # checkpoints
    overwrite: bool = False                 # a finished run in the folder may go
    skip_damaged: bool = False              # --resume takes an older checkpoint for a damaged one
    # --- logs and answers
    log_every: Count = 10                   # steps
    tensorboard: str = ""                   # folder for its events, if it is installed; "": none
    max_new_tokens: Count = 16              # of a generated answer; an endless one must end
    eval_batch: Count = 256                 # questions answered at once


STAGES = ("distil", "stage1", "stage2")  # by number: what the names of their fields begin with
STAND_INS = ("clip", "eva", "convnext")  # the encoders that stage 0 can make
ENCODERS = tuple(f.name for f in dataclasses.fields(Config) if f.metadata.get("encoder"))

# What a resumed run may change: the machine, how far its steps go, where the same data lies, and
# how it is evaluated.
MACHINE = ("device", "keep", "log_every", "micro_batch", "processes", "recompute", "save_every",
           "skip_damaged", "tensorboard", "workers")
LEARNING = ("distil_lr", "grad_clip", "stage1_lr", "stage2_lr")
PLACES = ("allow_new_data", "allow_outside", "cache_teachers", "data", "data_root", "eval_data",
          "image_folder", "pretrain_data", "stage0")
RESUME = (*MACHINE, *LEARNING, *PLACES, "eval_batch", "eval_split", "max_new_tokens", "n_eval")
EVALUATION = ("allow_outside", "device", "eval_batch", "eval_data", "eval_split", "image_folder",
              "max_length", "max_new_tokens", "n_eval", "out")  # what an evaluation may change

# What differs from TINY. SMALL is for one consumer GPU, and untuned; FULL has the published values.
LARGER = {
    # field             SMALL                                  FULL
    "out":              ("runs/small",                         "runs/full"),
    "device":           ("auto",                               "cuda"),
    "image_size":       (512,                                  1024),
    "image_views":      ("each",                               "each"),
    "caption_end":      ("newline",                            "newline"),
    "group_batches":    (8,                                    8),
    "workers":          (2,                                    8),
    "clip":             ("vit_base_patch16_clip_quickgelu_224.openai img_size=224",    # 196 x 768
                         "vit_large_patch14_clip_quickgelu_336.openai img_size=336"),  # 576 x 1024
    "eva":              ("eva02_base_patch14_448.mim_in22k_ft_in22k img_size=448",     # 1024 x 768
                         "eva02_large_patch14_448.mim_m38m_ft_in22k img_size=1024 "
                         "patch_size=16"),                                             # 4096 x 1024
    "convnext":         ("convnext_base.clip_laion2b img_size=512",                    # 256 x 1024
                         "convnext_xxlarge.clip_laion2b_soup img_size=1024"),          # 1024 x 3072
    "sam":              ("samvit_base_patch16.sa1b img_size=1024",                     # 4096 x 256
                         "samvit_large_patch16.sa1b img_size=1024"),
    "cache_teachers":   ("",                                   ""),
    "mole_rank":        (32,                                   32),
    "mole_alpha":       (1.0,                                  1.0),
    "mole_dropout":     (0.05,                                 0.05),
    "llm":              ("HuggingFaceTB/SmolLM2-135M-Instruct", "lmsys/vicuna-7b-v1.5"),
    "stage1_epochs":    (1,                                    1),
    "stage1_batch":     (256,                                  256),
    "stage1_lr":        (1e-3,                                 1e-3),
    "stage2_epochs":    (1,                                    1),
    "stage2_batch":     (128,                                  128),
    "stage2_lr":        (1e-4,                                 2e-5),  # narrower: larger steps
    "micro_batch":      (8,                                    16),
    "precision":        ("bf16",                               "bf16"),
    "recompute":        (True,                                 True),
    "save_every":       (500,                                  500),
    "eval_batch":       (16,                                   16),
    "max_new_tokens":   (64,                                   64),
}
TINY = Config()
SMALL = Config(**{name: values[0] for name, values in LARGER.items()})
FULL = Config(**{name: values[1] for name, values in LARGER.items()})
PRESETS = {"tiny": TINY, "small": SMALL, "full": FULL}

RECIPES = {  # --recipe sets all of these; the presets have the paper's
    # field               paper                 released              ours
    "mole_form":          ("ffn",                "fc1_fc2",            "ffn"),
    "mole_router_grad":   ("straight_through",   "none",               "straight_through"),
    "mole_init":          ("zero",               "kaiming",            "zero"),
    "lambda_kd":          (0.5,                  0.5,                  1.0),
    "clip_share":         (0.8,                  0.8,                  0.1),
    "kd_token_weight":    ("paper",              "released",           "paper"),
    "kd_teacher_weight":  ("paper",              "released",           "uniform"),
    "kd_teacher_grad":    ("detached",           "attached",           "detached"),
    "kd_collapse":        ("none",               "second_softmax",     "none"),
    "adapter_form":       ("token_mixing",       "released",           "per_token"),
    "adapter_direction":  ("teacher_to_student", "teacher_to_student", "student_to_teacher"),
    "target_norm":        ("layer",              "layer",              "channel"),
    "distil_epochs":      (0.0,                  0.0,                  4.0),
    "balance_weight":     (0.0,                  0.01,                 0.01),
    "balance_form":       ("per_layer",          "pooled",             "per_layer"),
}
RECIPE_NAMES = ("paper", "released", "ours")


def recipe(name: str) -> dict:
    """Return the fields that a recipe sets, and their values."""
    column = RECIPE_NAMES.index(name)
    return {field: values[column] for field, values in RECIPES.items()}


def references(c: Config) -> list[tuple]:
    """Return figures to compare with, if a run is the tiny preset in whatever recipe: else none."""
    free = (*RECIPES, *MACHINE, "out", "seed", "overwrite", "cache_teachers", "stage0")
    preset = dataclasses.replace(c, **{name: getattr(TINY, name) for name in free})
    return list(tiny.REFERENCES.values()) if preset == TINY else []


def stage_name(stage: int) -> str:
    """Return how a stage is called in words: distil, stage 1, stage 2."""
    return STAGES[stage].replace("stage", "stage ")


def is_real(spec: str) -> bool:
    """Return whether a spec asks for pretrained weights: its timm name has a tag, after a dot."""
    return "." in spec.split()[0]


def flag(name: str) -> str:
    """Return the flag of a field."""
    return "--" + name.replace("_", "-")


def plain_type(field: dataclasses.Field):
    """Return a field's type without its range: str, bool, int, float, tuple or a Literal."""
    if get_origin(field.type) is Literal:
        return field.type
    return getattr(field.type, "__origin__", field.type)  # int of Annotated[int, (1, 9)]
