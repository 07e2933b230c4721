"""Memory of one GPU while a run trains: counted on the meta device, and some of it assumed.

Letters: P parameters, G GPUs, b samples of a micro-batch; B samples, n tokens and d width of the
student, m teachers, T tokens of the LLM's sequence, D its width, h its heads, R pixels of an image.
"""

import copy
import gc
import weakref
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data import blank_image, stack_images
from kd_loss import kd_loss, token_weights
from model import MoVEKD, next_tokens, text_loss
from plumbing.config import Config
from plumbing.sets import training_size
from plumbing.sharding import recompute
from teachers import Teachers
from tools.plan.models import count, run_llm, trained

# Memory outside our tensors. Assumptions: tools.gpu_check measures the first and the last.
CONTEXT = 0.8e9     # CUDA's context with torch's kernels, cuBLAS's and cuDNN's workspaces
NCCL = 1.0e9        # its buffers, with other GPUs: 4 MiB (NCCL_BUFFSIZE) per channel and neighbour
FRAGMENTS = 0.15    # of the activations, the only tensors whose sizes change: gaps between them

RULES = f"""P parameters, G GPUs, b samples of a micro-batch; bytes:
  parameters   4 P / G in fp32; sharded, also the gathered ones in the arithmetic's precision: two \
units (a unit is the student, or a block of the LLM), and all that is in no unit
  gradients    4 P_trained / G; with several micro-batches per step 4 P_trained, because they are \
added up unsharded; sharded, also one unit's
  optimizer    8 P_trained / G: AdamW's two moments
  teachers     P_teacher in the arithmetic's precision, whole on every GPU
  buffers      sharded: a flat copy of the gathered (all in no unit, and a unit), the gradients of \
the same two in the arithmetic's precision, and the larger in fp32 to reduce
  activations  b times the memory of one more sample of --max-length tokens at the worst \
moment, counted on the meta device with fused attention
  fragments    {FRAGMENTS:g} of the activations: an assumption
  CUDA         context and workspaces: an assumption
  NCCL         its buffers, if G > 1: an assumption"""


def memory(c: Config, model: MoVEKD, teachers: Teachers, gpus: int,
           accumulate: bool) -> dict[str, float]:
    """Return the bytes on one GPU before the first sample, by RULES.

    `accumulate`: a step has several micro-batches.
    """
    width = 2 if c.precision == "bf16" else 4
    modules = (model, model.vlm.student, *model.vlm.llm.blocks)
    P, *units = [count(module.parameters()) for module in modules]
    P_trained, *units_trained = [count(trained(module)) for module in modules]
    first, second = sorted(units, reverse=True)[:2]
    first_trained = max(units_trained)
    outside = P - sum(units)
    outside_trained = P_trained - sum(units_trained)
    parameters = 4 * P / gpus
    gradients = 4 * P_trained / gpus
    buffers = 0.0
    if gpus > 1 or c.precision == "bf16":  # sharded
        parameters += width * (outside + first + second)
        gradients = (4 * P_trained if accumulate else gradients) + 4 * first_trained
        buffers = (width * (outside_trained + first_trained)
                   + 4 * max(outside_trained, first_trained))
    if gpus > 1:  # a single GPU copies straight to where it is used
        buffers += width * (outside + first)
    return {"parameters": parameters, "gradients": gradients, "optimizer": 8 * P_trained / gpus,
            "teachers": width * count(teachers.parameters()) if c.lambda_kd else 0.0,
            "buffers of gather and reduce": buffers, "CUDA's context": CONTEXT,
            "NCCL": NCCL if gpus > 1 else 0.0}


