"""Will it fit, and how long will it take?  Counted on the meta device: no GPU, no weights, no download.

    python -m tools.plan --full                                     # 8 GPUs of 80 GB        (30 s)
    python -m tools.plan --full --gpus 4 --gpu-memory 40 --teachers clip eva
    python -m tools.plan --small --gpus 1 --gpu-memory 24           # every flag of train.py may follow

Letters: P parameters, G GPUs, b samples of a micro-batch.
"""

import argparse
import dataclasses
import gc

import torch
from torch import nn

import data
import train
from data import InputError
from kd_loss import kd_loss, teacher_weights, token_weights
from model import VLM, PretrainedLLM, flop_counter, text_loss
from teachers import Teachers, adapt, adapt_student, build_adapters
from tools import scale
from tools.bench import PeakMemory

ROWS = {1: 558_128, 2: 665_298}     # LLaVA's captions and conversations
TEXT = {1: 30, 2: 200}              # tokens of text a sample, on average: an assumption, for time only; memory is that of --max-length
IMAGES = {1: 1.0, 2: 624_610 / 665_298}     # share of the samples that have one
LLMS = {  # what the hub's config.json says, so that no hub is needed
    "lmsys/vicuna-7b-v1.5": dict(),  # LlamaConfig's own defaults
    "lmsys/vicuna-13b-v1.5": dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, num_key_value_heads=40),
    "HuggingFaceTB/SmolLM2-135M-Instruct": dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                                                num_key_value_heads=3, tie_word_embeddings=True),
    "HuggingFaceTB/SmolLM2-360M-Instruct": dict(vocab_size=49152, hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15,
                                                num_key_value_heads=5, tie_word_embeddings=True),
}


class MetaTokenizer:
    """As much of a tokenizer as building a model needs."""

    image, vocabulary = -200, range(300)


def meta_models(c: train.Config) -> tuple[train.Trained, Teachers]:
    """All models of a run without their numbers."""
    with torch.device("meta"):
        llm = PretrainedLLM(c.llm, llm_config(c.llm)) if c.llm else None
        vlm, teachers = train.build_vlm(c, MetaTokenizer, llm=llm), train.build_teachers(c, {})
        adapters = build_adapters(teachers, vlm.student.num_tokens, vlm.student.dim, c.adapter_form, c.adapter_direction)
    return train.Trained(vlm, adapters), teachers


def llm_config(name: str):
    transformers = data.import_transformers()
    if name in LLMS:
        return transformers.LlamaConfig(**LLMS[name])
    try:
        return transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError):
        raise InputError(f"--llm {name}: has no config.json that can be read; name a folder with one, or one of {', '.join(LLMS)}") from None


def count(parameters) -> int:
    return sum(p.numel() for p in parameters)


def flops(form) -> float:
    with torch.no_grad(), (counter := flop_counter()):
        form()
    return float(counter.get_total_flops())


def forward_flops(c: train.Config, trained: train.Trained, teachers: Teachers, tokens: int) -> dict[str, float]:
    """Of one sample with an image, each model forward: tokens = the sequence of the LLM."""
    vlm, found = trained["vlm"], {}

    def image(encoder):
        return torch.empty(1, 3, encoder.image_size, encoder.image_size, device="meta", dtype=next(encoder.parameters()).dtype)

    if c.student == "trained":
        found["student"] = flops(lambda: vlm.student.net.forward_features(image(vlm.student)))
    for name, encoder in teachers.encoders.items():
        found[f"teacher {name}"] = flops(lambda: encoder.net.forward_features(image(encoder)))
        if name in trained["adapters"]:
            found[f"adapter {name}"] = flops(lambda: trained["adapters"][name](torch.empty(1, encoder.num_tokens, encoder.dim, device="meta")))
    found["projector"] = flops(lambda: vlm.projector(torch.empty(1, vlm.student.num_tokens, vlm.student.dim, device="meta")))
    found["LLM"] = flops(lambda: run_llm(vlm, torch.empty(1, tokens, vlm.llm.dim, device="meta")))
    return found


