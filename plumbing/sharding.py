"""Memory and speed: sharding over the processes (FSDP2), recomputing activations, compiling."""

import functools
import warnings
from collections.abc import Iterable
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from model import VLM, MoVEKD
from teachers import Teachers, VisionEncoder

# what the student returns is a view, which nobody adds to in place
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")

# parameters; a smaller teacher is cheaper to hold on every GPU than to gather for every batch
SHARD_TEACHERS_ABOVE = 500_000_000


def recompute(blocks: Iterable[nn.Module]) -> None:
    """Activation checkpointing: a block keeps its input only, and runs again in backward.

    It replaces the block's forward method, so that no parameter's name changes.
    """
    for block in blocks:
        contexts = functools.partial(recompute_contexts, block)
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False,
                                          context_fn=contexts)


def recompute_contexts(block: nn.Module) -> tuple:
    """What the first run of a block, and its second, run inside of."""
    return nullcontext(), RestoreHeldTensors(block)


class RestoreHeldTensors:
    """Gives back to a block's modules, after its second run, the tensors that they held before it.

    These are MoLE's router probabilities. Those of the second run would hold its graph, which never
    runs backward, and with it the activations of every block so far. A class, for a block may run a
    second time more than once.
    """

    def __init__(self, block: nn.Module):
        self.block = block
        self.held = []

    def __enter__(self) -> None:
        self.held = []
        for module in self.block.modules():
            for name, value in vars(module).items():
                if torch.is_tensor(value):
                    self.held.append((module, name, value))

    def __exit__(self, *error) -> None:
        for module, name, value in self.held:
            setattr(module, name, value)


def cast_vlm(vlm: VLM, dtype: torch.dtype) -> None:
    """Bring a VLM to another precision, but for the LLM's table of angles.

    bf16 has three digits: at position 700 an angle would be wrong by 0.86.
    """
    vlm.student.to(dtype)
    vlm.projector.to(dtype)
    for p in vlm.llm.parameters():
        p.data = p.data.to(dtype)


def send_from_first(module: nn.Module, device: str) -> None:
    """Bring a module to the device, in every process with the numbers of the first one's.

    In the others it may be on the meta device, where it has none: so a machine holds one copy while
    models are loaded. What is sharded stays as it is.
    """
    first = dist.get_rank() == 0
    made = {}  # a tensor that two modules share stays one
    for part in module.modules():
        own = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
        for name, tensor in own:
            if isinstance(tensor, DTensor):
                continue
            if tensor not in made:
                if first:
                    whole = tensor.detach().to(device).contiguous()
                else:
                    whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                dist.broadcast(whole, src=0)
                if isinstance(tensor, nn.Parameter):
                    whole = nn.Parameter(whole, tensor.requires_grad)
                made[tensor] = whole
            setattr(part, name, made[tensor])


def compile_parts(model: MoVEKD, teachers: Teachers, **options) -> None:
    """torch.compile of the student, the teachers, and what is elementwise in the LLM's layers.

    These are its norms and its FFN; T differs from batch to batch, and is not compiled anew.
    """
    for encoder in (model.vlm.student, *teachers.encoders.values()):
        encoder.compile(**options)
    for layer in model.vlm.llm.blocks:
        for name in ("input_layernorm", "post_attention_layernorm", "mlp"):
            if hasattr(layer, name):  # Llama's names; another LLM runs as it is
                getattr(layer, name).compile(dynamic=True, **options)


def shard(root: nn.Module, units: Iterable[nn.Module], device: str, world: int,
          bf16: bool) -> None:
    """FSDP2: each process holds a part of every parameter, its gradient and optimizer state.

    All of these are fp32, and the numbers are the first process's. A unit is gathered, in bf16 if
    asked for, when it runs; what is in no unit is gathered with the root, whose forward must
    therefore be the one that is called. Gradients are reduced in fp32.
    """
    mesh = init_device_mesh(device, (world,))
    policy = MixedPrecisionPolicy()
    if bf16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in (*units, root):
        module.float()
        if world > 1:
            send_from_first(module, device)
        fully_shard(module, mesh=mesh, mp_policy=policy)


def note_what_trains(root: nn.Module) -> None:
    """Let FSDP see, at the start of a stage, which parameters are trained in it.

    It looks when a unit is gathered for the first time, and torch below 2.14 gives a unit that is
    frozen then no precision for gradients: stage 2 would end at its first backward.
    """
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            module.reshard()


def frozen_units(encoder: VisionEncoder) -> Iterable[nn.Module]:
    """The parts of a teacher that are gathered one by one: its stages or blocks."""
    return getattr(encoder.net, "stages", getattr(encoder.net, "blocks", ()))


def shard_frozen(encoder: VisionEncoder, device: str, world: int) -> None:
    """FSDP2 for a teacher that is too large to be held whole, in the precision that it has."""
    mesh = init_device_mesh(device, (world,))
    for module in (*frozen_units(encoder), encoder):
        fully_shard(module, mesh=mesh)


def gather_full(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that may be sharded, whole."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def full_state(root: nn.Module) -> dict[str, torch.Tensor]:
    """All tensors of a model, whole and on the CPU; only the first process gets them."""
    if not isinstance(root, FSDPModule):
        return root.state_dict()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(root, options=options)
