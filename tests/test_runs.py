"""train.py as a user runs it, and what a run leaves behind."""

import dataclasses
import itertools
import json
import os

import pytest
import torch
from safetensors.torch import load_file

from data import InputError
from plumbing import run_log
from plumbing.checkpoints import Progress
from plumbing.config import references
from plumbing.evaluate import accuracy_per_type, normalise, questions_of, score
from plumbing.files import read_json, write_json
from plumbing.flags import load_config, parse_config
from plumbing.run_folder import read_log
from plumbing.run_log import HeldOut, RunLog
from tests.common import FILES, SHORT, C, assert_same_run, conversation, full_flags, run_here
from tiny import world
from tiny.scenes import QUESTIONS

RESULT = {"macro_accuracy", "accuracy", "blank_accuracy", "majority_accuracy", "chance_accuracy",
          "seconds", "tflops", "peak_rss_mb", "seed"}
LOGGED = ("L_text L_kd L_balance L_total kd_clip kd_eva kd_convnext w_clip w_eva w_convnext "
          "experts lr grad_norm").split()


def assert_total_is_the_sum(line: dict, c) -> None:
    """Check L_total = L_text + lambda_kd L_kd + balance_weight L_balance in a line of the log."""
    expected = line["L_text"] + c.lambda_kd * line["L_kd"] + c.balance_weight * line["L_balance"]
    assert line["L_total"] == pytest.approx(expected, rel=1e-5)


def test_train_tiny_runs_both_stages_and_leaves_a_run_folder(workplace):
    """`train.py --tiny`: two tables, the result as JSON on the last line, all files and settings.

    The weights can be read by whom the umask lets.
    """
    out = (workplace / "output.txt").read_text(encoding="utf-8")
    assert out.count("parameters\n") == 2
    result = read_json(workplace / "runs/tiny/result.json")
    assert json.loads(out.splitlines()[-1].removeprefix("result: ")) == result
    assert set(result) >= RESULT
    assert set(result["accuracy"]) == set(QUESTIONS)
    assert result["tflops"] > 0
    for name in FILES:
        assert (workplace / "runs/tiny" / name).stat().st_size > 0
    for folder in ("tiny", "stage0", "teachers"):
        assert not list((workplace / "runs" / folder).rglob("*.tmp"))
    c = parse_config([*SHORT])
    assert read_json(workplace / "runs/tiny/config.json").keys() == vars(c).keys()
    assert load_config(workplace / "runs/tiny/config.json") == c
    umask = os.umask(0)
    os.umask(umask)
    mode = (workplace / "runs/tiny/model.safetensors").stat().st_mode & 0o777
    assert mode == 0o666 & ~umask


def test_the_log_has_one_line_per_step(workplace):
    """log.jsonl has each step of both stages, every term of the loss, and their sum, L_total."""
    log = read_log(workplace / "runs/tiny")
    steps = [(line["stage"], line["step"]) for line in log]
    assert steps == [(stage, i) for stage in (1, 2) for i in range(4)]
    for key in LOGGED:
        assert any(key in line for line in log), key
    for line in log:
        assert_total_is_the_sum(line, C)
    assert log[0]["kd_clip"] < 1e-6  # the student starts as CLIP; the cache rounds to fp16


def test_no_kd_one_stage_and_no_clipping(workplace):
    """--lambda-kd 0 distils nothing, 0 epochs leave a stage out, --grad-clip 0 does not clip."""
    flags = "--lambda-kd 0 --stage1-epochs 0 --grad-clip 0 --out runs/plain".split()
    run_here(workplace, *SHORT, *flags)
    c = load_config(workplace / "runs/plain/config.json")
    log = read_log(workplace / "runs/plain")
    assert [line["stage"] for line in log] == [2] * 4
    for line in log:
        assert line["L_kd"] == 0
        assert "kd_eva" not in line
        assert_total_is_the_sum(line, c)
    assert log[-1]["L_total"] < log[0]["L_total"]


@pytest.mark.slow
def test_a_set_without_images_trains_the_llm(workplace, capsys):
    """Stage 2 alone, with distillation and its norms, though no picture ever comes."""
    rows = [{"conversations": conversation(f"what is {i}?", "so")} for i in range(20)]
    write_json(workplace / "text.json", rows)
    run_here(workplace, *SHORT, *"--data text.json --eval-data text.json --stage1-epochs 0 "
             "--recipe ours --distil-epochs 0 --out runs/text".split())
    log = read_log(workplace / "runs/text")
    assert [line["stage"] for line in log] == [2] * 4
    assert log[-1]["L_text"] < log[0]["L_text"] and log[-1]["L_kd"] == 0


@pytest.mark.slow
def test_exported_world_trains_bit_for_bit_as_the_built_in(workplace):
    """From LLaVA-format files on disk: the same records and pixels, the same log and weights."""
    world.main(["export", str(workplace / "world"), "--n-pretrain", "128", "--n-train", "64",
                "--n-described", "32", "--n-text", "32", "--n-eval", "12"])
    run_here(workplace, *SHORT, "--out", "runs/disk", "--data", "world/train.json",
             "--eval-data", "world/test.json", "--pretrain-data", "world/pretrain.json",
             "--image-folder", "world")
    assert_same_run(workplace / "runs/disk", workplace / "runs/tiny", "vocabulary.json")


