"""What one GPU holds while a run trains: what tools.plan counts, and what it has to assume.

Letters: P parameters, G GPUs, b samples of a micro-batch.
"""

import dataclasses

from model import MoVEKD
from plumbing.config import Config
from plumbing.sharding import SHARD_TEACHERS_ABOVE, frozen_units
from teachers import Teachers
from tools.measuring import count

# Memory that no tensor of ours holds. Assumptions: tools.gpu_check measures the first and the last.
CONTEXT = 0.8e9     # CUDA's context with torch's kernels, cuBLAS's and cuDNN's workspaces
NCCL = 1.0e9        # its buffers, with other GPUs: 4 MiB (NCCL_BUFFSIZE) a channel and neighbour
FRAGMENTS = 0.15    # of the activations, the one part whose sizes change: holes between them


@dataclasses.dataclass
class Memory:
    """Bytes on one GPU."""

    parameters: float
    gradients: float
    optimizer: float
    teachers: float
    buffers: float
    per_sample: float
    nccl: float

    @property
    def fixed(self) -> float:
        """Tensors, before the first sample."""
        return (self.parameters + self.gradients + self.optimizer + self.teachers
                + self.buffers)

    def fits(self, gpu_memory: float) -> int:
        """How many samples at once have room in so many GB."""
        # a card of "80 GB" has 80 GiB less what the driver keeps: 84 GB and more
        room = 1e9 * gpu_memory - self.fixed - self.nccl - CONTEXT
        return int(room // ((1 + FRAGMENTS) * self.per_sample))


RULES = {
    "parameters": "4 P / G in fp32; sharded, also what is gathered in the arithmetic's precision: "
                  "all that is in no unit (the student, or a block of the LLM), and two units",
    "gradients": "4 P_trained / G; with several micro-batches a step, 4 P_trained, for they are "
                 "added up unsharded; sharded, also one unit's",
    "optimizer": "8 P_trained / G: AdamW's two moments",
    "teachers": "P_teacher in the arithmetic's precision; above 500 M parameters shared among G, "
                "and one stage of it gathered",
    "buffers": "sharded: a flat copy of what is gathered (all in no unit, and a unit), the same "
               "two gradients in the arithmetic's precision, and the larger in fp32 to reduce",
    "activations": "b times what one more sample of --max-length tokens takes at the worst moment, "
                   "counted on the meta device with fused attention",
    "fragments": f"{FRAGMENTS:g} of the activations: an assumption",
    "CUDA": "context and workspaces: an assumption",
    "NCCL": "its buffers, if G > 1: an assumption",
}


def memory(c: Config, model: MoVEKD, teachers: Teachers, gpus: int, accumulate: bool,
           per_sample: float) -> Memory:
    """RULES, in numbers; `accumulate`: a step has several micro-batches."""
    width = 2 if c.precision == "bf16" else 4
    sharded = gpus > 1 or c.precision == "bf16"
    P, units = sizes(model, trained=False)
    P_trained, units_trained = sizes(model, trained=True)
    outside = P - sum(units)
    outside_trained = P_trained - sum(units_trained)
    parameters = 4 * P / gpus
    gradients = 4 * P_trained / gpus
    buffers = 0.0
    if sharded:
        parameters += width * (outside + sum(units[:2]))
        gradients = (4 * P_trained if accumulate else gradients) + 4 * units_trained[0]
        buffers = (width * (outside_trained + units_trained[0])
                   + 4 * max(outside_trained, units_trained[0]))
    if gpus > 1:  # one alone copies straight to where it is used
        buffers += width * (outside + units[0])
    held = teacher_bytes(teachers, width, gpus) if c.lambda_kd else 0.0
    return Memory(parameters, gradients, 8 * P_trained / gpus, held, buffers, per_sample,
                  NCCL if gpus > 1 else 0.0)


def sizes(model: MoVEKD, trained: bool) -> tuple[int, list[int]]:
    """Parameters of the whole model, and of each unit of sharding, the largest first.

    All of them, or those that are trained.
    """
    found = []
    for module in (model, model.vlm.student, *model.vlm.llm.blocks):
        found.append(count(p for p in module.parameters() if p.requires_grad or not trained))
    return found[0], sorted(found[1:], reverse=True)


def teacher_bytes(teachers: Teachers, width: int, gpus: int) -> float:
    """What the teachers take on one GPU, `width` bytes a parameter."""
    held = 0.0
    for encoder in teachers.encoders.values():
        P = count(encoder.parameters())
        if gpus > 1 and P > SHARD_TEACHERS_ABOVE:
            units = list(frozen_units(encoder)) or [encoder]
            held += width * (P / gpus + max(count(unit.parameters()) for unit in units))
        else:
            held += width * P
    return held


def gigabytes(size: float) -> str:
    """Two digits, or all of a large number's."""
    return f"{size / 1e9:.0f}" if size > 1e10 else f"{size / 1e9:.2g}"


def memory_table(m: Memory, samples: int) -> list[str]:
    """What takes how much of one GPU, with so many samples at once."""
    held = samples * m.per_sample
    tensors = {"parameters": m.parameters, "gradients": m.gradients, "optimizer": m.optimizer,
               "teachers": m.teachers, f"activations of {samples}": held}
    others = {"buffers of gather and reduce": m.buffers, "fragments": FRAGMENTS * held,
              "CUDA's context": CONTEXT, "NCCL": m.nccl}
    rows = {**tensors, "together": sum(tensors.values()), **others,
            "with these": sum(tensors.values()) + sum(others.values())}
    lines = ["| on one GPU | GB |", "|---|---|"]
    return lines + [f"| {name} | {gigabytes(size)} |" for name, size in rows.items()]
