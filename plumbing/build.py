"""From a Config to what a run is made of: data, tokenizer, weights, models."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import torch

from data import Conversations, conversation_ids, read_json, stack_images
from model import VLM, Ensemble, MoVEKD, Student
from plumbing.cli import InputError
from plumbing.config import FULL, Config
from plumbing.encoder_weights import find_weights, is_real, load_net
from plumbing.flags import load_config
from plumbing.image_files import DiskImages, Size, load_image, student_size, training_size
from plumbing.launcher import launched, wanted_processes
from plumbing.own_pictures import OWN_MAKERS, own_pictures
from plumbing.pretrained_llm import PretrainedLLM, PretrainedTokenizer
from plumbing.records import keep, place_of, read_records
from plumbing.released_checkpoint import read_released, released_config
from plumbing.run_weights import fill_module, read_run_tensors, tensors_below
from plumbing.teacher_cache import digest
from plumbing.watch import check_tensorboard
from teachers import ClipEncoder, Teachers, VisionEncoder, build_adapters, build_target_norms
from tiny.llm import TinyLLM, WordTokenizer
from tiny.pretrain import MAKERS, stage0
from tiny.tensor_files import read_about, read_tensors
from tiny.world import tiny_set

# ------------------------------------------------------------------------------------------------
# Data

LLAVA_FILES = {  # set: (JSON file, folder of its images), both below --data-root
    "pretrain": ("LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", "LLaVA-Pretrain/images"),
    "train": ("llava_v1_5_mix665k.json", "."),
}
LLAVA_IMAGES = ("LLaVA-Pretrain/images", "coco/train2017", "gqa/images", "ocr_vqa/images",
                "textvqa/train_images", "vg/VG_100K", "vg/VG_100K_2")


def llava_layout(root: Path) -> dict[str, tuple[Path, Path]]:
    """(JSON file, image folder) of LLaVA's 558k captions and 665k conversations under `root`.

    They are laid out as LLaVA's docs/Data.md says. Raises InputError, with the layout, if a part
    is missing.
    """
    files = [file for file, _ in LLAVA_FILES.values()]
    for part in (*files, *LLAVA_IMAGES):
        if not (root / part).exists():
            raise InputError(f"--data-root {root}: has no {part}; LLaVA's layout (its docs/Data.md "
                             f"says where to get each) is {', '.join(files)} and the image folders "
                             f"{', '.join(LLAVA_IMAGES)}")
    return {name: (root / file, root / folder) for name, (file, folder) in LLAVA_FILES.items()}


def load_sets(c: Config) -> dict[str, tuple]:
    """(records, get_image) of "pretrain", "train" and "eval": the one place that knows which."""
    if c.data_root:
        sets = {}
        for name, (file, folder) in llava_layout(Path(c.data_root)).items():
            # too many images to open them all beforehand
            records = read_records(file, folder, c.skip_bad)
            sets[name] = (records, DiskImages(folder, training_size(c), c.allow_outside))
    elif c.data:
        folder = image_folder(c)
        size = training_size(c)
        sets = {"pretrain": checked_set(c, Path(c.pretrain_data or c.data), folder, size),
                "train": checked_set(c, Path(c.data), folder, size)}
    else:
        sets = {"pretrain": tiny_set("pretrain", c.n_pretrain),
                "train": tiny_set("train", c.n_train, c.n_described, c.n_text)}
    held_out = load_eval_set(c)
    if held_out:
        sets["eval"] = held_out
    return sets


def image_folder(c: Config) -> Path:
    """Where the images of --data are."""
    return Path(c.image_folder or Path(c.data).parent)


def load_eval_set(c: Config) -> tuple | None:
    """(records, get_image) of the held-out questions, if there are any."""
    if c.eval_data:
        folder = c.image_folder or Path(c.data or c.eval_data).parent
        return checked_set(c, Path(c.eval_data), Path(folder), student_size(c))
    return None if c.data_root else tiny_set(c.eval_split, c.n_eval)


def checked_set(c: Config, file: Path, folder: Path, size: Size) -> tuple:
    """(records, get_image) of a file whose rows and images are all looked at beforehand."""
    records = read_records(file, folder, c.skip_bad, DiskImages(folder, 16, c.allow_outside))
    return records, DiskImages(folder, size, c.allow_outside)


def build_tokenizer(c: Config, sets: dict[str, tuple]) -> WordTokenizer | PretrainedTokenizer:
    """The LLM's own tokenizer, or for the tiny one a word a token, the words those of the data.

    The words of a run to start from keep their numbers, and new words come after them.
    """
    if c.llm:
        return PretrainedTokenizer(c.llm)
    tokenizer = WordTokenizer.from_records(itertools.chain(sets["pretrain"][0], sets["train"][0]))
    if c.init_from:
        known = read_words(Path(c.init_from))
        new = [word for word in tokenizer.vocabulary if word not in set(known)]
        tokenizer = WordTokenizer(known + new)
    return tokenizer


def read_words(run: Path) -> list[str]:
    """The words of a run's vocabulary.json, in the order of their numbers.

    Raises InputError if it is no such list, or not the one that the run's weights know.
    """
    file = run / "vocabulary.json"
    words = read_json(file)
    well_formed = isinstance(words, list) and all(isinstance(word, str) for word in words)
    if not well_formed or words[:len(WordTokenizer.SPECIAL)] != WordTokenizer.SPECIAL:
        raise InputError(f"{file}: is no list of words as a run leaves it; copy it again")
    for weights in run.glob("model*.safetensors"):
        known = read_about(weights).get("words")
        if known and known != digest(*words):
            raise InputError(f"{file}: has changed since {weights} was written, so its numbers "
                             "mean other words; copy it again")
    return words


def build_datasets(c: Config, sets: dict[str, tuple], tokenizer, n: int) -> dict:
    """{stage: its Conversations}, n image tokens each.

    Stage 1 has captions, prompt "plain", or for want of captions conversations; text alone has
    nothing to align. Stage 2 has conversations, prompt "v1".
    """
    records, get_image = sets["pretrain"]
    pictured = keep(records, [row for row, record in enumerate(records) if "image" in record])
    if not pictured:
        raise InputError(f"{c.pretrain_data or c.data}: no record has an image, so stage 1 has "
                         "nothing to align")
    captions = not c.data or c.pretrain_data
    template = "plain" if captions else "v1"
    return {1: Conversations(pictured, get_image, tokenizer, template, n, c.max_length, c.skip_bad,
                             c.caption_end),
            2: Conversations(*sets["train"], tokenizer, "v1", n, c.max_length, c.skip_bad)}


def check_lengths(c: Config, sets: dict[str, tuple], tokenizer, n: int) -> None:
    """Raise InputError for a prompt that leaves no room for an answer, before anything is trained.

    Of the training rows their first question, of the held-out ones every question.
    """
    files = {"train": c.data or c.data_root, "eval": c.eval_data}
    for name in ("train", "eval"):
        records, _ = sets.get(name, ([], None))
        for row, record in enumerate(records):
            turns = record["conversations"]
            turns = turns[:1] if name == "train" else turns[:-1]
            # a token has at least one character: most rows need not be tokenised
            if sum(len(turn["value"]) for turn in turns) + n + 300 < c.max_length:
                continue
            ids, _ = conversation_ids({**record, "conversations": turns}, "v1", tokenizer, n)
            if len(ids) >= c.max_length and not (name == "train" and c.skip_bad):
                place = f"{files[name] or 'the tiny world'}: {place_of(row, record)}"
                raise InputError(f"{place} has a prompt of {len(ids)} tokens, and --max-length is "
                                 f"{c.max_length}: shorten it or raise the flag")


# ------------------------------------------------------------------------------------------------
# Models


def pretrained_weights(c: Config, records: list[dict], tokenizer) -> tuple[dict, float]:
    """Where each model's weights are, and the TFLOPs of stage 0.

    A real encoder's are in --weights or on the hub, a toy's (and the tiny LLM's) are made by stage
    0 unless they have been. The LLM learns the language of `records`; the vision encoders see the
    tiny world, or with --stage0-pictures data the pictures of `records`.
    """
    wanted = {"clip", *c.teachers}
    found = {}
    toys = {}
    for name in wanted:
        spec = getattr(c, name)
        if is_real(spec):
            found[name] = find_weights(spec, c.weights)
    own = ()
    if c.stage0_pictures == "data":
        own = (own_pictures(records, image_folder(c), c.image_size),)
    makers = OWN_MAKERS if own else MAKERS
    for name in toy_encoders(c):
        toys[name] = (makers[name], (getattr(c, name), c.stage0_scale, *own))
    if not c.llm:
        # an answer about an image that is not shown teaches guessing
        pure = [record for record in records if "image" not in record] or records
        texts = [conversation_ids(record, "v1", tokenizer, n=0)[0] for record in pure]
        llm = (llm_shape(c, tokenizer), c.stage0_scale, texts, tokenizer.pad)
        toys["llm"] = (MAKERS["llm"], llm)
    paths, tflops = stage0(toys)
    return {**found, **paths}, tflops


def toy_encoders(c: Config) -> list[str]:
    """The encoders that stage 0 makes: those that have no weights anywhere."""
    return [name for name in MAKERS if name != "llm" and not is_real(getattr(c, name))]


def llm_shape(c: Config, tokenizer: WordTokenizer) -> tuple:
    """The tiny LLM's arguments."""
    return len(tokenizer.vocabulary), c.lm_dim, c.lm_depth, c.lm_heads, c.lm_hidden


def build_encoder(c: Config, name: str, weights: dict) -> VisionEncoder:
    """One encoder of the config, with its weights if they are given."""
    spec = getattr(c, name)
    kind = ClipEncoder if name == "clip" else VisionEncoder
    return kind(spec, load_net(spec, weights.get(name)))


def build_teachers(c: Config, weights: dict) -> Teachers:
    """The frozen teachers, CLIP first."""
    return Teachers({name: build_encoder(c, name, weights) for name in c.teachers})


def build_student(c: Config, weights: dict) -> Student | Ensemble:
    """The student, CLIP with experts; or a baseline's vision side."""
    if c.student == "ensemble":
        return Ensemble(build_teachers(c, weights))
    student = Student(c.clip, load_net(c.clip, weights.get("clip")))
    if c.mole_experts:
        student.add_experts(form=c.mole_form, num_experts=c.mole_experts, rank=c.mole_rank,
                            alpha=c.mole_alpha, dropout=c.mole_dropout,
                            router_grad=c.mole_router_grad, init=c.mole_init)
    return student


def build_llm(c: Config, released: tuple | None, first: bool) -> PretrainedLLM | None:
    """The real LLM of a run, if it has one; with weights only where they are read.

    `released` is what `released_config` says of the authors' checkpoint, which brings its own.
    """
    if released:
        return PretrainedLLM(c.llm, released[1])
    if c.llm:
        return PretrainedLLM(c.llm) if first else PretrainedLLM.without_weights(Path(c.llm))
    return None


def load_student(run: str | Path) -> tuple[Student, Callable]:
    """The distilled encoder alone, of a run or of the authors' checkpoint; and what reads a photo.

        student, read_photo = load_student("runs/tiny")
        V_s = student(read_photo("photo.png"))              # (1, n, d)

    read_photo(path) gives what the student was trained on, as a batch of one. Raises InputError.
    """
    run = Path(run)
    released = released_config(run)
    if released:
        c = dataclasses.replace(FULL, mole_form="fc1_fc2", **released[0])
    else:
        c = load_config(run / "config.json")
    student = build_student(c, {})
    if isinstance(student, Ensemble):
        raise InputError(f"{run}: is the baseline that sees with all encoders, not one student")
    tensors = read_released(student, run) if released else read_run_tensors(run)
    prefix = "student." if released else "vlm.student."
    fill_module(student, tensors_below(tensors, prefix), run)
    student.loader_size = student_size(c)

    def read_photo(path: str | Path) -> torch.Tensor | dict:
        return stack_images([load_image(Path(path), student.loader_size)])

    return student.float().eval(), read_photo


def build_vlm(c: Config, tokenizer, weights: dict, llm: PretrainedLLM | None = None) -> VLM:
    """The VLM. With weights given, the student starts as CLIP and the LLM as pretrained.

    `llm` is a real LLM that is built already.
    """
    torch.manual_seed(c.seed)
    student = build_student(c, weights)
    if c.llm:
        language = llm or PretrainedLLM(c.llm)
    else:
        language = TinyLLM(*llm_shape(c, tokenizer))
        if "llm" in weights:
            remedy = "delete it, and it is made again"
            language.load_state_dict(read_tensors(weights["llm"], remedy))
    torch.manual_seed(c.seed)  # again: with experts or without, the projector starts the same
    return VLM(student, language, tokenizer.image)


def build_movekd(c: Config, vlm: VLM, teachers: Teachers) -> MoVEKD:
    """Everything that is trained, with its adapters new."""
    torch.manual_seed(c.seed)
    adapters = build_adapters(teachers, vlm.student.num_tokens, vlm.student.dim, c.adapter_form,
                              c.adapter_direction)
    norms = build_target_norms(teachers, c.target_norm)
    return MoVEKD(vlm, adapters, norms, distil=c.lambda_kd != 0, student=c.student,
                  clip_share=c.clip_share, token_weight=c.kd_token_weight,
                  teacher_weight=c.kd_teacher_weight, detach=c.kd_teacher_grad == "detached",
                  collapse=c.kd_collapse == "second_softmax", direction=c.adapter_direction,
                  balance_form=c.balance_form)


def find_device(device: str) -> str:
    """cuda, mps (Apple's GPU) or cpu; "auto" is the first of them that is here."""
    if device != "auto":
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_place(c: Config) -> None:
    """Raise InputError if data or GPU are not there, before any process is started."""
    if c.data_root:
        llava_layout(Path(c.data_root))
    elif not c.data and is_real(c.clip):
        raise InputError("a real CLIP and no data: name --data-root DIR for LLaVA's sets, or "
                         "--data FILE and --eval-data FILE")
    if c.stage0_pictures == "data" and not (c.data and toy_encoders(c)):
        raise InputError("--stage0-pictures data: trains the toy encoders of --tiny on the "
                         "pictures of --data FILE --eval-data FILE; name them, or leave the flag "
                         "out")
    check_tensorboard(c)
    if c.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no GPU here; --device cpu runs the same, "
                         "slowly, and `python -m tools.plan` says what GPUs it wants")
    if c.device == "mps" and not torch.backends.mps.is_available():
        raise InputError("--device mps: torch finds no Apple GPU here; --device auto takes what "
                         "there is")


def check_mps(c: Config) -> None:
    """Raise InputError for training that Apple's GPU cannot do: torch shards nothing on it."""
    if c.device != "mps":
        return
    if c.precision == "bf16":
        raise InputError("--device mps: trains in fp32 only; add --precision fp32, or --device cpu")
    if launched() or wanted_processes(c) > 1:
        raise InputError("--device mps: one process has the GPU; leave --processes out, or give "
                         "--device cpu")
