"""A run's models on the meta device, which has shapes but no numbers, and the FLOPs of a step.

Letters: B samples, T tokens of the LLM's sequence, D its width, V its vocabulary, h its heads.
"""

import dataclasses
import functools
from collections.abc import Iterable

import torch
from torch import nn

from data import InputError
from model import VLM, MoVEKD
from plumbing.build import build_movekd, build_teachers, build_vlm
from plumbing.config import Config
from plumbing.files import flop_counter
from plumbing.sets import build_tokenizer, load_sets
from real.pretrained_llm import PretrainedLLM, PretrainedTokenizer, require_transformers
from teachers import Teachers

LLMS = {  # from the hub's config.json, so that no hub is needed
    # name                                  V      D     inner  layers heads heads of keys
    "lmsys/vicuna-7b-v1.5":                (32000, 4096, 11008, 32,    32,   32),
    "lmsys/vicuna-13b-v1.5":               (32000, 5120, 13824, 40,    40,   40),
    "HuggingFaceTB/SmolLM2-135M-Instruct": (49152, 576,  1536,  30,    9,    3),
    "HuggingFaceTB/SmolLM2-360M-Instruct": (49152, 960,  2560,  32,    15,   5),
}


def random_models(c: Config, device: str, llm_shape=None) -> tuple[MoVEKD, Teachers]:
    """Build all models of a run with random weights.

    A real LLM has the shape of a transformers config: llm_shape, or its own.
    """
    # The tiny LLM has the words of the data; a real one's number of words stands in its config.
    tokenizer = PretrainedTokenizer if c.llm else build_tokenizer(c, load_sets(c))
    with torch.device(device):
        llm = PretrainedLLM(c.llm, llm_shape or llm_config(c.llm)) if c.llm else None
        vlm = build_vlm(c, tokenizer, {}, llm)
        teachers = build_teachers(c, {})
        return build_movekd(c, vlm, teachers), teachers


def meta_models(c: Config, llm_shape=None) -> tuple[MoVEKD, Teachers]:
    """Build all models of a run on the meta device."""
    # These forms of the loss's weights read no values, and the others cost the same.
    c = dataclasses.replace(c, kd_token_weight="paper", kd_teacher_weight="uniform",
                            kd_collapse="none")
    return random_models(c, "meta", llm_shape)


def llm_config(name: str):
    """Return the transformers config of an LLM. Raises InputError if there is none."""
    transformers = require_transformers()
    if name in LLMS:
        V, D, inner, layers, heads, key_heads = LLMS[name]
        return transformers.LlamaConfig(
            vocab_size=V, hidden_size=D, intermediate_size=inner, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=key_heads,
            tie_word_embeddings="SmolLM2" in name)
    try:
        return transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError):
        raise InputError(f"--llm {name}: has no config.json that can be read; name a folder with "
                         f"one, or one of {', '.join(LLMS)}") from None


def run_llm(vlm: VLM, x: torch.Tensor, logits_at: torch.Tensor | None = None) -> torch.Tensor:
    """Run the LLM on (B, T, D), nothing padded: (B, T, V), or (B, K, V) with logits_at (K,)."""
    if not isinstance(vlm.llm, PretrainedLLM):
        return vlm.llm(x, None, logits_at=logits_at)                                # (B, K, V)
    # Layer by layer, because transformers' own forward looks at numbers. The angles do not come
    # from the decoder's own module, whose autocast torch 2.11 does not have on meta.
    decoder = vlm.llm.model.get_decoder()
    positions = torch.arange(x.shape[1], device="meta")[None]                       # (1, T)
    angles = x.new_empty(1, x.shape[1], decoder.layers[0].self_attn.head_dim)       # (1, T, D/h)
    for layer in decoder.layers:
        x = layer(x, attention_mask=None, position_ids=positions,
                  position_embeddings=(angles, angles))                             # (B, T, D)
    x = decoder.norm(x)                                                             # (B, T, D)
    if logits_at is not None:
        x = x[:, logits_at]                                                         # (B, K, D)
    return vlm.llm.model.get_output_embeddings()(x)                                 # (B, K, V)


def trained(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are trained in the present stage."""
    return [p for p in module.parameters() if p.requires_grad]


def count(parameters: Iterable[nn.Parameter]) -> int:
    """Return how many numbers parameters hold."""
    return sum(p.numel() for p in parameters)


@torch.no_grad()
def forward_flops(c: Config, model: MoVEKD, teachers: Teachers, tokens: int) -> dict[str, float]:
    """Return the FLOPs of each model's forward with one sample; `tokens` is the LLM's T."""
    vlm = model.vlm
    student = vlm.student
    encoders = {f"teacher {name}": encoder for name, encoder in teachers.encoders.items()}
    if c.student == "trained":
        encoders["student"] = student

    # What runs, and on what shape.
    calls = {"projector": (vlm.projector, (1, student.num_tokens, student.dim)),
             "LLM": (functools.partial(run_llm, vlm), (1, tokens, vlm.llm.dim))}
    for name, encoder in encoders.items():
        view = (1, 3, encoder.image_size, encoder.image_size)
        calls[name] = (encoder.net.forward_features, view)
    for name, adapter in model.adapters.items():
        source = teachers.encoders[name]
        if c.adapter_direction == "student_to_teacher":
            source = student
        calls[f"adapter {name}"] = (adapter, (1, source.num_tokens, source.dim))

    flops = {}
    for name, (function, shape) in calls.items():
        with flop_counter() as counter:
            function(torch.empty(shape, device="meta"))
        flops[name] = float(counter.get_total_flops())
    return flops
