"""Many processes, checkpoints, and memory: none of it changes what is computed."""

import copy
import dataclasses
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from data import InputError, collate
from model import MoVEKD
from plumbing.sets import make_loader
from plumbing.flags import load_config
from plumbing.processes import Machine, Step, Weights
from plumbing.run_folder import read_log
from plumbing.sets import build_datasets, build_tokenizer, load_sets
from plumbing.sharding import compile_parts, gather_full, place_models, shard, shard_frozen
from tests.common import (C, HERE, SHARED, SHORT, assert_same_run, images, run_here, run_script,
                          some_conversations, tiny_teachers, total_loss, whole_method)

close = torch.testing.assert_close
BF16 = dataclasses.replace(C, precision="bf16")


@pytest.fixture
def sharded_machine():
    """A Machine of one process that shards, as it does for bf16."""
    machine = Machine(BF16)
    yield machine
    machine.leave()


def assert_same_log(a: Path, b: Path) -> None:
    """The numbers of two runs of twenty steps are equal to 1e-5."""
    assert len(read_log(a)) == 20
    for x, y in zip(read_log(a), read_log(b), strict=True):
        assert set(x) == set(y)
        for name in x:
            place = f"{name} at {x['stage']}, {x['step']}"
            close(torch.tensor(x[name]), torch.tensor(y[name]), atol=1e-5, rtol=1e-5, msg=place)


# ------------------------------------------------------------------------------------------------
# Processes


def test_weighted_micro_batches_add_up_to_the_batch():
    """Weights.apply: the micro-batches' means, so weighted, add up to the batch's own.

    L_text by answer tokens, all else by images, a text-only micro-batch among them; L_balance and
    the experts' fractions only if the balance loss is a mean over images.
    """
    c = dataclasses.replace(C, balance_form="pooled")
    model, teachers, _ = whole_method(c)
    dataset = some_conversations(3, 2)
    machine = Machine(C)
    batches = [collate([dataset.sample(i) for i in rows], 0) for rows in ((0, 1), (2, 3), (4,))]
    step = machine.make_step(0, batches, model.vlm)
    assert (step.counts["images"], step.counts["stop"]) == (3, 0)
    assert sum(weights.text for _, weights in step.micro_batches) == pytest.approx(1)
    assert [weights.images for _, weights in step.micro_batches] == [2 / 3, 1 / 3, 0]
    divided = train.forward_backward(c, model, teachers, step)
    batch = collate([dataset.sample(i) for i in range(5)], 0)
    undivided = machine.make_step(0, [batch], model.vlm)
    assert undivided.micro_batches[0][1] == Weights(1, 1) == Step.of(batch).micro_batches[0][1]
    for name, term in train.forward_backward(c, model, teachers, undivided).items():
        close(divided[name], term)


