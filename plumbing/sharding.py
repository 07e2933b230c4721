"""Memory and speed: sharding over the processes (FSDP2), recomputing activations, compiling."""

import functools
import warnings
from collections.abc import Iterable
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from model import VLM, MoVEKD
from mole import mole_layers, router_probs
from plumbing.config import Config
from teachers import Teachers

# torch's warning when a single process loads or saves a checkpoint
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")
# the student returns a view, and nothing changes it in place
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def recompute(blocks: Iterable[nn.Module]) -> None:
    """Checkpoint activations: a block keeps only its input, and runs again in backward."""
    for block in blocks:
        # the contexts of a block's first and second run
        contexts = functools.partial(lambda block: (nullcontext(), restore_probs(block)), block)
        # the method is replaced, and the block not wrapped, so that no parameter's name changes
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False,
                                          context_fn=contexts)


@contextmanager
def restore_probs(block: nn.Module):
    """Give back to a block's MoLE, after its second run, the router probabilities of its first."""
    # those of the second run would hold its graph, and with it the block's activations
    probs = router_probs(block)
    try:
        yield
    finally:  # the second run stops as soon as backward has its tensors
        for layer, p in zip(mole_layers(block), probs, strict=True):
            layer.probs = p


def cast_vlm(vlm: VLM, dtype: torch.dtype) -> None:
    """Convert a VLM to another precision, without the LLM's rotary angles: bf16 is too coarse."""
    for p in vlm.parameters():
        p.data = p.data.to(dtype)


def send_from_first(module: nn.Module, device: str) -> None:
    """Move a module to the device, in every process with the numbers of rank 0."""
    # the others may have built it on the meta device: a machine then holds one copy while loading
    if not dist.is_initialized() or dist.get_world_size() == 1:
        module.to(device)
        return
    sent = {}  # a tensor that two modules share stays one
    for part in module.modules():
        own = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
        for name, tensor in own:
            if isinstance(tensor, DTensor):  # sharded already
                continue
            if tensor not in sent:
                whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                if dist.get_rank() == 0:
                    whole.copy_(tensor.detach())
                dist.broadcast(whole, src=0)
                if isinstance(tensor, nn.Parameter):
                    whole = nn.Parameter(whole, tensor.requires_grad)
                sent[tensor] = whole
            setattr(part, name, sent[tensor])


def compile_parts(model: MoVEKD, teachers: Teachers, **options) -> None:
    """Compile the student, the teachers, and the norms and FFNs of the LLM, for any length T."""
    for encoder in (model.vlm.student, *teachers.encoders.values()):
        encoder.compile(**options)
    for layer in model.vlm.llm.blocks:
        for name in ("input_layernorm", "post_attention_layernorm", "mlp"):
            if hasattr(layer, name):  # Llama's names; another LLM runs as it is
                getattr(layer, name).compile(dynamic=True, **options)


def place_models(model: MoVEKD, teachers: Teachers, c: Config, world: int) -> None:
    """Move all models to their devices, in their precision, sharded and compiled as asked."""
    bf16 = c.precision == "bf16"
    if bf16:
        teachers.bfloat16()
    if c.recompute:
        recompute(model.vlm.blocks)
    if world > 1 or bf16:
        # One unit for the student: all of it is smaller than two blocks of a 7B LLM.
        shard(model, [model.vlm.student, *model.vlm.llm.blocks], c.device, world, bf16)
    else:
        model.float().to(c.device)
    teachers.to(c.device)  # whole on every GPU: cheaper to hold than to gather for every batch
    if c.compile == "on":
        compile_parts(model, teachers)


def shard(root: nn.Module, units: Iterable, device: str, world: int, bf16: bool) -> None:
    """Shard with FSDP2: each process holds a part of every parameter, gradient and Adam state."""
    # All are fp32, with the numbers of rank 0. A unit is gathered when it runs, in bf16 if asked
    # for; the rest is gathered with the root, so the root's forward is the one to call.
    mesh = dist.init_device_mesh(device, (world,))
    policy = MixedPrecisionPolicy(torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32)
    for module in (*units, root):
        module.float()
        send_from_first(module, device)
        fully_shard(module, mesh=mesh, mp_policy=policy)


def refresh_trained(root: nn.Module) -> None:
    """Tell FSDP which parameters train now. Call it at the start of a stage."""
    # below torch 2.14 a unit that was frozen at first has no precision for gradients otherwise
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            module.reshard()


def backward(model: nn.Module, loss: torch.Tensor, last: bool) -> None:
    """Run backward of a micro-batch; processes add up their gradients after the last one."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        loss = loss * dist.get_world_size()  # FSDP averages gradients
    loss.backward()


def gather_full(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor whole that may be sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def full_state(root: nn.Module) -> dict[str, torch.Tensor]:
    """Return all tensors of a model, whole and on the CPU, to rank 0 only."""
    if not isinstance(root, FSDPModule):
        return root.state_dict()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(root, options=options)
