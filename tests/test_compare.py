"""tools.compare: its variants train what they say, and the numbers of its report are right."""

import pytest
import torch

from data import collate
from plumbing.build import build_movekd, build_teachers, build_vlm
from plumbing.flags import parse_config
from tests.common import SHORT, C, some_conversations, total_loss
from tools.compare import runs
from tools.compare.__main__ import main
from tools.compare.report import compare, interval, show, table
from tools.compare.variants import VARIANTS

BACKBONE, MOLE = {"student backbone"}, {"student MoLE"}
ADAPTERS = {"adapter eva", "adapter convnext"}
TRAINED = {  # variant: what stage 2 trains beside projector and LLM, if not all
    **dict.fromkeys(("llava", "ensemble"), set()),
    **dict.fromkeys(("no-kd", "clip-only", "conflict"), BACKBONE | MOLE),
    "clip-eva": BACKBONE | MOLE | {"adapter eva"},
    "clip-convnext": BACKBONE | MOLE | {"adapter convnext"},
    **dict.fromkeys(("interpolation", "conflict-no-mole"), BACKBONE),
    **dict.fromkeys(("no-mole", "adapters"), BACKBONE | ADAPTERS),
    **{name: BACKBONE | ADAPTERS for name in VARIANTS if name.startswith("ours")},
    **dict.fromkeys(("ours-mole", "ours-both", "ours-few-mole"), BACKBONE | MOLE | ADAPTERS),
    **dict.fromkeys(("movekd-experts", "ours-experts"), MOLE | ADAPTERS),
}
PARAMETER_FREE = ("interpolation", "conflict", "conflict-no-mole")  # adapters


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_train_what_they_say(variant):
    """Each variant trains what its name says, with its own loss terms and the same projector."""
    c = parse_config(["--tiny", *VARIANTS[variant][1].split()])
    dataset = some_conversations(4, 0)
    vlm = build_vlm(c, dataset.tokenizer, {})
    teachers = build_teachers(c, {})  # after it, so that its CLIP is another: L_kd is not 0
    model = build_movekd(c, vlm, teachers)
    model.set_stage(2)
    terms = model(collate([dataset[i] for i in range(4)], 0), teachers)
    total_loss(terms, c).backward()
    groups = model.parameter_groups().items()
    learns = {name for name, group in groups if any(p.grad is not None for p in group)}
    expected = TRAINED.get(variant, BACKBONE | MOLE | ADAPTERS)
    assert learns == {"projector", "LLM"} | expected
    assert ("experts" in terms) == ("student MoLE" in learns)
    assert (terms["L_kd"] > 0) == ("kd_clip" in terms)
    for name in ("eva", "convnext"):
        compared = f"adapter {name}" in learns or variant in PARAMETER_FREE
        assert (f"kd_{name}" in terms) == compared
    if variant != "ensemble":
        expected = build_vlm(C, dataset.tokenizer, {}).projector.state_dict()
        torch.testing.assert_close(vlm.projector.state_dict(), expected, rtol=0, atol=0)


def test_intervals_and_differences():
    """The t-interval of known numbers; what the seeds share cancels in a difference."""
    assert interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(4.303 / 3 ** 0.5))
    assert show([70.0]) == "70.0"
    assert show([1.0, 2.0, 3.0], "+") == "+2.0 ± 2.5"
    macro = {"llava": [10.0, 20.0], "movekd": [16.0, 26.0], "ensemble": [30.0, 40.0]}
    results = {name: [{"macro": value} for value in values] for name, values in macro.items()}
    compare(results)
    row = table(results)[3]
    assert row == "| **MoVE-KD** (`movekd`) | 21.0 ± 63.5 |  | -14.0 | +6.0 |"


@pytest.mark.slow
def test_interrupted_comparison_goes_on(workplace, monkeypatch):
    """tools.compare trains the variants that have no result, and its table holds all of them."""
    monkeypatch.chdir(workplace)
    monkeypatch.setitem(runs.PICTURES, "train", 200)  # of the teachers' probe, in this process
    command = [*SHORT[1:], "--seeds", "1", "--arms", "no-kd", "movekd"]
    main(command)
    folder = workplace / "runs/compare"
    text = (folder / "arms.md").read_text(encoding="utf-8")
    results = {name: folder / name / "0/result.json" for name in ("no-kd", "movekd")}
    times = {name: path.stat().st_mtime_ns for name, path in results.items()}
    results["no-kd"].unlink()  # as if stopped before the end
    main(command)
    again = [name for name, path in results.items() if path.stat().st_mtime_ns != times[name]]
    assert again == ["no-kd"]
    assert (folder / "arms.md").read_text(encoding="utf-8") == text
    assert all(f"(`{variant}`)" in text for variant in results)
    assert (folder / "arms.png").stat().st_size > 0