def run_llm(vlm: VLM, x: torch.Tensor) -> torch.Tensor:
    """(B, T, D) -> (B, T, V), nothing padded. Layer by layer, for transformers' own forward looks at values, which the meta device does not have."""
    if not isinstance(vlm.llm, PretrainedLLM):
        return vlm.llm(x, torch.ones(x.shape[:2], dtype=torch.long, device="meta"))     # (B, T, V)
    decoder, positions = vlm.llm.model.get_decoder(), torch.arange(x.shape[1], device="meta")[None]     # (1, T)
    rotary = decoder.rotary_emb(x, positions)                                           # 2 x (1, T, D/h)
    for layer in decoder.layers:
        x = layer(x, attention_mask=None, position_ids=positions, position_embeddings=rotary)       # (B, T, D)
    return vlm.llm.model.get_output_embeddings()(decoder.norm(x))                       # (B, T, V)


def step_flops(c: train.Config, stage: int, forward: dict[str, float]) -> dict[str, float]:
    """Of one sample with an image: forward once; backward to the inputs as much again (the student's inputs are the images, but in stage 1 the experts of
    its first block want the gradient); to the weights as much again where they are trained; blocks that are recomputed, once more."""
    again = 1 if c.recompute else 0
    times = {"teacher": 1, "adapter": 3, "projector": 3, "student": (3 if stage == 2 else 2) + again, "LLM": (3 if stage == 2 else 2) + again}
    return {name: times[name.split()[0]] * f for name, f in forward.items() if c.lambda_kd or name.split()[0] not in ("teacher", "adapter")}


def activations(c: train.Config, stage: int, trained: train.Trained, teachers: Teachers, tokens: int) -> int:
    """Bytes that one more sample in the micro-batch takes at the worst moment of a step, beside weights, gradients and optimizer: counted by
    running the whole loss forward and backward on the meta device with one sample and with two."""
    dtype = torch.bfloat16 if c.precision == "bf16" else torch.float32
    if c.recompute:
        scale.recompute(trained["vlm"].blocks)
    trained.to(dtype), teachers.to(dtype)
    peaks, hooks = [], [p.register_post_accumulate_grad_hook(drop_gradient) for p in trained.parameters() if p.requires_grad]
    for batch in (1, 2):
        gc.collect()
        with PeakMemory() as memory:
            meta_step(c, trained, teachers, batch, tokens)
        peaks.append(memory.peak)
    for hook in hooks:
        hook.remove()
    if c.recompute:
        for block in trained["vlm"].blocks:
            del block.forward
    trained.float(), teachers.float()
    return peaks[1] - peaks[0]


def drop_gradient(p: nn.Parameter) -> None:
    """Gradients have a line of their own in the plan; here they would hide what a sample takes."""
    p.grad = None


def meta_step(c: train.Config, trained: train.Trained, teachers: Teachers, batch: int, tokens: int) -> None:
    """loss_terms without what looks at values, forward and backward."""
    vlm, adapters = trained["vlm"], trained["adapters"]
    images = torch.empty(batch, 3, c.image_size, c.image_size, dtype=torch.uint8, device="meta")
    ids = torch.zeros(batch, tokens, dtype=torch.long, device="meta")
    visual = vlm.student(images)                                                        # (B, n, d)
    x, projected = vlm.llm.embed(ids), vlm.projector(visual)                            # (B, T, D), (B, n, D)
    x = torch.cat([projected.to(x.dtype), x[:, projected.shape[1]:]], dim=1)            # (B, T, D)
    loss = text_loss(run_llm(vlm, x), ids)
    if c.lambda_kd:
        outputs = teachers(images)
        w_tok = token_weights(outputs["clip"].cls_scores)                               # (B, n)
        if c.adapter_direction == "teacher_to_student":
            V_t = adapt(outputs, adapters)                                              # m x (B, n, d)
            V_s = dict.fromkeys(V_t, visual)                                            # m x (B, n, d)
        else:
            V_s, V_t = adapt_student(visual, outputs, adapters)                         # m x (B, n_i, d_i) both
        loss = loss + kd_loss(V_s, V_t, w_tok, teacher_weights(outputs["clip"].cls, V_t, c.kd_alpha, "uniform"))[0]
    loss.backward()


