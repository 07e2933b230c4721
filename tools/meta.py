"""A run's models on the meta device: shapes without numbers, for what can be counted beforehand.

Letters: B samples, n tokens and d width of the student, m teachers, T tokens of the LLM's sequence,
D its width, V its vocabulary, h its heads.
"""

import functools
import gc
from collections.abc import Callable
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from data import InputError
from kd_loss import kd_loss, token_weights
from model import VLM, MoVEKD, next_tokens, text_loss
from plumbing.build import build_movekd, build_teachers, build_vlm
from plumbing.config import Config
from plumbing.sets import training_size
from plumbing.sharding import recompute
from real.pretrained_llm import PretrainedLLM, require_transformers
from teachers import Teachers, VisionEncoder
from tools.measuring import PeakMemory, count_flops

# ------------------------------------------------------------------------------------------------
# Models

LLMS = {  # what the hub's config.json says, so that no hub is needed
    "lmsys/vicuna-7b-v1.5": dict(),  # LlamaConfig's own defaults
    "lmsys/vicuna-13b-v1.5": dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40,
                                  num_attention_heads=40, num_key_value_heads=40),
    "HuggingFaceTB/SmolLM2-135M-Instruct": dict(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True),
    "HuggingFaceTB/SmolLM2-360M-Instruct": dict(
        vocab_size=49152, hidden_size=960, intermediate_size=2560, num_hidden_layers=32,
        num_attention_heads=15, num_key_value_heads=5, tie_word_embeddings=True),
}


class MetaTokenizer:
    """As much of a tokenizer as building a model needs."""

    image = -200
    vocabulary = range(300)


def meta_models(c: Config) -> tuple[MoVEKD, Teachers]:
    """All models of a run without their numbers."""
    with torch.device("meta"):
        llm = PretrainedLLM(c.llm, llm_config(c.llm)) if c.llm else None
        model, teachers = random_models(c, llm)
    return without_values(model), teachers


def random_models(c: Config, llm: PretrainedLLM | None) -> tuple[MoVEKD, Teachers]:
    """All models of a run with random weights, on the device that torch.device names."""
    vlm = build_vlm(c, MetaTokenizer, {}, llm)
    teachers = build_teachers(c, {})
    return build_movekd(c, vlm, teachers), teachers


def without_values(model: MoVEKD) -> MoVEKD:
    """The model with the weights of its loss that do not look at values; they cost nothing."""
    model.token_weight = "paper"
    model.teacher_weight = "uniform"
    return model


def llm_config(name: str):
    """The transformers config of an LLM. Raises InputError if it cannot be had."""
    transformers = require_transformers()
    if name in LLMS:
        return transformers.LlamaConfig(**LLMS[name])
    try:
        return transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError):
        raise InputError(f"--llm {name}: has no config.json that can be read; name a folder with "
                         f"one, or one of {', '.join(LLMS)}") from None


# ------------------------------------------------------------------------------------------------
# FLOPs


@torch.no_grad()
def forward_flops(c: Config, model: MoVEKD, teachers: Teachers, tokens: int) -> dict[str, float]:
    """FLOPs of each model's forward with one sample that has an image; `tokens` is the LLM's T."""
    vlm = model.vlm
    student = vlm.student
    found = {}
    if c.student == "trained":
        found["student"] = encoder_flops(student)
    for name, encoder in teachers.encoders.items():
        found[f"teacher {name}"] = encoder_flops(encoder)
        if name in model.adapters:
            adapter = model.adapters[name]
            V_i = torch.empty(1, encoder.num_tokens, encoder.dim, device="meta")    # (1, n_i, d_i)
            found[f"adapter {name}"] = float(count_flops(lambda: adapter(V_i)))
    V_s = torch.empty(1, student.num_tokens, student.dim, device="meta")            # (1, n, d)
    x = torch.empty(1, tokens, vlm.llm.dim, device="meta")                          # (1, T, D)
    found["projector"] = float(count_flops(lambda: vlm.projector(V_s)))
    found["LLM"] = float(count_flops(lambda: run_llm(vlm, x)))
    return found


def encoder_flops(encoder: VisionEncoder) -> float:
    """FLOPs of an encoder with one image."""
    dtype = next(encoder.parameters()).dtype
    shape = (1, 3, encoder.image_size, encoder.image_size)
    view = torch.empty(shape, device="meta", dtype=dtype)                       # (1, 3, R_i, R_i)
    return float(count_flops(lambda: encoder.net.forward_features(view)))


def run_llm(vlm: VLM, x: torch.Tensor, logits_at: torch.Tensor | None = None) -> torch.Tensor:
    """The LLM on (B, T, D), nothing padded -> (B, T, V), or (B, K, V) with places (K,)

    It runs layer by layer, for transformers' own forward looks at values, which the meta device
    does not have.
    """
    if not isinstance(vlm.llm, PretrainedLLM):
        return vlm.llm(x, None, logits_at=logits_at)                                     # (B, K, V)
    decoder = vlm.llm.model.get_decoder()
    positions = torch.arange(x.shape[1], device="meta")[None]                       # (1, T)
    size = decoder.layers[0].self_attn.head_dim
    # not from the decoder's own module, whose autocast torch 2.11 does not have on meta
    rotary = (x.new_empty(1, x.shape[1], size),) * 2                           # 2 x (1, T, D/h)
    for layer in decoder.layers:
        x = layer(x, attention_mask=None, position_ids=positions,
                  position_embeddings=rotary)                                       # (B, T, D)
    x = decoder.norm(x)                                                             # (B, T, D)
    if logits_at is not None:
        x = x[:, logits_at]                                                            # (B, K, D)
    return vlm.llm.model.get_output_embeddings()(x)                                 # (B, K, V)