# as in github.com/GT-Vision-Lab/VQA; the last line is ours: other scripts, texts that it empties
EQUAL = """Red.=red|a cat=The cat!|two=2|none=0|1,000=1000|$1,500=$1500|dont=don't|U.S.=us|3.=3|-5=5
    t-shirt=t shirt|red/blue=red blue|first,second=first, second|1,000 t-shirts=1000 tshirts
    A.=A|５０％=50 %|don’t=dont|红色，蓝色。=红 色 蓝色|１，０００=1000|a:b=a : b|｢心｣=心"""
UNEQUAL = """cat=cats|3.5=35|10:30=1030|t-shirt=tshirt|eleven=11|50%=50|first,second=firstsecond
    1,000 t-shirts=1000 t shirts|rock & roll=rock roll|another=other|No.5=no5|.5=5|1 000=1000
    A.=the|A.=|+=-|红=蓝"""


def test_answers_are_compared_as_in_vqa():
    """Case, marks, articles, number words and apostrophes do not count, where VQA says so."""
    for table, expected in ((EQUAL, True), (UNEQUAL, False)):
        for pair in table.replace("\n", "|").split("|"):
            one, other = pair.strip().rsplit("=", 1)
            assert (normalise(one) == normalise(other)) is expected, pair


@pytest.mark.parametrize("answers, given, expected", [
    (None, "dark  red .", 1), (None, "red", 0), (["no"] * 9 + ["Yes."], "yes", 1 / 3),
    (["no"] * 8 + ["yes", "Yes."], "yes", 2 / 3), (["yes"] * 4 + ["no"] * 6, "yes", 1),
    (["yes"] * 10, "dark red", 0), (list("abcdefghij"), "b", 1 / 3), (list("abcdefghi"), "b", 1),
    (["two", "2"], "2", 1), (["red", "red", "blue"], "red", 2 / 3), (["red", "red"], "red", 1)])
def test_several_answers_are_scored_as_in_vqa(answers, given, expected):
    """Three who agree make it right; a short list of different ones is a list of alternatives."""
    record = {"answers": answers, "conversations": conversation("what?", "Dark red.")}
    assert score(questions_of([record])[0], given) == pytest.approx(expected)


def test_accuracy_and_its_baselines():
    """The mean score per type; rare types count as "other"."""
    record = {"conversations": conversation("what?", "Dark red.")}
    rows = questions_of([record] * 10 + [{**record, "type": "rare"}])
    answers = ["dark  red ."] * 5 + ["red"] * 5 + ["dark red."]
    assert accuracy_per_type(rows, answers) == {"other": 100.0, "what?": 50.0}


def test_full_names_a_bad_row(real_folder, llama_folder):
    """`--full` on LLaVA's layout ends at a picture that cannot be read, and names its row."""
    fault = "row 5 .* has a bad image: .*5.png: not a readable image .*; --skip-bad"
    with pytest.raises(InputError, match=fault):
        run_here(real_folder, *full_flags(real_folder, llama_folder), "--out", "runs/bad")


def test_full_runs_on_llavas_layout(full_run):
    """`--full`, four teachers, micro-batches, no held-out set; --skip-bad counts a bad row."""
    log = read_log(full_run)
    steps = [(line["stage"], line["step"]) for line in log]
    assert steps == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2), (2, 3)]
    c = load_config(full_run / "config.json")
    assert c.lambda_kd == 0.5
    for line in log:
        assert_total_is_the_sum(line, c)
    assert {"kd_clip", "kd_eva", "kd_convnext", "kd_sam"} <= set(log[0])
    result = read_json(full_run / "result.json")
    assert log[-1]["skipped"] == result["skipped"] == 1
    assert "macro_accuracy" not in result
    assert not list(full_run.rglob("*.tmp"))


def test_small_runs_with_our_recipe(real_folder, llama_folder):
    """`--small --recipe ours` runs on real encoders' files and LLaVA's layout."""
    flags = "--small --recipe ours --skip-bad --max-steps 1 --out runs/ours".split()
    run_here(real_folder, *full_flags(real_folder, llama_folder)[1:], *flags)
    first, *later = read_log(real_folder / "runs/ours")
    assert [line["stage"] for line in later] == [1, 2]
    assert first["stage"] == 0 and first["L_text"] == 0  # it distils, and asks no LLM
    for name in ("eva", "convnext", "sam"):
        assert 0.5 < first[f"kd_{name}"] < 8  # standardised targets, untrained heads
        assert first[f"w_{name}"] == pytest.approx(0.3)
    tensors = load_file(real_folder / "runs/ours/model.safetensors")
    assert tensors["target_norms.sam.std"].min() > 0


