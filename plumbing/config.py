"""Config: every field is a flag (--lambda-kd 0), and is saved with the run.

The comment beside a field is its text in --help. The defaults, which stand nowhere else, are the
TINY preset with the paper's method; SMALL and FULL, below, change names and numbers only.
"""

import dataclasses
from typing import Annotated, Literal

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
Dropout = Annotated[float, (0, 0.95)]           # above it a student hardly learns


def encoder(spec: str):
    """Make a field that specifies an encoder: a timm name, its resolution, what shrinks it."""
    return dataclasses.field(default=spec, metadata={"encoder": True})


@dataclasses.dataclass
class Config:
    """One run."""
    # --- run  [tiny | small | full, other choices]; R, E: may change at --resume, --evaluate
    out: str = "runs/tiny"                  # the run folder
    seed: Annotated[int, (0, 2 ** 32 - 1)] = 0  # of everything random: weights, order, dropout
    device: Literal["cpu", "cuda", "mps", "auto"] = "cpu"   # auto: a GPU if there is one
    # --- data; without --data and --data-root it is the built-in tiny world
    data: str = ""                          # training conversations, LLaVA's JSON format (stage 2)
    eval_data: str = ""                     # held-out questions, the same format
    pretrain_data: str = ""                 # captions for stage 1; without it, --data again
    image_folder: str = ""                  # folder of the images; "": the folder of --data
    data_root: str = ""                     # folder of LLaVA's two sets, laid out as in its docs
    skip_bad: bool = False                  # leave out unusable rows; else the first ends the run
    allow_outside: bool = False             # images may lie outside the image folder
    allow_new_data: bool = False            # resume although rows or images have changed
    eval_split: Literal["test", "validation"] = "test"  # tune on validation: test stays unread
    n_pretrain: Count = tiny.COUNTS["pretrain"]     # captioned images of the tiny world
    n_train: Count = tiny.COUNTS["train"]           # its images with questions and answers
    n_described: CountOrZero = tiny.COUNTS["described"]     # its images with a description
    n_text: CountOrZero = tiny.COUNTS["text"]       # its dialogues without an image
    n_eval: Count = tiny.COUNTS["eval"]             # its held-out images
    image_size: Annotated[int, (16, 8192)] = 128    # px of the loader's square image
    image_views: Literal["one", "each"] = "one"     # each: a view per encoder, from the original
    caption_end: CaptionEnd = "eos"         # ends the captions of stage 1; LLaVA's is newline
    max_length: Count = 2048                # tokens of a conversation, LLaVA's; the rest is cut
    group_batches: Count = 1                # batches sorted by length together; 8: little padding
    workers: Processes = 0                  # processes that load images, per GPU; 0: none
    # --- encoders: a timm name and its options; they differ in width, token count and resolution
    teachers: tuple[str, ...] = ("clip", "eva", "convnext")     # the teachers, clip first
    clip: str = encoder(tiny.ENCODERS["clip"])          # the student starts as its copy
    eva: str = encoder(tiny.ENCODERS["eva"])            # a teacher; 64 tokens x 80 in tiny
    convnext: str = encoder(tiny.ENCODERS["convnext"])  # a teacher; 16 tokens x 128 in tiny
    sam: str = encoder("samvit_large_patch16.sa1b img_size=1024")   # a teacher; 4096 x 256
    weights: str = ""                       # folder of their files; "": timm's hub
    init_from: str = ""                     # start from a run, LLaVA-1.5 or the authors' checkpoint
    init_projector: str = ""                # LLaVA's mm_projector.bin, to start from
    student: Literal["trained", "experts", "frozen", "ensemble"] = "trained"  # what of it learns
    freeze: tuple[str, ...] = ()            # parts that never learn, by the names that a run prints
    lr_scale: tuple[str, ...] = ()          # PART=FACTOR of the learning rate, by those names
    compile: Literal["off", "on"] = "off"   # torch.compile, for CUDA
    cache_teachers: str = "runs/teachers"   # folder for the teachers' outputs; "": no cache
    stage0: str = "runs/stage0"             # folder for the stand-ins that stage 0 has trained
    # --- mixture of LoRA experts (MoLE); "row" is a row of docs/differences.md
    mole_experts: CountOrZero = 3           # how many, E, as in the paper; 0: none
    mole_rank: Count = 8                    # rank of one expert; 32 at width 1024
    mole_alpha: Weight = 8.0                # LoRA's alpha: the scale is alpha / rank
    mole_dropout: Dropout = 0.0             # on the input of each expert
    mole_form: MoleForm = "ffn"             # row 1: where the LoRAs are
    mole_router_grad: RouterGrad = "straight_through"   # row 2: how the router learns
    mole_init: MoleInit = "zero"            # row 3: zero: the student starts as CLIP
    # --- loss: L_total = L_text + lambda L_kd (+ balance_weight L_balance)
    lambda_kd: Weight = 0.5                 # lambda, as in the paper; 0: no distillation
    clip_share: Fraction = 0.8              # CLIP's teacher weight, as in the paper
    kd_token_weight: TokenWeight = "paper"                          # row 4: form of W^tok
    kd_teacher_weight: TeacherWeight = "paper"                      # row 5: form of W^tea
    kd_teacher_grad: Literal["detached", "attached"] = "detached"   # row 6: gradient of W^tea
    kd_collapse: Literal["none", "second_softmax"] = "none"         # row 7: guard of W^tea
    adapter_form: AdapterForm = "token_mixing"                      # row 8: the two-layer MLP
    adapter_direction: AdapterDirection = "teacher_to_student"  # the second: as AM-RADIO's heads
    target_norm: TargetNorm = "layer"       # how such heads' targets are standardised
    balance_weight: Weight = 0.0            # row 9: the paper has no L_balance
    balance_form: BalanceForm = "per_layer"                         # row 9: over which tokens
    # --- LLM
    prompt: Literal["v1", "chat"] = "v1"    # LLaVA's, or the LLM's own chat template
    llm: str = ""                           # folder or hub name of a causal LM; "": the tiny one
    lm_dim: Count = tiny.LLM["dim"]         # width of the tiny LLM
    lm_depth: Count = tiny.LLM["depth"]     # layers of the tiny LLM
    lm_heads: Count = tiny.LLM["heads"]     # attention heads of the tiny LLM
    lm_hidden: Count = tiny.LLM["hidden"]   # inner width of the tiny LLM's SwiGLU, 8/3 of it
    # --- stages: 0 trains the stand-ins, distil the student by L_kd, 1 aligns, 2 finetunes
    stage0_scale: Weight = 1.0              # factor of the steps of stage 0; small for a trial
    stage0_pictures: Literal["world", "data"] = "world"     # data: stand-ins learn from --data
    distil_epochs: Weight = 0.0             # the distillation-only phase, without LLM; ours has 4
    distil_batch: Count = 64                # batch of that phase; large, because no LLM runs
    distil_lr: Weight = 2e-3                # peak learning rate; not tuned in small and full
    stage1_epochs: Weight = 1.0             # epochs of stage 1; as LLaVA
    stage1_batch: Count = 16                # over all processes; small in tiny, for more steps
    stage1_lr: Weight = 1e-3                # peak learning rate; as LLaVA
    stage2_epochs: Weight = 5.0             # 0 leaves stage 2 out; LLaVA's 1 is of 665k samples
    stage2_batch: Count = 16                # over all processes
    stage2_lr: Weight = 1e-3                # peak learning rate; a wider LLM wants a lower one
    warmup: Fraction = 0.03                 # fraction of the steps; as LLaVA
    grad_clip: Weight = 1.0                 # largest norm of the gradient; 0: no clipping
    max_steps: CountOrZero = 0              # end each stage after so many steps; 0: no limit
    # --- machine: same results, except bf16 and, per micro-batch, L_balance, row 7, LoRA dropout
    processes: Processes = 0                # on this machine; 0: one per GPU, or one on the CPU
    micro_batch: CountOrZero = 0            # most samples at once per process; 0: no limit
    precision: Literal["fp32", "bf16"] = "fp32"     # of the arithmetic
    recompute: bool = False                 # activation checkpointing (off: --no-recompute)
    save_every: CountOrZero = 0             # steps between checkpoints; 0: only when stopped
    keep: Count = 2                         # how many checkpoints are kept
    overwrite: bool = False                 # replace a finished run in the folder
    skip_damaged: bool = False              # resume from an older checkpoint if one is damaged
    # --- logs and answers
    log_every: Count = 10                   # a line of the log every so many steps
    tensorboard: str = ""                   # folder for its events, if it is installed; "": none
    max_new_tokens: Count = 16              # longest generated answer
    eval_batch: Count = 256                 # questions answered at once