def step_flops(c: Config, stage: int, forward: dict[str, float]) -> dict[str, float]:
    """FLOPs of each model in a training step with one sample that has an image.

    Forward once; backward to the inputs as much again (the student's inputs are the images, but in
    stage 1 the experts of its first block want the gradient); to the weights as much again where
    they are trained; blocks that are recomputed, once more.
    """
    blocks = 3 if stage == 2 else 2
    if c.recompute:
        blocks += 1
    times = {"teacher": 1, "adapter": 3, "projector": 3, "student": blocks, "LLM": blocks}
    found = {}
    for name, flops in forward.items():
        kind = name.split()[0]
        if c.lambda_kd or kind not in ("teacher", "adapter"):
            found[name] = times[kind] * flops
    return found


# ------------------------------------------------------------------------------------------------
# Memory


@contextmanager
def fused_attention():
    """Inside, attention is the one operation that a GPU makes of it, on the meta device too.

    Left alone the meta device has no fused kernel and takes attention apart, into (h, T, T) maps
    that no GPU ever makes. The kernels of CUDA and of the CPU keep q, k, v, the output and the
    softmax's logsumexp (B, h, T) for backward. This is the CPU's, for it also takes a mask.
    """
    unfused = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = flash_attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = unfused


def flash_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                    attn_mask: torch.Tensor | None = None, dropout_p: float = 0.0,
                    is_causal: bool = False, scale: float | None = None,
                    enable_gqa: bool = False) -> torch.Tensor:
    """F.scaled_dot_product_attention by its fused kernel: (B, h, T, D/h) -> the same.

    With enable_gqa the keys have fewer heads; the kernel's shapes do not depend on it.
    """
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = attn_mask.to(query.dtype)  # what is added to the scores
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask,
                  scale=scale)[0]                                                   # (B, h, T, D/h)


def activations(c: Config, model: MoVEKD, teachers: Teachers, tokens: int) -> int:
    """Bytes that one more sample in the micro-batch takes at the worst moment of a step.

    They come beside weights, gradients and optimizer. Counted by running the whole loss forward and
    backward with one sample and with two, with fused attention.
    """
    dtype = torch.bfloat16 if c.precision == "bf16" else torch.float32
    if c.recompute:
        recompute(model.vlm.blocks)
    model.to(dtype)
    teachers.to(dtype)
    hooks = []
    for p in model.parameters():
        if p.requires_grad:
            hooks.append(p.register_post_accumulate_grad_hook(drop_gradient))

    peaks = []
    for batch_size in (1, 2):
        gc.collect()
        with fused_attention(), PeakMemory() as memory:
            meta_step(c, model, teachers, batch_size, tokens)
        peaks.append(memory.peak)

    # as they were
    for hook in hooks:
        hook.remove()
    if c.recompute:
        for block in model.vlm.blocks:
            del block.forward
    model.float()
    teachers.float()
    return peaks[1] - peaks[0]


def drop_gradient(p: nn.Parameter) -> None:
    """Gradients have a line of their own in the plan; here they would hide what a sample takes."""
    p.grad = None


def loader_images(c: Config, batch_size: int, make: Callable) -> torch.Tensor | dict:
    """A batch as the loader makes it, (B, 3, R, R), or {R_i: ...}; make(shape) gives a tensor."""
    size = training_size(c)
    if isinstance(size, tuple):
        return {pixels: make((batch_size, 3, pixels, pixels)) for pixels in size}
    return make((batch_size, 3, size, size))


def meta_step(c: Config, model: MoVEKD, teachers: Teachers, batch_size: int, tokens: int) -> None:
    """MoVEKD.forward without what looks at values, and its backward."""
    vlm = model.vlm
    pixels = functools.partial(torch.empty, dtype=torch.uint8, device="meta")
    images = loader_images(c, batch_size, pixels)               # (B, 3, R, R), or a view a size
    ids = torch.zeros(batch_size, tokens, dtype=torch.long, device="meta")      # (B, T)
    outputs = teachers(images, []) if c.lambda_kd else {}                       # m x (B, .)
    V_s = vlm.student(images)                                                   # (B, n, d)
    x = vlm.llm.embed(ids)                                                      # (B, T, D)
    projected = vlm.projector(V_s)                                              # (B, n, D)
    # the words' embeddings go, as they do in VLM.splice
    x = torch.cat([projected.to(x.dtype), x[:, projected.shape[1]:]], dim=1)    # (B, T, D)
    # at worst all that is no image is answers
    places = torch.arange(projected.shape[1], tokens, device="meta")            # (K,)
    L_total = text_loss(run_llm(vlm, x, places), next_tokens(ids)[:, places])   # ()
    if c.lambda_kd:
        student, targets, w_tea = model.match_tokens(V_s, outputs)              # m x (B, n, d) each
        w_tok = token_weights(outputs["clip"].cls_scores, model.token_weight)   # (B, n)
        L_kd, _ = kd_loss(student, targets, w_tok, w_tea)                       # ()
        L_total = L_total + L_kd                                                # ()
    L_total.backward()