def test_asking_drawing_and_recomputing_change_nothing(workplace, monkeypatch):
    """Neither asked nor drawn, with activation checkpointing: the same log and weights."""
    monkeypatch.setattr(HeldOut, "measure", lambda *_: None)
    monkeypatch.setattr(run_log, "DRAW_SECONDS", 1e9)
    run_here(workplace, *SHORT, "--out", "runs/undrawn", "--recompute")
    assert_same_run(workplace / "runs/undrawn", workplace / "runs/tiny")
    assert not (workplace / "runs/undrawn/held_out.json").exists()


def test_held_out_accuracy_is_asked_at_each_quarter(workplace):
    """Four points per stage; the last is the run's own accuracy, because it has few questions."""
    points = read_json(workplace / "runs/tiny/held_out.json")
    steps = [(point["stage"], point["step"]) for point in points]
    assert steps == [*itertools.product((1, 2), (1, 2, 3, 4))]
    result = read_json(workplace / "runs/tiny/result.json")
    assert points[-1]["accuracy"] == pytest.approx(result["macro_accuracy"])


def test_tensorboard_is_optional(workplace, monkeypatch):
    """Where it is missing, one line says so before any work."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="--tensorboard: the package is not installed"):
        run_here(workplace, *SHORT, "--out", "runs/board", "--tensorboard", "events")


def test_references_are_of_the_unchanged_preset():
    """Another recipe, seed or machine has them; other data, models or steps have not."""
    for flags, count in (("--recipe ours", 3), ("--lambda-kd 0 --seed 3 --micro-batch 4", 3),
                         ("--max-steps 4", 0), ("--n-train 300", 0), ("--student experts", 0)):
        assert len(references(parse_config(["--tiny", *flags.split()]))) == count


def warnings(capsys, folder, experts: list[list[float]], kd_eva, steps: int = 300) -> list[str]:
    """Return the warnings of a stage in which each step has these fractions, and kd_eva(step)."""
    c = dataclasses.replace(C, out=str(folder))
    log = RunLog(c, True, Progress(stage=1), {2: steps}, None)
    for step in range(steps):
        values = {"experts": torch.tensor(experts), "kd_clip": torch.tensor(0.0),
                  "kd_eva": torch.tensor(float(kd_eva(step)))}
        log.warn(2, values, last=step == steps - 1)
    return capsys.readouterr().err.splitlines()


def falling(step: int) -> float:
    return 2.0 - step / 300


def test_a_collapsed_router_is_said_once(capsys, tmp_path):
    """Layer 1's second expert has all tokens for 100 steps: one line, with layer and percentage."""
    line, = warnings(capsys, tmp_path, [[0.5, 0.5], [0.002, 0.998]], falling)
    assert "layer 1: expert 1 has 99.8 % of the tokens, for 100 steps" in line
    assert not warnings(capsys, tmp_path, [[0.5, 0.5], [0.1, 0.9]], falling)
    assert not warnings(capsys, tmp_path, [[1.0]], falling), "one expert has all by design"


def test_a_teacher_that_teaches_nothing_is_said_once(capsys, tmp_path):
    """Its loss is 2 at the start and 2 after 300 steps, or at the end of a shorter stage."""
    sound = [[0.5, 0.5]]
    for steps in (100, 300, 900):
        line, = warnings(capsys, tmp_path, sound, lambda step: 2 + 0.1 * (-1) ** step, steps)
        assert "teacher eva" in line and f"{min(steps, 300)} steps" in line
    assert not warnings(capsys, tmp_path, sound, falling)
    assert not warnings(capsys, tmp_path, sound, lambda step: 2, 99), "too short to tell"


def test_parts_are_frozen_and_slowed(workplace, capsys):
    """In Adam's first step a frozen part keeps every bit, a slowed one moves by its factor."""
    once = [*SHORT, "--stage1-epochs", "0", "--max-steps", "1", "--grad-clip", "0", "--out"]
    some = ["--freeze", "LLM", "projector", "--lr-scale", "student backbone=0.1"]
    weights = []
    for i, flags in enumerate((["--stage2-lr", "0"], [], some)):
        run_here(workplace, *once, f"runs/part{i}", *flags)
        weights.append(load_file(workplace / f"runs/part{i}/model.safetensors"))
    table = capsys.readouterr().out.split("  parameters\n")[-1].splitlines()
    frozen = {line.split("  ")[1] for line in table if line.endswith(" frozen")}
    assert {"LLM", "projector"} < frozen and "student backbone" not in frozen
    for name, start in weights[0].items():
        moved, slowed = weights[1][name] - start, weights[2][name] - start
        factor = 0.1 if "student" in name and not ("lora" in name or "router" in name) else 1.0
        if name.startswith(("vlm.llm", "vlm.projector")):
            factor = 0.0
        torch.testing.assert_close(slowed, factor * moved, atol=1e-6, rtol=0)
        assert factor or not slowed.any()
    with pytest.raises(InputError, match="--freeze projector .*MoLE: nothing .* in stage 1"):
        run_here(workplace, *SHORT, "--lambda-kd", "0", "--out", "runs/part-none",
                 "--freeze", "projector", "student MoLE")