STAGES = ("distil", "stage1", "stage2")  # by number: the prefixes of their fields
STAND_INS = ("clip", "eva", "convnext")  # the encoders that stage 0 can make
FIELDS = {field.name: field for field in dataclasses.fields(Config)}
ENCODERS = tuple(name for name, field in FIELDS.items() if field.metadata.get("encoder"))

# What a resumed run may change: machine, learning rates, where the same data lies, evaluation.
MACHINE = ("device", "keep", "log_every", "micro_batch", "processes", "recompute", "save_every",
           "skip_damaged", "tensorboard", "workers")
LEARNING = ("distil_lr", "grad_clip", "stage1_lr", "stage2_lr")
RESUME = (*MACHINE, *LEARNING, "allow_new_data", "allow_outside", "cache_teachers", "data",
          "data_root", "eval_batch", "eval_data", "eval_split", "image_folder", "max_new_tokens",
          "n_eval", "pretrain_data", "stage0")
EVALUATION = ("allow_outside", "device", "eval_batch", "eval_data", "eval_split", "image_folder",
              "max_length", "max_new_tokens", "n_eval", "out")  # what an evaluation may change

# What differs from TINY. SMALL is for one consumer GPU, and untuned; FULL has the published values.
BOTH = {"image_views": "each", "caption_end": "newline", "group_batches": 8, "cache_teachers": "",
        "mole_rank": 32, "mole_alpha": 1.0, "mole_dropout": 0.05, "distil_lr": 1e-4,
        "stage1_batch": 256, "stage2_batch": 128, "stage2_epochs": 1, "precision": "bf16",
        "recompute": True, "save_every": 500, "eval_batch": 16, "max_new_tokens": 64}
