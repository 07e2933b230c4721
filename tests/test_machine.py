"""Many processes, checkpoints, and memory: none of it changes what is computed."""

import copy
import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from data import InputError, collate
from model import MoVEKD, Student
from mole import mole_layers
from plumbing import sharding
from plumbing.config import Config
from plumbing.flags import load_config
from plumbing.processes import Machine, Step, Weights
from plumbing.run_folder import read_log
from plumbing.sets import build_datasets, build_tokenizer, load_sets, make_loader
from tests import common
from tests.common import SHARED, SHORT, C, assert_same_run, run_here, run_script, whole_method
from tools.plan.memory import PeakMemory

close = torch.testing.assert_close
BF16 = dataclasses.replace(C, precision="bf16")


@pytest.fixture
def sharded_machine():
    """A Machine of one process that shards, as it does for bf16."""
    machine = Machine(BF16)
    yield machine
    machine.leave()


def assert_same_log(a: Path, b: Path) -> None:
    """Check that the numbers of two runs of twenty steps are equal to 1e-5."""
    assert len(read_log(a)) == 20
    for x, y in zip(read_log(a), read_log(b), strict=True):
        assert set(x) == set(y)
        for name in x:
            where = f"{name} at {x['stage']}, {x['step']}"
            close(torch.tensor(x[name]), torch.tensor(y[name]), atol=1e-5, rtol=1e-5, msg=where)


def train_on(folder: Path, processes: int, *flags: str) -> None:
    """Run train.py on so many processes, of which one takes micro-batches of one sample."""
    done = run_script(folder, *flags, "--processes", str(processes), "--micro-batch",
                      str(2 - processes))
    assert done.returncode == 0, done.stderr[-3000:]


def gradients(c: Config, model: MoVEKD, teachers, step: Step) -> dict[str, torch.Tensor]:
    """Return the gradients of L_total over a step, gathered, and the sums of its terms."""
    sums = train.forward_backward(c, model, teachers, step)
    found = {name: sharding.gather_full(p.grad) for name, p in model.named_parameters()}
    return {**found, **sums}


