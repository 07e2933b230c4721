"""From a Config to the models of a run. A run imports the half of tiny/ and real/ that it needs."""

from pathlib import Path

import torch
from torch import nn

from model import VLM, Ensemble, MethodOptions, MoVEKD, Student
from plumbing.config import STAND_INS, Config, is_real
from plumbing.files import load_strictly, read_tensors, require_file
from plumbing.sets import image_folder
from teachers import ClipEncoder, Teachers, VisionEncoder, build_adapters, build_target_norms
from tiny.llm import TinyLLM, WordTokenizer


def real_weights(c: Config) -> dict:
    """Return where the weights of the real encoders are."""
    found = {}
    for name in ("clip", *c.teachers):
        if is_real(getattr(c, name)):
            from real.encoder_weights import find_weights
            found[name] = find_weights(getattr(c, name), c.weights)
    return found


def pretrained_weights(c: Config, records: list[dict], tokenizer, resumed: bool = False) -> dict:
    """Return where each model's weights are. Stage 0 makes the missing stand-ins."""
    if resumed:
        return weights_of_run(c)
    found = real_weights(c)
    if not stage0_models(c):
        return found
    from tiny.pretrain import MAKERS, llm_texts, stage0
    makers, pictures = MAKERS, c.stage0_scale
    if c.stage0_pictures == "data":
        from real.image_files import DiskImages
        from tiny.own_pictures import OWN_MAKERS, OwnPictures
        # All images have been checked before, so their places too.
        images = DiskImages(image_folder(c), c.image_size, allow_outside=True)
        makers, pictures = OWN_MAKERS, OwnPictures(records, images)
    jobs = {name: (makers[name], (getattr(c, name), pictures)) for name in stage0_encoders(c)}
    if not c.llm:
        texts = llm_texts(records, tokenizer)
        jobs["llm"] = (MAKERS["llm"], (llm_shape(c, tokenizer), texts, tokenizer.pad))
    return {**found, **stage0(jobs, c.stage0_scale, Path(c.stage0))}


def weights_of_run(c: Config) -> dict:
    """Return the same as `pretrained_weights`, from a run folder, which keeps stage 0's files."""
    own = {name: Path(c.out) / "stage0" / f"{name}.safetensors" for name in stage0_models(c)}
    for path in own.values():
        require_file(path, "; copy the run folder again, with all that is in it")
    return {**real_weights(c), **own}


def stage0_encoders(c: Config) -> list[str]:
    """Return the names of the encoders that stage 0 makes, because they have no weights to load."""
    return [name for name in STAND_INS if not is_real(getattr(c, name))]


def stage0_models(c: Config) -> list[str]:
    """Return the names of all models that stage 0 makes."""
    return stage0_encoders(c) + ([] if c.llm else ["llm"])


def llm_shape(c: Config, tokenizer: WordTokenizer) -> tuple:
    """Return the arguments of TinyLLM."""
    return len(tokenizer.vocabulary), c.lm_dim, c.lm_depth, c.lm_heads, c.lm_hidden


def build_encoder(c: Config, name: str, weights: dict, kind: type | None = None) -> VisionEncoder:
    """Build an encoder of the config, a teacher unless `kind` is Student; random if no weights."""
    kind = kind or (ClipEncoder if name == "clip" else VisionEncoder)
    net = None
    if name in weights:
        from real.encoder_weights import load_net
        net = load_net(getattr(c, name), weights[name])
    return kind(getattr(c, name), net)


def build_teachers(c: Config, weights: dict) -> Teachers:
    """Build the frozen teachers, CLIP first."""
    return Teachers({name: build_encoder(c, name, weights) for name in c.teachers})


def build_student(c: Config, weights: dict) -> Student | Ensemble:
    """Build the student, CLIP with experts; or a baseline's vision side."""
    if c.student == "ensemble":
        return Ensemble(build_teachers(c, weights))
    student = build_encoder(c, "clip", weights, Student)
    if c.mole_experts:
        student.add_experts(form=c.mole_form, num_experts=c.mole_experts, rank=c.mole_rank,
                            alpha=c.mole_alpha, dropout=c.mole_dropout,
                            router_grad=c.mole_router_grad, init=c.mole_init)
    return student


def build_llm(c: Config, released: tuple | None = None, first: bool = True) -> nn.Module | None:
    """Build the real LLM of a run; None for a tiny one. `released`: see `released_config`."""
    if not c.llm:
        return None
    from real.pretrained_llm import PretrainedLLM
    if released:
        return PretrainedLLM(c.llm, released[1])
    # Only rank 0 reads the weights.
    return PretrainedLLM(c.llm) if first else PretrainedLLM.without_weights(c.llm)


def build_vlm(c: Config, tokenizer, weights: dict, llm: nn.Module | None = None) -> VLM:
    """Build the VLM: with weights, a pretrained one. `llm` is a real LLM that is built already."""
    torch.manual_seed(c.seed)
    student = build_student(c, weights)
    language = llm or build_llm(c) or TinyLLM(*llm_shape(c, tokenizer))
    if "llm" in weights:  # of the tiny LLM
        remedy = "delete it, and it is made again"
        load_strictly(language, read_tensors(weights["llm"], remedy),
                      f"{weights['llm']}: does not fit the tiny LLM", f"; {remedy}")
    # Seed again: with experts or without, the projector starts the same.
    torch.manual_seed(c.seed)
    return VLM(student, language, tokenizer.image)


def build_movekd(c: Config, vlm: VLM, teachers: Teachers) -> MoVEKD:
    """Build everything that is trained, with new adapters."""
    torch.manual_seed(c.seed)
    adapters = build_adapters(teachers, vlm.student.num_tokens, vlm.student.dim, c.adapter_form,
                              c.adapter_direction)
    norms = build_target_norms(teachers, c.target_norm)
    student_learns = {"trained": "all", "experts": "experts"}.get(c.student, "nothing")
    options = MethodOptions(
        distil=c.lambda_kd != 0, student_learns=student_learns, freeze=c.freeze,
        clip_share=c.clip_share, token_weight=c.kd_token_weight,
        teacher_weight=c.kd_teacher_weight, detach=c.kd_teacher_grad == "detached",
        collapse=c.kd_collapse == "second_softmax", direction=c.adapter_direction,
        balance_form=c.balance_form)
    return MoVEKD(vlm, adapters, norms, options)
