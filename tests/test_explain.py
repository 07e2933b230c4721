"""tools.explain, tools.lesson and tools.walk: each number is the method's; a page stands alone."""

import base64
import contextlib
import io
import math
import re

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from data import InputError
from mole import router_probs
from plumbing.build import build_vlm, pretrained_weights
from plumbing.sets import load_eval_set, load_sets
from tests.common import SHORT, run_here
from tools import lesson, walk
from tools.explain.__main__ import main
from tools.explain.numbers import cls_attention, make_batch, measure
from tools.explain.whole_run import load_whole_run


def explain(out, *argv) -> str:
    """Return the page that the tool writes to `out`, each run of white space as one space."""
    main([*map(str, argv), "--out", str(out)])
    return " ".join((out / "explain.html").read_text(encoding="utf-8").split())


@pytest.fixture(scope="module")
def page(workplace, tmp_path_factory):
    """(The folder of the short run's page, the page)."""
    out = tmp_path_factory.mktemp("explained")
    with contextlib.chdir(workplace):
        return out, explain(out, "runs/tiny")


@pytest.fixture(scope="module")
def sample(workplace):
    """(The run, a batch of its first held-out question, the teachers' outputs of it)."""
    with contextlib.chdir(workplace):
        run = load_whole_run(workplace / "runs/tiny", "cpu")
    records, get_image = load_eval_set(run.c)
    batch = make_batch(run, records[0], get_image(records[0]["image"]), "right")
    return run, batch, run.teachers(batch["images"], ["x"])


def test_a_whole_run_has_its_adapters_and_its_start(workplace, sample, monkeypatch):
    """Every tensor of the file is in the model; the start is the VLM that training began with."""
    monkeypatch.chdir(workplace)
    run, _, _ = sample
    stored = load_file(workplace / "runs/tiny/model.safetensors")
    weights = pretrained_weights(run.c, load_sets(run.c)["train"][0], run.tokenizer)
    first = build_vlm(run.c, run.tokenizer, weights).state_dict()
    for module, expected in ((run.model, stored), (run.start.vlm, first)):
        torch.testing.assert_close(dict(module.state_dict()), dict(expected), rtol=0, atol=0)
    assert not run.start.adapters["eva"].out.weight.equal(run.model.adapters["eva"].out.weight)


def test_the_numbers_are_those_of_the_method(sample):
    """Each number of the page = the slow obvious form, and L_kd = MoVEKD.forward's."""
    run, batch, outputs = sample
    numbers = measure(run, run.model, batch)
    w_tok = outputs["clip"].cls_scores[0, :, 1:].softmax(dim=-1).mean(dim=0).tolist()
    total = 0.0
    for name, V_t in numbers.targets.items():
        loss = 0.0
        for j in range(36):
            mse = sum((a - b) ** 2 for a, b in zip(V_t[j], numbers.V_s[j], strict=True)).item() / 96
            assert numbers.errors[name][j].item() == pytest.approx(mse, rel=1e-4)
            loss += (w_tok[j] + 1 / 36) * mse
        assert numbers.teacher_losses[name] == pytest.approx(loss, rel=1e-4)
        total += numbers.w_tea[name] * loss
    assert numbers.terms["L_kd"] == pytest.approx(total, rel=1e-4)
    seen = [word.loss for word in numbers.words if word.answer]
    assert len(seen) == (batch["labels"] != -100).sum()
    assert numbers.terms["L_text"] == pytest.approx(sum(seen) / len(seen), rel=1e-5)
    assert sum(word.count for word in numbers.words) == batch["input_ids"].shape[1]
    for chosen, p in zip(numbers.experts, router_probs(run.model.vlm.student), strict=True):
        assert chosen.tolist() == [max(range(3), key=row.__getitem__) for row in p[0].tolist()]


def test_the_numbers_of_the_attention(sample):
    """Each = its formula on a sorted list; n x max of the released form is below e."""
    run, batch, outputs = sample
    attention = cls_attention(run.model.vlm.student, outputs, batch["images"])
    w_tok = attention.weights["paper"].tolist()
    order = sorted(range(36), key=w_tok.__getitem__, reverse=True)
    heaviest = [w_tok[j] for j in order]
    assert attention.top == list(zip(order, heaviest, strict=True))[:5]
    assert sum(heaviest[:attention.half - 1]) < 0.5 <= sum(heaviest[:attention.half])
    entropy = -sum(w * math.log(w) for w in w_tok) / math.log(36)
    assert attention.entropy["paper"] == pytest.approx(entropy, rel=1e-4)
    assert attention.n_max["paper"] == pytest.approx(36 * heaviest[0])
    assert attention.n_max["released"] < math.e
    assert attention.n_max["uniform"] == pytest.approx(1)
    assert attention.entropy["released"] > 0.999


def test_the_page_stands_alone(page):
    """Each picture lies in it with a text; nothing is loaded, no script runs; tables add up."""
    out, html = page
    pictures = re.findall(r'<img class="\w*" alt="(.{10,}?)" src="data:image/png;base64,(.*?)">',
                          html)
    assert len(pictures) == html.count("<img") == 35
    files = {file.read_bytes() for file in (out / "explain").glob("*.png")}
    assert {base64.b64decode(png) for _, png in pictures} == files
    assert {Image.open(io.BytesIO(png)).format for png in files} == {"PNG"}
    assert not re.search(r"https?://|url\(|@import|<script", html)
    assert html.count("<section") == 11 and html.count('type="radio"') == 2
    assert html.count("<math ") == html.count("</math>") == 10
    assert "Of 6 x 6 patches, [CLS] of the frozen CLIP looks most at" in html
    tables = re.findall(r"<table>(?:(?!</table>).)*their sum.*?</table>", html)
    assert len(tables) == 4     # L_kd and L_total, before and after
    for table in tables:
        *products, total = (float(x) for x in re.findall(r">([\d.]+)</td></tr>", table))
        assert total == pytest.approx(sum(products), abs=3e-5)