@dataclasses.dataclass
class Memory:
    """Bytes on one GPU, and the rule of each."""

    parameters: float
    gradients: float
    optimizer: float
    teachers: float
    per_sample: float

    @property
    def fixed(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.teachers


RULES = {
    "parameters": "4 P / G in fp32; sharded, also what is gathered in the arithmetic's precision: all that is in no block, and two blocks",
    "gradients": "4 P_trained / G; with several micro-batches a step, 4 P_trained, for they are added up unsharded; sharded, also one block's",
    "optimizer": "8 P_trained / G: AdamW's two moments",
    "teachers": "P_teacher in the arithmetic's precision; above 500 M parameters shared among G, and one stage of it gathered",
    "activations": "b times what one more sample of --max-length tokens takes at the worst moment, counted on the meta device",
}


def memory(c: train.Config, stage: int, trained: train.Trained, teachers: Teachers, gpus: int, accumulate: bool, per_sample: float) -> Memory:
    width, sharded = 2 if c.precision == "bf16" else 4, gpus > 1 or c.precision == "bf16"
    P, P_trained = count(trained.parameters()), count(p for p in trained.parameters() if p.requires_grad)
    blocks = [count(block.parameters()) for block in trained["vlm"].blocks]
    largest, rest = max(blocks), P - sum(blocks)
    gathered = sharded * width * (rest + 2 * largest)
    gradients = 4 * (P_trained if accumulate and sharded else P_trained / gpus) + sharded * 4 * largest
    held = 0.0
    for encoder in teachers.encoders.values() if c.lambda_kd else ():
        own = count(encoder.parameters())
        if gpus > 1 and own > scale.SHARD_TEACHERS_ABOVE:
            held += width * (own / gpus + max(count(m.parameters()) for m in getattr(encoder.net, "stages", getattr(encoder.net, "blocks", [encoder]))))
        else:
            held += width * own
    return Memory(4 * P / gpus + gathered, gradients, 8 * P_trained / gpus, held, per_sample)


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.0f}" if size > 1e10 else f"{size / 1e9:.2g}"