LARGER = {
    # field             SMALL                                  FULL
    "out":              ("runs/small",                         "runs/full"),
    "device":           ("auto",                               "cuda"),
    "image_size":       (512,                                  1024),
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
    "llm":              ("HuggingFaceTB/SmolLM2-135M-Instruct", "lmsys/vicuna-7b-v1.5"),
    "stage2_lr":        (1e-4,                                 2e-5),  # narrower: larger steps
    "micro_batch":      (8,                                    16),
}
TINY = Config()
SMALL = Config(**BOTH, **{name: values[0] for name, values in LARGER.items()})
FULL = Config(**BOTH, **{name: values[1] for name, values in LARGER.items()})
PRESETS = {"tiny": TINY, "small": SMALL, "full": FULL}

RECIPES = {  # --recipe sets all of these; the presets have the paper's
    # field               paper                 released              ours
    "mole_experts":       (3,                    3,                    0),
    "mole_form":          ("ffn",                "fc1_fc2",            "ffn"),
    "mole_router_grad":   ("straight_through",   "none",               "straight_through"),
    "mole_init":          ("zero",               "kaiming",            "zero"),
    "lambda_kd":          (0.5,                  0.5,                  1.0),
    "clip_share":         (0.8,                  0.8,                  0.1),
    "kd_token_weight":    ("paper",              "released",           "uniform"),
    "kd_teacher_weight":  ("paper",              "released",           "uniform"),
    "kd_teacher_grad":    ("detached",           "attached",           "detached"),
    "kd_collapse":        ("none",               "second_softmax",     "none"),
    "adapter_form":       ("token_mixing",       "released",           "per_token"),
    "adapter_direction":  ("teacher_to_student", "teacher_to_student", "student_to_teacher"),
    "target_norm":        ("layer",              "layer",              "channel"),
    "distil_epochs":      (0.0,                  0.0,                  4.0),
    "balance_weight":     (0.0,                  0.01,                 0.0),
    "balance_form":       ("per_layer",          "pooled",             "per_layer"),
}
RECIPE_NAMES = ("paper", "released", "ours")


def recipe(name: str, c: Config) -> dict:
    """Return the fields that a recipe sets in a preset, and their values."""
    rows = {field: values[RECIPE_NAMES.index(name)] for field, values in RECIPES.items()}
    if name == "released":  # of FULL's ConvNeXt their loader takes timm's default tag
        rows["convnext"] = c.convnext.replace("laion2b_soup ", "laion2b_soup_ft_in1k ")
    return rows


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
    """Return a field's type without its range or choices: str, bool, int, float, tuple, Literal."""
    return getattr(field.type, "__origin__", field.type)  # int of Annotated[int, (1, 9)]