@pytest.mark.slow
@pytest.mark.parametrize("flags,text,errors", [
    ("--lambda-kd 0", "This run was trained without distillation", 2),      # only CLIP is shown
    ("--recipe ours", "H(V^s) for eva as colours, 8 x 8 tokens", 6)])
def test_the_page_of_other_runs(flags, text, errors, workplace, photo, tmp_path, monkeypatch):
    """Without distillation; with heads on the student's side; a row too many is one line."""
    monkeypatch.chdir(workplace)
    run_here(workplace, *SHORT, *flags.split(), "--out", f"runs/explain{errors}")
    assert text in explain(tmp_path, f"runs/explain{errors}", photo)
    assert len(list((tmp_path / "explain").glob("error-*.png"))) == errors
    with pytest.raises(InputError, match="--row 99: the held-out set has 12 pictures"):
        main(["runs/tiny", "--row", "99"])


def test_the_authors_checkpoint(released_folder, photo, tmp_path):
    """Panels without teachers or start say so, others are there; a question is never markup."""
    html = explain(tmp_path, released_folder, photo, "--question", "what <i>shape</i>?")
    assert html.count("holds neither teachers nor adapters") == 5
    assert "[CLS] of the student looks" in html
    assert 'type="radio"' not in html       # no tabs
    assert "what &lt;i&gt;shape&lt;/i&gt;?" in html and "<i>shape" not in html
    assert (tmp_path / "explain/experts-1.png").exists()


def printed(capsys, *argv) -> str:
    """Return the text that an exercise prints."""
    capsys.readouterr()
    lesson.main([str(arg) for arg in argv])
    return capsys.readouterr().out


@pytest.mark.parametrize("exercise,numbers", [
    ("bound", r"n 36: n x largest 2\.5944, formula 2\.5944, .*\n.*\n.*2\.7102, formula 2\.7102"),
    ("dinov2", r"576 x 1024: (1,838,720) parameters, .* = \1\n"),
    ("one-token", r"L_kd 0\.9722 = \(n - 1\)/n; W\^tok alone: 0\.0000\."),
    ("router", r"\nlayer 3  all( /? *\d+\.\d){3}   \[CLS\]( /? *\d+\.\d){3}   object"),
    ("fish", r"\nlayer 3  .*   fish( /? *\d+\.\d){3}   ")])
def test_numbers_of_the_exercises(exercise, numbers, workplace, capsys, monkeypatch):
    """The largest weight is its bound, an adapter has as many parameters as its two Linears.

    Each kind of tokens has a percentage for each of the three experts.
    """
    monkeypatch.setattr(lesson, "PICTURES", 60)
    assert re.search(numbers, printed(capsys, exercise, workplace / "runs/tiny"))


def test_uniform_weights_double_the_mean_error(workplace, sample, capsys, monkeypatch):
    """With uniform weights a teacher's loss = twice the mean of its errors in tools.explain."""
    monkeypatch.chdir(workplace)
    lines = printed(capsys, "uniform", "runs/tiny").splitlines()
    assert [line.split()[0] for line in lines] == ["paper", "released", "uniform", "1/n"]
    run, batch, _ = sample
    for name, errors in measure(run, run.model, batch).errors.items():
        loss = float(re.search(rf"{name} ([\d.]+)", lines[2])[1])
        assert loss == pytest.approx(2 * errors.mean().item(), abs=1e-4)


@pytest.mark.slow
def test_trained_adapters_let_go_of_what_only_the_teacher_sees():
    """Teacher -> student, its own signal goes at the minimum; else it stays, faint under 0.8."""
    paper, radio = lesson.teacher_signal(True), lesson.teacher_signal(False)
    assert max(paper.values())[0] > 0.5 and paper[3000][0] < 0.05
    assert radio[3000][0] > 0.95
    assert lesson.teacher_signal(False, share=0.1)[100][1] > 5 * radio[100][1]


def test_the_walk_is_that_of_the_step(workplace, capsys):
    """Each stop has its name; L_total's terms are the step's without a tracer, on a run its own.

    W^tok differs from token to token; no router learns before the first step but from L_balance.
    """
    for folder in (workplace / "runs/tiny", None):
        walk.main([str(folder)] if folder else [])
        output = capsys.readouterr().out
        assert all(f"=== {function.__qualname__} " in output for function in walk.STOPS)
        _, model, teachers, batch = walk.tiny_step(folder)
        terms = model(batch, teachers)
        for name, value in terms.items():
            assert not name.startswith("L_") or f"{name} {value:.4f}" in output
        assert ("every up matrix is 0" in output) == (folder is None)
    assert "-> V_s = 2 x 36 x 96" in output
    assert f"-> L_text = a number: {terms['L_text']:.3g}\n" in output
    assert len(set(re.search(r"-> w_tok = 2 x 36: (\S+) (\S+) (\S+)", output).groups())) == 3
    assert "gradient of L_text + lambda_kd * L_kd in the routers: 0\n" in output
    assert float(re.search(r"gradient of L_balance in the routers: (\S+)", output)[1]) > 0
