"""tools.compare: the arms are what they say, and the report's numbers are right."""

import pytest
import torch
import torch.nn.functional as F

from data import Conversations, collate
from model import Ensemble
from plumbing.build import build_movekd, build_teachers, build_vlm
from plumbing.flags import parse_config
from tests.common import C, SHORT, images, tiny_teachers, total_loss
from tiny.llm import WordTokenizer
from tiny.world import WorldImages, world_records
from tools import compare
from tools.compare_report import interval, paired, show

STUDENT = {"student backbone", "student MoLE"}
ADAPTERS = {"adapter eva", "adapter convnext"}
TRAINED = {  # arm: what stage 2 trains beside projector and LLM, if not all
    "llava": set(),
    "ensemble": set(),
    "no-kd": STUDENT,
    "no-mole": {"student backbone"} | ADAPTERS,
    "clip-only": STUDENT,
    "clip-eva": STUDENT | {"adapter eva"},
    "clip-convnext": STUDENT | {"adapter convnext"},
    "interpolation": {"student backbone"},  # its adapters have no parameters
    "conflict": STUDENT,
    "conflict-no-mole": {"student backbone"},
    "adapters": {"student backbone"} | ADAPTERS,
    "ours-no-mole": {"student backbone"} | ADAPTERS,
    "ours-few-no-mole": {"student backbone"} | ADAPTERS,
    "movekd-experts": {"student MoLE"} | ADAPTERS,
    "ours-experts": {"student MoLE"} | ADAPTERS,
}
WITHOUT_EXPERTS = ("llava", "ensemble", "no-mole", "interpolation", "adapters", "ours-no-mole",
                   "ours-few-no-mole", "conflict-no-mole")
WITHOUT_ADAPTERS = ("interpolation", "conflict", "conflict-no-mole")


@pytest.mark.parametrize("arm", compare.ARMS)
def test_arms_build_what_they_say(arm):
    """Each arm trains what its name says, and has exactly the loss terms that it names.

    It shares the projector's first weights with every arm that has the same student.
    """
    c = parse_config(["--tiny", *compare.ARMS[arm][1].split()])
    tokenizer = WordTokenizer.from_records(world_records("train", "chat", 200))
    vlm = build_vlm(c, tokenizer, {})
    teachers = build_teachers(c, {})  # after it, so that its CLIP is another: L_kd is not 0
    model = build_movekd(c, vlm, teachers)
    first = [p.detach().clone() for p in model.vlm.projector.parameters()]
    model.set_stage(2)
    records = world_records("train", "chat", 4)
    dataset = Conversations(records, WorldImages("train", 4), tokenizer, "v1", 36, 999)
    terms = model(collate([dataset[i] for i in range(4)], 0), teachers)
    total_loss(terms, c).backward()
    learns = set()
    for name, parameters in model.parameter_groups().items():
        if any(p.grad is not None for p in parameters):
            learns.add(name)
    assert learns == {"projector", "LLM"} | TRAINED.get(arm, STUDENT | ADAPTERS)
    assert ("experts" in terms) == (arm not in WITHOUT_EXPERTS)
    assert (terms["L_kd"] > 0) == ("kd_clip" in terms)
    for name in ("eva", "convnext"):
        compared = f"adapter {name}" in learns or arm in WITHOUT_ADAPTERS
        assert (f"kd_{name}" in terms) == compared
    if arm != "ensemble":
        movekd = build_vlm(C, tokenizer, {})
        for a, b in zip(first, movekd.projector.parameters(), strict=True):
            assert torch.equal(a, b)


def test_ensemble_joins_all_encoders_by_channel():
    """The multi-encoder VLM's token (i, j) is every encoder's token there, side by side.

    A coarser map is resized to CLIP's grid.
    """
    teachers = tiny_teachers()
    ensemble, x = Ensemble(teachers), images(2)
    tokens = ensemble(x)
    assert tokens.shape == (2, ensemble.num_tokens, ensemble.dim) == (2, 36, 96 + 80 + 128)
    outputs = teachers(x, [])
    close = torch.testing.assert_close
    close(tokens[..., :96], F.layer_norm(outputs["clip"].tokens, (96,)))
    # bilinear from 4 x 4 to 6 x 6: the corner stays the corner
    close(tokens[:, 0, 176:], F.layer_norm(outputs["convnext"].tokens[:, 0], (128,)))


def test_interval_and_paired_difference():
    """Mean and t-interval of known numbers; one seed has no interval.

    The paired difference cancels what the seeds share.
    """
    assert interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(4.303 / 3 ** 0.5))
    assert paired([11.0, 22.0, 33.0], [10.0, 21.0, 32.0]) == (1.0, 0.0)
    width = 12.706 * 2 ** 0.5 / 2 ** 0.5
    assert paired([2.0, 4.0], [1.0, 1.0]) == (2.0, pytest.approx(width))
    assert show(interval([70.0])) == "70.0"
    assert show((1.25, 0.5), "+") == "+1.2 ± 0.5"


@pytest.mark.slow
def test_interrupted_comparison_goes_on(workplace, monkeypatch):
    """tools.compare runs the arms that have no result and leaves the others alone.

    Table and picture hold them all.
    """
    monkeypatch.chdir(workplace)
    # in this process; what the others probe is not compared
    monkeypatch.setitem(compare.PROBE, "train", 200)
    command = [*SHORT[1:], "--seeds", "1", "--arms", "no-kd", "movekd"]
    compare.main(command)
    folder = workplace / "runs/compare"
    table = (folder / "table.md").read_text(encoding="utf-8")
    results = {arm: folder / arm / "0/result.json" for arm in ("no-kd", "movekd")}
    times = {arm: path.stat().st_mtime_ns for arm, path in results.items()}
    results["no-kd"].unlink()  # as if stopped before the end
    (folder / "table.md").unlink()
    compare.main(command)
    again = [arm for arm, path in results.items() if path.stat().st_mtime_ns != times[arm]]
    assert again == ["no-kd"]
    assert (folder / "table.md").read_text(encoding="utf-8") == table
    assert all(f"(`{arm}`)" in table for arm in results)
    assert (folder / "compare.png").stat().st_size > 0
