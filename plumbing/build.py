"""From a Config to what a run is made of: data, tokenizer, weights, models."""

from pathlib import Path

import torch

from data import conversation_ids
from model import VLM, Ensemble, MoVEKD, Student
from plumbing.config import Config
from plumbing.files import read_tensors
from plumbing.sets import image_folder
from real.encoder_weights import find_weights, is_real, load_net
from real.image_files import DiskImages
from real.pretrained_llm import PretrainedLLM
from teachers import ClipEncoder, Teachers, VisionEncoder, build_adapters, build_target_norms
from tiny.llm import TinyLLM, WordTokenizer
from tiny.own_pictures import OWN_MAKERS, OwnPictures
from tiny.pretrain import MAKERS, stage0

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
    makers, pictures = MAKERS, c.stage0_scale
    if c.stage0_pictures == "data":
        # all images have been looked at before
        images = DiskImages(image_folder(c), c.image_size, allow_outside=True)
        makers, pictures = OWN_MAKERS, OwnPictures(records, images)
    for name in toy_encoders(c):
        toys[name] = (makers[name], (getattr(c, name), pictures))
    if not c.llm:
        # an answer about an image that is not shown teaches guessing
        pure = [record for record in records if "image" not in record] or records
        texts = [conversation_ids(record, "v1", tokenizer, n=0)[0] for record in pure]
        llm = (llm_shape(c, tokenizer), texts, tokenizer.pad)
        toys["llm"] = (MAKERS["llm"], llm)
    paths, tflops = stage0(toys, c.stage0_scale)
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