def samples_that_fit(fixed: dict[str, float], per_sample: float, gpu_memory: float) -> int:
    """Return how many samples at once have room in so many GB beside `fixed`."""
    # a card of "80 GB" has 80 GiB less what the driver keeps: 84 GB and more
    room = 1e9 * gpu_memory - sum(fixed.values())
    return int(room // ((1 + FRAGMENTS) * per_sample))


def memory_table(fixed: dict[str, float], per_sample: float, samples: int) -> list[str]:
    """Return a Markdown table of the memory on one GPU, with so many samples at once."""
    held = samples * per_sample
    rows = {name: fixed[name] for name in ("parameters", "gradients", "optimizer", "teachers")}
    rows[f"activations of {samples}"] = held
    rows["together"] = sum(rows.values())
    rows["buffers of gather and reduce"] = fixed["buffers of gather and reduce"]
    rows["fragments"] = FRAGMENTS * held
    rows.update(fixed)
    rows["with these"] = sum(fixed.values()) + (1 + FRAGMENTS) * held
    lines = ["| on one GPU | GB |", "|---|---|"]
    for name, size in rows.items():
        digits = ".0f" if size > 1e10 else ".2g"
        lines.append(f"| {name} | {size / 1e9:{digits}} |")
    return lines


# ------------------------------------------------------------------------------------------------
# Activations


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all tensors made inside and still alive; `peak` is their largest sum.

    It is for the CPU and the meta device; CUDA has its own counter.
    """

    now = 0
    peak = 0

    def __init__(self):
        super().__init__()
        self.known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # An argument that is new here was made before, or out of sight: it does not count.
        self.note((args, kwargs), counts=False)
        out = function(*args, **kwargs)
        self.note(out, counts=True)
        self.peak = max(self.peak, self.now)
        return out

    def note(self, values, counts: bool) -> None:
        """Note the storages of all tensors in `values`, each once until it is freed."""
        for tensor in tree_leaves(values):
            if torch.is_tensor(tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    size = storage.nbytes() if counts else 0
                    self.known.add(storage._cdata)
                    self.now += size
                    weakref.finalize(storage, self.forget, storage._cdata, size)

    def forget(self, key: int, size: int) -> None:
        """Subtract a storage that is freed."""
        self.known.discard(key)
        self.now -= size


def fused_attention():
    """Return a context in which attention is one operation, as on a GPU.

    By itself the meta device takes attention apart, into (h, T, T) maps that no GPU ever makes. The
    kernels of CUDA and of the CPU keep q, k, v, the output and the softmax's logsumexp (B, h, T)
    for backward.
    """
    return mock.patch.object(F, "scaled_dot_product_attention", flash_attention)


def flash_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                    attn_mask: torch.Tensor | None = None, dropout_p: float = 0.0,
                    is_causal: bool = False, scale: float | None = None,
                    enable_gqa: bool = False) -> torch.Tensor:
    """Run F.scaled_dot_product_attention by the CPU's fused kernel: (B, h, T, D/h) -> the same."""
    # enable_gqa: the keys have fewer heads, which the kernel sees by itself
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask,
                  scale=scale)[0]                                                   # (B, h, T, D/h)


def activations(c: Config, model: MoVEKD, teachers: Teachers, tokens: int) -> int:
    """Return the bytes that one more sample takes at the worst moment of a step.

    They come beside weights, gradients and optimizer. The loss runs forward and backward with one
    sample of `tokens` tokens and with two; the difference is the second sample's.
    """
    dtype = torch.bfloat16 if c.precision == "bf16" else torch.float32
    model = copy.deepcopy(model).to(dtype)
    teachers = copy.deepcopy(teachers).to(dtype)
    if c.recompute:
        recompute(model.vlm.blocks)
    for p in trained(model):
        p.register_post_accumulate_grad_hook(drop_gradient)
    peaks = []
    for batch_size in (1, 2):
        gc.collect()
        with fused_attention(), PeakMemory() as counter:
            meta_step(c, model, teachers, batch_size, tokens)
        peaks.append(counter.peak)
    return peaks[1] - peaks[0]


def drop_gradient(p: nn.Parameter) -> None:
    """Free a gradient, which has a row of its own in the plan."""
    p.grad = None


def loader_images(c: Config, batch_size: int, device: str) -> torch.Tensor | dict:
    """Make a batch of blank pictures as the loader does, (B, 3, R, R) or {R_i: ...}."""
    size = training_size(c)
    with torch.device(device):
        if isinstance(size, tuple):
            picture = {pixels: blank_image(pixels) for pixels in size}
        else:
            picture = blank_image(size)
        return stack_images([picture] * batch_size)


def meta_step(c: Config, model: MoVEKD, teachers: Teachers, batch_size: int, tokens: int) -> None:
    """Run MoVEKD.forward without what looks at numbers, and its backward."""
    vlm = model.vlm
    images = loader_images(c, batch_size, "meta")                   # (B, 3, R, R), or {R_i: ...}
    ids = torch.zeros(batch_size, tokens, dtype=torch.long, device="meta")      # (B, T)
    outputs = teachers(images, []) if c.lambda_kd else {}                       # m x (B, .)
    V_s = vlm.student(images)                                                   # (B, n, d)
    loss = torch.zeros((), device="meta")                                       # ()
    if model.stage > 0:
        x = vlm.llm.embed(ids)                                                  # (B, T, D)
        projected = vlm.projector(V_s)                                          # (B, n, D)
        # The image tokens' embeddings are freed, as they are in VLM.splice.
        x = torch.cat([projected.to(x.dtype), x[:, projected.shape[1]:]], dim=1)    # (B, T, D)
        # At worst all but the image is answers. The logits get no name, so that they are freed.
        logits_at = torch.arange(projected.shape[1], tokens, device="meta")     # (K,)
        loss = text_loss(run_llm(vlm, x, logits_at), next_tokens(ids)[:, logits_at])    # ()
    if c.lambda_kd:
        student, targets, w_tea = model.match_tokens(V_s, outputs)              # m x (B, n, d) each
        w_tok = token_weights(outputs["clip"].cls_scores, "paper")              # (B, n)
        loss = loss + kd_loss(student, targets, w_tok, w_tea)[0]                # ()
    loss.backward()