def plan(c: train.Config, gpus: int, gpu_memory: float, gpu_tflops: float, mfu: float) -> str:
    trained, teachers = meta_models(c)
    vlm = trained["vlm"]
    groups = train.parts(vlm, trained["adapters"], teachers)
    lines = [f"{gpus} GPU(s) of {gpu_memory:g} GB; time at {100 * mfu:g} % of {gpu_tflops:g} TFLOP/s each", "",
             "| model | parameters | TFLOPs forward, one image (LLM: one sample of stage 2) | TFLOPs of a step, stage 1 | stage 2 |", "|---|---|---|---|---|"]
    forward = {stage: forward_flops(c, trained, teachers, vlm.student.num_tokens + TEXT[stage]) for stage in (1, 2)}
    numbers = {"student": count(vlm.student.parameters()), "projector": count(vlm.projector.parameters()), "LLM": count(vlm.llm.parameters()),
               **{name: count(group) for name, group in groups.items() if name.split()[0] in ("adapter", "teacher")}}
    samples = {stage: getattr(c, f"stage{stage}_batch") for stage in (1, 2)}
    images = {stage: samples[stage] * (IMAGES[stage] if c.llm else 1) for stage in (1, 2)}
    per_step = {stage: {name: images[stage] * f for name, f in step_flops(c, stage, forward[stage]).items()} for stage in (1, 2)}
    for stage in (1, 2):  # the others have their text alone
        shown = vlm.student.num_tokens + TEXT[stage]
        per_step[stage]["LLM"] *= 1 + (samples[stage] / images[stage] - 1) * TEXT[stage] / shown
    lines += [f"| {name} | {number:,} | {forward[2].get(name, 0) / 1e12:.4g} | " + " | ".join(f"{per_step[s].get(name, 0) / 1e12:,.4g}" for s in (1, 2)) + " |"
              for name, number in numbers.items()]
    rows = {1: c.n_pretrain, 2: c.n_train + c.n_described + c.n_text} if not (c.llm or c.data_root) else ROWS
    hours = 0.0
    for stage in (1, 2):
        batch, epochs, tflops = samples[stage], getattr(c, f"stage{stage}_epochs"), sum(per_step[stage].values()) / 1e12
        train.set_trainable(stage, groups, c.student)
        tokens = c.max_length if c.llm else vlm.student.num_tokens + TEXT[stage]
        per_sample = activations(c, stage, trained, teachers, tokens)
        alone = memory(c, stage, trained, teachers, gpus, False, per_sample)
        room = 0.9e9 * gpu_memory  # a tenth is lost to fragments, NCCL and the driver
        fits, here = int((room - alone.fixed) // per_sample), -(-batch // gpus)
        if 0 < fits < here:  # then there is more than one micro-batch, which costs memory too
            fits = int((room - memory(c, stage, trained, teachers, gpus, True, per_sample).fixed) // per_sample)
        use = min(here, fits, c.micro_batch or fits)
        accumulate = 0 < use < here
        m = memory(c, stage, trained, teachers, gpus, accumulate, per_sample)
        steps = data.count_steps(rows[stage], batch, epochs)
        steps = min(steps, c.max_steps or steps)
        stage_hours = steps * tflops / (gpus * gpu_tflops * mfu) / 3600
        hours += stage_hours
        lines += ["", f"stage {stage}: {count(p for p in trained.parameters() if p.requires_grad):,} parameters trained; batch {batch}, {here} samples a GPU", "",
                  "| on one GPU | GB |", "|---|---|"]
        values = {"parameters": m.parameters, "gradients": m.gradients, "optimizer": m.optimizer, "teachers": m.teachers,
                  "activations": max(use, 1) * m.per_sample}
        lines += [f"| {name}{f' of {max(use, 1)}' if name == 'activations' else ''} | {gigabytes(value)} |" for name, value in values.items()]
        lines.append(f"| together | {gigabytes(sum(values.values()))} |")
        lines += ["", f"--micro-batch: {fits} fit in nine tenths of the memory; with {use} a step is {-(-here // use)} of them" if fits > 0 else
                  f"DOES NOT FIT: {m.fixed / 1e9:.1f} GB before the first sample; more GPUs (G shares parameters, gradients, optimizer) or a smaller LLM",
                  f"{steps:,} steps of {tflops:,.4g} TFLOPs: {stage_hours:.3g} hours"]
    lines += ["", "P parameters, G GPUs, b samples of a micro-batch; bytes:", *(f"  {name:12} {rule}" for name, rule in RULES.items())]
    return "\n".join([*lines, "", f"together {hours:.3g} hours, {hours * gpus:.3g} GPU hours"])


def main(argv: list[str] | None = None) -> None:
    parser = data.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=8, help="default 8")
    parser.add_argument("--gpu-memory", type=float, default=80, help="GB, default 80")
    parser.add_argument("--gpu-tflops", type=float, default=312, help="of bf16, dense; default 312, an A100's; an H100 has 989")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of it that is reached, default 0.4: an assumption")
    args, rest = parser.parse_known_args(argv)
    if args.gpus < 1 or args.gpu_memory <= 0 or args.gpu_tflops <= 0 or not 0 < args.mfu <= 1:
        parser.error("--gpus, --gpu-memory, --gpu-tflops and --mfu must be above 0, --mfu at most 1")
    print(plan(train.parse_config(rest or ["--full"]), args.gpus, args.gpu_memory, args.gpu_tflops, args.mfu))


if __name__ == "__main__":
    data.run(main)
