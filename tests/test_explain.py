"""tools.explain: the numbers of the page are the method's, and the page stands alone."""

import contextlib
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data import InputError
from mole import router_probs
from plumbing.build import build_vlm, pretrained_weights
from plumbing.finished_run import load_whole_run
from plumbing.sets import load_sets
from tests.common import SHORT, images, run_here, save_png
from tools.explain.__main__ import main
from tools.explain.numbers import cls_attention, make_batch, measure, three_colours

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def page(workplace, tmp_path_factory):
    """The folder with explain.html of the short run."""
    out = tmp_path_factory.mktemp("explained")
    with contextlib.chdir(workplace):
        main(["runs/tiny", "--out", str(out)])
    return out


def html_of(folder: Path) -> str:
    """The page of a folder, its runs of white space as one space."""
    return " ".join((folder / "explain.html").read_text(encoding="utf-8").split())


@pytest.fixture(scope="module")
def run(workplace):
    with contextlib.chdir(workplace):
        return load_whole_run(workplace / "runs/tiny", "cpu")


@pytest.fixture(scope="module")
def batch(run):
    records, get_image = load_sets(run.c)["eval"]
    return make_batch(run, records[0], get_image(records[0]["image"]), "right")


def test_a_whole_run_has_its_adapters_and_its_start(workplace, run, monkeypatch):
    """Every tensor of the file is in the model; the start is the VLM that training began with."""
    stored = load_file(workplace / "runs/tiny/model.safetensors")
    own = run.model.state_dict()
    assert stored.keys() == own.keys()
    for name, tensor in stored.items():
        assert tensor.equal(own[name]), name
    monkeypatch.chdir(workplace)
    weights, _ = pretrained_weights(run.c, load_sets(run.c)["train"][0], run.tokenizer)
    first = build_vlm(run.c, run.tokenizer, weights).state_dict()
    for name, tensor in run.start.vlm.state_dict().items():
        assert tensor.equal(first[name]), name
    assert not run.start.adapters["eva"].out.weight.equal(run.model.adapters["eva"].out.weight)


def test_the_numbers_are_those_of_the_method(run, batch):
    """Each number of the page = the slow obvious form, and L_kd = MoVEKD.forward's."""
    numbers = measure(run, run.model, batch)
    scores = run.teachers(batch["images"], ["x"])["clip"].cls_scores[0, :, 1:]
    w_tok = scores.softmax(dim=-1).mean(dim=0).tolist()
    total = 0.0
    for name, V_t in numbers.targets.items():
        loss = 0.0
        for j, (t, s) in enumerate(zip(V_t.tolist(), numbers.V_s.tolist(), strict=True)):
            mse = sum((a - b) ** 2 for a, b in zip(t, s, strict=True)) / 96
            assert numbers.errors[name][j].item() == pytest.approx(mse, rel=1e-4)
            loss += (w_tok[j] + 1 / 36) * mse
        assert numbers.teacher_losses[name] == pytest.approx(loss, rel=1e-4)
        total += numbers.w_tea[name] * loss
    assert numbers.terms["L_kd"] == pytest.approx(total, rel=1e-4)
    seen = [word.loss for word in numbers.words if word.answer]
    assert len(seen) == (batch["labels"] != -100).sum()
    assert numbers.terms["L_text"] == pytest.approx(sum(seen) / len(seen), rel=1e-5)
    assert sum(word.count for word in numbers.words) == batch["input_ids"].shape[1]
    probs = router_probs(run.model.vlm.student)
    for chosen, p in zip(numbers.experts, probs, strict=True):
        assert chosen.tolist() == [max(range(3), key=row.__getitem__) for row in p[0].tolist()]


def test_the_numbers_of_the_attention(run, batch):
    """The heaviest tokens and the half of W^tok = a sorted list's; the others = their formulas.

    n x max of the released form is below e, whatever [CLS] looks at.
    """
    outputs = run.teachers(batch["images"], ["x"])
    attention = cls_attention(run.model.vlm.student, outputs, batch["images"])
    w_tok = attention.weights["paper"].tolist()
    order = sorted(range(36), key=w_tok.__getitem__, reverse=True)
    assert attention.top == [(j, w_tok[j]) for j in order[:5]]
    heaviest = [w_tok[j] for j in order]
    assert sum(heaviest[:attention.half - 1]) < 0.5 <= sum(heaviest[:attention.half])
    entropy = -sum(w * math.log(w) for w in w_tok) / math.log(36)
    assert attention.entropy["paper"] == pytest.approx(entropy, rel=1e-4)
    assert attention.n_max["paper"] == pytest.approx(36 * heaviest[0])
    assert attention.n_max["released"] < math.e
    assert attention.n_max["uniform"] == pytest.approx(1)
    assert attention.entropy["released"] > 0.999


def test_three_colours_are_principal_components_on_one_basis():
    """Tokens that differ along one direction only have colours in the order of that direction."""
    line = torch.arange(9.0)[:, None] * torch.tensor([[0.0, 2.0, 0.0, 0.0]])
    both = three_colours([line + 0.001 * torch.randn(9, 4), line[:4]])
    assert both[0][1:8, 0].diff().min() > 0
    assert both[0][:4, 0].tolist() == pytest.approx(both[1][:, 0].tolist(), abs=0.01)


