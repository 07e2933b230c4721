"""Memory: sharding what is trained over the processes (FSDP2), and recomputing activations."""

import functools
from collections.abc import Iterable
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from teachers import VisionEncoder

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
    return nullcontext(), restore_held_tensors(block)


@contextmanager
def restore_held_tensors(block: nn.Module):
    """Give back to the block's modules, after the second run, the tensors that they held before it.

    These are MoLE's router probabilities. Those of the second run would hold its graph, which never
    runs backward, and with it the activations of every block so far.
    """
    held = []
    for module in block.modules():
        for name, value in vars(module).items():
            if torch.is_tensor(value):
                held.append((module, name, value))
    try:
        yield
    finally:
        for module, name, value in held:
            setattr(module, name, value)


def shard(root: nn.Module, blocks: Iterable[nn.Module], device: str, world: int,
          bf16: bool) -> None:
    """FSDP2: each process holds a part of every parameter, its gradient and optimizer state.

    All of these are fp32. A block is gathered, in bf16 if asked for, when it runs; what is in no
    block is gathered with the root, whose forward must therefore be the one that is called.
    Gradients are reduced in fp32.
    """
    mesh = init_device_mesh(device, (world,))
    policy = MixedPrecisionPolicy()
    if bf16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in (*blocks, root):
        fully_shard(module.float(), mesh=mesh, mp_policy=policy)


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