@pytest.mark.slow
def test_our_recipe_on_two_processes_and_resumed(workplace):
    """`--recipe ours`: two processes have the statistics and the losses of one.

    A resumed run takes the statistics from its checkpoint, whatever is measured, and ends as the
    straight run: same log, same weights, the statistics among them.
    """
    flags = [*SHORT, *SHARED, "--recipe", "ours", "--save-every", "5", "--keep", "9"]
    done = run_script(workplace, *flags, "--out", "runs/ours2", "--processes", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    run_here(workplace, *flags, "--out", "runs/ours1", "--micro-batch", "1")
    assert_same_log(workplace / "runs/ours1", workplace / "runs/ours2")
    one, two = (load_file(workplace / f"runs/ours{k}/model.safetensors") for k in (1, 2))
    for name in ("target_norms.eva.mean", "target_norms.convnext.std"):
        assert torch.equal(one[name], two[name]) and one[name].abs().max() > 0
    shutil.copytree(workplace / "runs/ours1", workplace / "runs/ours1b")
    for path in (workplace / "runs/ours1b/checkpoints").iterdir():
        if path.name > "stage1-00000005":
            shutil.rmtree(path)
    run_here(workplace, "--resume", "runs/ours1b")
    assert_same_run(workplace / "runs/ours1", workplace / "runs/ours1b")


def test_two_processes_are_one(two_processes):
    """Two processes with FSDP2 give the losses of one process with the same batch, both stages.

    One micro-batch of each here, two micro-batches one after the other there; with a text-only
    sample as all that one of them has, and an expert that gets no token.
    """
    run_here(two_processes, *SHORT, *SHARED, "--out", "runs/one", "--micro-batch", "1")
    assert_same_log(two_processes / "runs/one", two_processes / "runs/two")
    log = read_log(two_processes / "runs/two")
    assert any(0.0 in layer for line in log for layer in line["experts"])
    c = load_config(two_processes / "runs/two/config.json")
    sets = load_sets(c)
    dataset = build_datasets(c, sets, build_tokenizer(c, sets), 36)[2]
    loader = make_loader(dataset, 2, c.stage2_epochs, c.seed + 2, 0)
    pictured = [len(batch["image_names"]) for batch in list(loader)[:10]]
    assert set(pictured) <= {0, 1, 2}
    assert 1 in pictured


def test_micro_batches_are_the_undivided_batch(two_processes):
    """With a balance loss that is a mean over images, dividing a batch changes no number."""
    pooled = [*SHORT, *SHARED, "--balance-form", "pooled"]
    run_here(two_processes, *pooled, "--out", "runs/undivided")
    run_here(two_processes, *pooled, "--out", "runs/divided", "--micro-batch", "1")
    assert_same_log(two_processes / "runs/undivided", two_processes / "runs/divided")


@pytest.mark.slow
def test_bad_input_of_many_processes_is_one_line(workplace):
    """An error that every process meets is said once, without traceback or launcher's report."""
    done = run_script(workplace, *SHORT, "--processes", "2", "--max-length", "20",
                      "--out", "runs/bad")
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1
    assert "--max-length is 20" in done.stderr
    assert "Traceback" not in done.stderr


# ------------------------------------------------------------------------------------------------
# Checkpoints


def copy_until(folder: Path, source: str, run: str, last: str) -> None:
    """A copy of a run that looks as if it had been stopped just after a checkpoint."""
    shutil.copytree(folder / "runs" / source, folder / "runs" / run)
    for path in (folder / "runs" / run / "checkpoints").iterdir():
        if path.name > last:
            shutil.rmtree(path)


@pytest.fixture(scope="module")
def one_of_two(two_processes):
    """runs/b: two processes to the middle of stage 1, then one."""
    copy_until(two_processes, "two", "b", "stage1-00000004")
    run_here(two_processes, "--resume", "runs/b", "--micro-batch", "1", "--processes", "1")
    return two_processes / "runs/b"


def test_checkpoints_are_saved_every_so_many_steps_and_after_stage_1(two_processes):
    """--save-every 4 of 10 steps a stage; --keep 9 keeps them all."""
    found = sorted(path.name for path in (two_processes / "runs/two/checkpoints").iterdir())
    steps = ((1, 4), (1, 8), (1, 10), (2, 4), (2, 8))
    assert found == [f"stage{stage}-{step:08}" for stage, step in steps]


def test_two_processes_go_on_as_one(one_of_two, two_processes):
    """A checkpoint of two processes goes on in one, mid stage 1, with the same losses."""
    assert_same_log(two_processes / "runs/two", one_of_two)


@pytest.mark.slow
def test_one_process_goes_on_as_two(one_of_two, two_processes):
    """A checkpoint of one process goes on in two, mid stage 2, with the same losses."""
    copy_until(two_processes, "b", "d", "stage2-00000004")  # written by one process
    done = run_script(two_processes, "--resume", "runs/d", "--micro-batch", "0",
                      "--processes", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_log(two_processes / "runs/two", two_processes / "runs/d")


def test_resumed_on_as_many_processes_it_is_the_straight_run(two_processes):
    """Bit for bit, log and weights."""
    copy_until(two_processes, "two", "c", "stage2-00000008")
    done = run_script(two_processes, "--resume", "runs/c", "--processes", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(two_processes / "runs/c", two_processes / "runs/two")


@pytest.mark.slow
def test_sigterm_saves_and_ends_cleanly(workplace):
    """SIGTERM in the middle of a step: the step is finished, saved, exit status 3.

    --resume ends as the run that was never stopped; only the last --keep checkpoints stay.
    """
    flags = [*SHORT, *"--stage1-epochs 3 --stage2-epochs 0.25 --max-steps 0".split()]
    saving = "--save-every 1 --keep 2 --out runs/stopped".split()
    process = subprocess.Popen([sys.executable, str(HERE / "train.py"), *flags, *saving],
                               cwd=workplace, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, encoding="utf-8")
    for line in process.stdout:
        if line.startswith("stage 1 step 3 "):
            process.send_signal(signal.SIGTERM)
            break
    _, errors = process.communicate()
    assert process.returncode == 3
    assert "stopped by SIGTERM at stage 1, step " in errors
    assert "--resume runs/stopped" in errors
    assert len(list((workplace / "runs/stopped/checkpoints").iterdir())) == 2
    assert not (workplace / "runs/stopped/result.json").exists()
    run_here(workplace, "--resume", "runs/stopped", "--save-every", "0")
    run_here(workplace, *flags, "--out", "runs/straight")
    assert_same_run(workplace / "runs/stopped", workplace / "runs/straight")


def test_resume_refuses_other_settings(two_processes):
    """A resumed run keeps its config: a flag that would change what is computed is refused.

    So is a run without a checkpoint, and a new run whose folder holds a finished one.
    """
    with pytest.raises(InputError, match="--stage2-lr: with --resume a run keeps"):
        run_here(two_processes, "--resume", "runs/two", "--stage2-lr", "1")
    with pytest.raises(InputError, match="runs/tiny/checkpoints: holds no checkpoint"):
        run_here(two_processes, "--resume", "runs/tiny")
    with pytest.raises(InputError, match="--out runs/two: holds a finished run"):
        run_here(two_processes, *SHORT, "--out", "runs/two")


# ------------------------------------------------------------------------------------------------
# Memory and speed


def test_recomputing_changes_nothing(workplace):
    """Activation checkpointing gives the same log and weights, bit for bit."""
    run_here(workplace, *SHORT, "--out", "runs/recomputed", "--recompute")
    assert_same_run(workplace / "runs/recomputed", workplace / "runs/tiny")


@pytest.mark.slow
def test_compiled_is_the_same():
    """torch.compile leaves the losses and gradients of the whole method as they are.

    It is traced by dynamo and AOT autograd, without its code generator, which would need a C++
    compiler here.
    """
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model, teachers, batch = whole_method()
        if compiled:
            compile_parts(model, teachers, backend="aot_eager")
        terms = model(batch, teachers)
        loss = total_loss(terms)
        loss.backward()
        router = model.vlm.student.net.blocks[0].mlp.router
        norm = model.vlm.llm.layers[0].input_layernorm
        results.append((loss, terms["experts"], router.weight.grad, norm.weight.grad))
    for eager, traced in zip(*results, strict=True):
        close(eager, traced)


def gradients(machine: Machine, model: MoVEKD, teachers, batches: list[dict]) -> tuple:
    """The gradients of L_total over some micro-batches, gathered, and the sums of the terms."""
    step = machine.make_step(0, batches, model.vlm)
    sums = train.forward_backward(C, model, teachers, step)
    return {name: gather_full(p.grad) for name, p in model.named_parameters()}, sums


def test_a_last_micro_batch_without_image_loses_no_gradient(sharded_machine):
    """Sharded, with gradients reduced after the last micro-batch only, and that one text alone.

    Every gradient and loss is that of the plain run. A sample with a blank picture stands in,
    whose image terms have weight 0 and whose words are not learnt.
    """
    model, teachers, _ = whole_method()
    dataset = some_conversations(2, 1)
    batches = [collate([dataset.sample(i) for i in rows], 0) for rows in ((0, 1), (2,))]
    step = sharded_machine.make_step(0, batches, model.vlm)
    assert step.counts["images"] == 2
    batch, weights = step.micro_batches[1]
    assert batch["images"].shape == (1, 3, C.image_size, C.image_size)
    assert len(batch["input_ids"]) == len(batches[1]["input_ids"]) + 1
    assert weights.images == 0
    sharded = copy.deepcopy(model)
    shard(sharded, sharded.vlm.blocks, "cpu", 1, bf16=False)
    found, found_sums = gradients(sharded_machine, sharded, teachers, batches)
    plain = copy.copy(sharded_machine)
    plain.sharded = False  # a plain model needs no stand-in
    step = plain.make_step(0, batches, model.vlm)
    assert [batch["images"] is None for batch, _ in step.micro_batches] == [False, True]
    expected, expected_sums = gradients(plain, model, teachers, batches)
    for name, gradient in expected.items():
        close(found[name], gradient, atol=1e-5, rtol=1e-5)
    for name, value in expected_sums.items():
        close(found_sums[name], value, atol=1e-5, rtol=1e-5)


def test_bf16_has_fp32_masters(sharded_machine):
    """With bf16, parameters, gradients and optimizer state are fp32, arithmetic is bf16.

    Losses are fp32 and close to fp32's; in stage 1 what is frozen has neither gradient nor
    optimizer state.
    """
    model, teachers, batch = whole_method()
    full = total_loss(model(batch, teachers))
    model.set_stage(1)
    place_models(model, teachers, BF16, sharded_machine.world)
    seen = []
    ffn = model.vlm.student.blocks[0].mlp.ffn
    ffn.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    terms = model(batch, teachers)
    loss = total_loss(terms)
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


def test_a_sharded_teacher_is_the_teacher(sharded_machine):
    """A teacher that is too large to be held whole, gathered stage by stage, gives its tokens."""
    teachers = tiny_teachers()
    expected = teachers(images(2), [])
    for name in ("eva", "convnext"):
        shard_frozen(teachers.encoders[name], "cpu", 1)
    for name, output in teachers(images(2), []).items():
        close(output.tokens, expected[name].tokens)
    stages = teachers.encoders["convnext"].net.stages
    assert all(hasattr(p, "full_tensor") for p in stages.parameters())