def test_the_page_stands_alone(page):
    """Every picture lies in the page with a text beside it; nothing is loaded from elsewhere."""
    html = html_of(page)
    pictures = re.findall(r'<img class="\w*" alt="([^"]+)" src="data:image/png;base64,', html)
    assert len(pictures) == html.count("<img") > 25
    assert min(map(len, pictures)) > 10
    assert not re.search(r"https?://|url\(|@import", html)
    assert html.count("<section") == 11
    assert len(list((page / "explain").glob("*.png"))) > 25
    assert "Of 6 x 6 patches, [CLS] of the frozen CLIP looks most at" in html
    assert 'data-when="before"' in html


def test_the_sums_on_the_page_add_up(page):
    """The products of a table add up to its last line, as a reader would add them."""
    html = html_of(page)
    tables = re.findall(r"<table>(?:(?!</table>).)*their sum.*?</table>", html)
    assert len(tables) == 4     # L_kd and L_total, before and after
    for table in tables:
        *products, total = (float(x) for x in re.findall(r">([\d.]+)</td></tr>", table))
        assert total == pytest.approx(sum(products), abs=3e-5)


@pytest.mark.slow
def test_a_picture_of_ones_own_and_a_run_without_distillation(workplace, tmp_path, monkeypatch):
    """An image file with a question; without distillation CLIP is the only teacher shown."""
    monkeypatch.chdir(workplace)
    save_png(tmp_path / "one.png", images(1)[0])
    run_here(workplace, *SHORT, "--out", "runs/plain", "--lambda-kd", "0")
    main(["runs/plain", str(tmp_path / "one.png"), "--question", "what colour?", "--out",
          str(tmp_path)])
    html = html_of(tmp_path)
    assert "trained without distillation" in html
    assert "error-clip-after.png" in [f.name for f in (tmp_path / "explain").iterdir()]
    assert not list((tmp_path / "explain").glob("error-eva*"))
    with pytest.raises(InputError, match="--row 99: the held-out set has 12 pictures"):
        main(["runs/tiny", "--row", "99"])


@pytest.mark.slow
def test_ours_the_heads_on_the_students_side(workplace, tmp_path, monkeypatch):
    """`--recipe ours`: each teacher's space has a basis of its own."""
    monkeypatch.chdir(workplace)
    run_here(workplace, *SHORT, "--out", "runs/ours", "--recipe", "ours")
    main(["runs/ours", "--out", str(tmp_path)])
    html = html_of(tmp_path)
    assert "H(V^s) for eva" in html
    assert "16 tokens" in html or "4 x 4 tokens" in html


def test_the_authors_checkpoint(released_folder, tmp_path):
    """It has no teachers and no start: those panels say so, the others are there.

    A question is text on the page, never markup.
    """
    save_png(tmp_path / "one.png", images(1)[0])
    main([str(released_folder), str(tmp_path / "one.png"), "--out", str(tmp_path), "--question",
          "what <i>shape</i>?"])
    html = html_of(tmp_path)
    assert "what &lt;i&gt;shape&lt;/i&gt;?" in html and "<i>shape" not in html
    assert html.count("holds neither teachers nor adapters") >= 4
    assert "[CLS] of the student looks" in html
    assert 'role="tab"' not in html
    assert (tmp_path / "explain/experts-1.png").exists()


def test_a_full_run(full_run, real_folder, tmp_path, monkeypatch):
    """Real names of encoders, weights from files, an LLM of transformers."""
    save_png(tmp_path / "one.png", images(1)[0])
    monkeypatch.chdir(real_folder)
    main([str(full_run), str(tmp_path / "one.png"), "--answer", "heart", "--out", str(tmp_path)])
    html = html_of(tmp_path)
    assert "teacher sam" in html
    assert "the trained LLM, which is not loaded twice" in html


SELF_TEST = """<script>
addEventListener("load", () => {
  const seen = (name) => [...document.querySelectorAll("." + name)].some(
    (e) => e.getClientRects().length > 0);
  const found = [];
  found.push([...document.images].every((i) => i.complete && i.naturalWidth > 0));
  for (const tab of document.querySelectorAll("[role=tab]")) {
    tab.click();
    found.push(seen("before"), seen("after"));
  }
  document.body.dataset.found = found.join(" ");
});
</script></body>"""


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no chromium here")
def test_in_a_browser(page, tmp_path):
    """Chromium shows every picture, the tabs choose, and the console stays empty."""
    html = html_of(page)
    (tmp_path / "page.html").write_text(html.replace("</body>", SELF_TEST), encoding="utf-8")
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
         "--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}",
         "--enable-logging=stderr", "--v=0", "--dump-dom", str(tmp_path / "page.html")],
        capture_output=True, timeout=120, encoding="utf-8")
    assert re.search(r'data-found="true true false false true"', done.stdout)
    assert "CONSOLE" not in done.stderr