def test_weighted_micro_batches_add_up_to_the_batch(sharded_machine):
    """Micro-batches' gradients and losses, weighted, add up to the batch's; one is text only.

    Sharded, it gets a blank picture beside its text, and nothing changes.
    """
    c = dataclasses.replace(C, balance_form="pooled")   # a mean over images, as L_kd is
    model, teachers, _ = whole_method(c)
    dataset = common.some_conversations(3, 2)
    plain = copy.copy(sharded_machine)
    plain.sharded = False  # a plain model needs no blank picture
    batches = [collate([dataset.sample(i) for i in rows], 0) for rows in ((0, 1), (2, 3), (4,))]
    batch = collate([dataset.sample(i) for i in range(5)], 0)
    undivided = plain.make_step(0, [batch], model.vlm)
    assert undivided.micro_batches[0][1] == Weights(1, 1) == Step.of(batch).micro_batches[0][1]
    expected = gradients(c, copy.deepcopy(model), teachers, undivided)
    sharded = copy.deepcopy(model)
    sharding.shard(sharded, sharded.vlm.blocks, "cpu", 1, bf16=False)
    for own, machine, blank in ((model, plain, 0), (sharded, sharded_machine, 1)):
        step = machine.make_step(0, batches, model.vlm)
        assert (step.counts["images"], step.counts["stop"]) == (3, 0)
        assert sum(weights.text for _, weights in step.micro_batches) == pytest.approx(1)
        assert [weights.images for _, weights in step.micro_batches] == [2 / 3, 1 / 3, 0]
        last = step.micro_batches[2][0]
        assert len(last["input_ids"]) == 1 + blank and (last["images"] is not None) == blank
        close(gradients(c, own, teachers, step), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_our_recipe_on_two_processes(workplace):
    """`--recipe ours`: two processes have the statistics of the targets and losses of one."""
    flags = [*SHORT, *SHARED, "--recipe", "ours"]
    for processes in (1, 2):
        train_on(workplace, processes, *flags, "--out", f"runs/ours{processes}")
    assert_same_log(workplace / "runs/ours1", workplace / "runs/ours2")
    one, two = (load_file(workplace / f"runs/ours{k}/model.safetensors") for k in (1, 2))
    for name in ("target_norms.eva.mean", "target_norms.convnext.std"):
        assert torch.equal(one[name], two[name]) and one[name].abs().max() > 0


def test_two_processes_are_one(two_processes):
    """Two processes with FSDP2 give the losses of one; some step has no image in one of them.

    A checkpoint is saved after every 4 of 10 steps and after stage 1.
    """
    assert_same_log(two_processes / "runs/one", two_processes / "runs/two")
    log = read_log(two_processes / "runs/two")
    assert any(0.0 in layer for line in log for layer in line["experts"])
    c = load_config(two_processes / "runs/two/config.json")
    sets = load_sets(c)
    dataset = build_datasets(c, sets, build_tokenizer(c, sets), 36)[2]
    loader = make_loader(dataset, 2, c.stage2_epochs, c.seed + 2, 0)
    assert 1 in [len(batch["image_names"]) for batch in list(loader)[:10]]
    found = sorted(path.name for path in (two_processes / "runs/two/checkpoints").iterdir())
    steps = ((1, 4), (1, 8), (1, 10), (2, 4), (2, 8))
    assert found == [f"stage{stage}-{step:08}" for stage, step in steps]


@pytest.mark.slow
def test_bad_input_of_many_processes_is_one_line(workplace):
    """An error that every process meets is said once, without traceback or launcher's report."""
    done = run_script(workplace, *SHORT, "--processes", "2", "--max-length", "20",
                      "--out", "runs/bad")
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1
    assert "--max-length is 20" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("run, last, processes", [
    ("two", "stage2-00000008", 2), ("two", "stage1-00000004", 1), ("one", "stage2-00000004", 2)])
def test_two_processes_go_on_from_a_checkpoint(two_processes, run, last, processes):
    """On as many bit for bit; of two in one, and of one in two, with the same losses."""
    name = f"runs/{run}-on-{processes}"
    resumed = shutil.copytree(two_processes / "runs" / run, two_processes / name)
    for checkpoint in (resumed / "checkpoints").iterdir():
        if checkpoint.name > last:      # as if it had been stopped just after that one
            shutil.rmtree(checkpoint)
    train_on(two_processes, processes, "--resume", name)
    assert_same_log(two_processes / "runs/two", resumed)
    if run == "two" and processes == 2:
        assert_same_run(two_processes / "runs/two", resumed)


@pytest.mark.slow
def test_sigterm_saves_and_ends_cleanly(workplace):
    """SIGTERM in a step: it is finished and saved, and --resume ends as the run never stopped."""
    flags = "--stage1-epochs 3 --stage2-epochs 0.25 --max-steps 0".split()
    saving = "--save-every 1 --keep 2 --out runs/stopped".split()
    errors = common.stop(common.start(workplace, *flags, *saving), "SIGTERM")
    assert "--resume runs/stopped" in errors
    assert len(list((workplace / "runs/stopped/checkpoints").iterdir())) == 2
    assert not (workplace / "runs/stopped/result.json").exists()
    run_here(workplace, "--resume", "runs/stopped", "--save-every", "0")
    run_here(workplace, *SHORT, *flags, "--out", "runs/straight")
    assert_same_run(workplace / "runs/stopped", workplace / "runs/straight")


def test_resume_refuses_other_settings(two_processes):
    """A flag that would change what is computed is refused; so is a run without a checkpoint."""
    with pytest.raises(InputError, match="--stage2-epochs: with --resume a run keeps"):
        run_here(two_processes, "--resume", "runs/two", "--stage2-epochs", "1")
    with pytest.raises(InputError, match="runs/tiny/checkpoints: holds no checkpoint"):
        run_here(two_processes, "--resume", "runs/tiny")


def test_a_recomputed_block_leaves_only_its_input():
    """A further block with experts takes its input and its experts' gradients, nothing else."""
    pictures = torch.randint(0, 256, (4, 3, 48, 48), dtype=torch.uint8)
    spec = "vit_base_patch16_clip_quickgelu_224 img_size=48 patch_size=8 embed_dim=64 num_heads=4"
    peaks = []
    for blocks in (4, 8):
        student = Student(f"{spec} depth={blocks + 1}")
        student.requires_grad_(False)   # but for the experts
        student.add_experts(form="ffn", **common.MOLE)
        sharding.recompute(student.net.blocks)
        out = student(pictures)
        layers = mole_layers(student)
        probs = [layer.probs for layer in layers]
        out.sum().backward()
        # not those of a graph that never runs backward
        assert all(layer.probs is p for layer, p in zip(layers, probs, strict=True))
        student.zero_grad()
        with PeakMemory() as memory:
            student(pictures).sum().backward()
        peaks.append(memory.peak)
    trained = [p.numel() for p in student.net.blocks[0].mlp.parameters() if p.requires_grad]
    assert (peaks[1] - peaks[0]) / 4 < 1.1 * 4 * (4 * 37 * 64 + sum(trained))


@pytest.mark.slow
def test_compiled_is_the_same():
    """torch.compile leaves the losses and gradients of the whole method as they are."""
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model, teachers, batch = whole_method()
        if compiled:  # without the code generator, which needs a C++ compiler
            sharding.compile_parts(model, teachers, backend="aot_eager")
        terms = model(batch, teachers)
        loss = common.total_loss(terms)
        loss.backward()
        router = model.vlm.student.net.blocks[0].mlp.router
        norm = model.vlm.llm.layers[0].input_layernorm
        results.append((loss, terms["experts"], router.weight.grad, norm.weight.grad))
    for eager, traced in zip(*results, strict=True):
        close(eager, traced)


def test_bf16_has_fp32_masters(sharded_machine):
    """In bf16 parameters, gradients, optimizer and losses stay fp32; what is frozen has none."""
    model, teachers, batch = whole_method()
    full = common.total_loss(model(batch, teachers))
    model.set_stage(1)
    sharding.place_models(model, teachers, BF16, sharded_machine.world)
    seen = []
    ffn = model.vlm.student.blocks[0].mlp.ffn
    ffn.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    terms = model(batch, teachers)
    loss = common.total_loss(terms)
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    optimizer.step()
    assert seen == [torch.bfloat16]
    assert loss.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in terms.values())
    close(loss, full, rtol=0.02, atol=0)
    for name, p in model.named_parameters():
        learns = any(word in name for word in ("lora", "router", "projector", "adapters"))
        assert p.dtype == torch.float32, name
        assert (p.grad is not None) == learns == (p in optimizer.state), name
        if learns:
            assert p.grad.dtype == optimizer.state[p]["exp_avg"].dtype == torch.float32
