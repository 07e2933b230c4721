"""tools.bands: the bands are the runs' own means, with a margin."""

import pytest

from data import read_json
from plumbing.cli import InputError
from plumbing.config import TINY
from plumbing.flags import load_config
from plumbing.watch import BANDS
from tools.bands import TERMS, main, make_bands, means, read_lines


def drawn_log(level: float) -> list[dict]:
    """A line every 10 steps and one of the last of a stage's 375 or 780; each term falls."""
    lines = []
    for stage, steps in ((1, 375), (2, 780)):
        for step in [*range(0, steps, 10), steps - 1]:
            lines.append({"stage": stage, "step": step,
                          **{term: level - step / 1000 for term in TERMS}})
    return lines


def test_means_are_of_neighbouring_lines_of_one_stage():
    """The first is that of lines 0 to 4, at the step of line 4; none mixes the stages."""
    found = means(drawn_log(3.0), 2, "L_kd")
    assert found[0] == (40, pytest.approx(3.0 - 0.020))
    assert len(found) == 79 - 4


def test_a_band_holds_every_run_and_a_margin():
    """By hand, in the first block: means 2.98 to 2.95 of one run, 3.98 to 3.95 of the other."""
    bands = make_bands([drawn_log(3.0), drawn_log(4.0)])
    first, end, low, high = bands["1"]["L_text"][0]
    assert (first, end) == (0, 75)
    margin = 0.25 * (3.98 - 2.95)
    assert low == pytest.approx(0.95 * 2.95 - margin, abs=1e-3)
    assert high == pytest.approx(1.05 * 3.98 + margin, abs=1e-3)
    assert [block[0] for block in bands["2"]["L_kd"]] == [0, 130, 260, 390, 520, 650]


def test_the_kept_bands_have_this_form():
    """The file that train.py reads: the same stages, terms and blocks."""
    kept = read_json(BANDS)["bands"]
    drawn = make_bands([drawn_log(3.0)])
    for stage, terms in drawn.items():
        assert list(kept[stage]) == list(terms)
        for term, blocks in terms.items():
            assert [block[:2] for block in kept[stage][term]] == [block[:2] for block in blocks]


def test_another_run_is_refused(workplace, tmp_path):
    """A run that is not finished, or of other flags, makes no band and leaves the file."""
    with pytest.raises(InputError, match="is no finished run"):
        read_lines(tmp_path)
    assert load_config(workplace / "runs/tiny/config.json") != TINY
    with pytest.raises(InputError, match="is no run of `train.py --tiny` as it is"):
        main([str(workplace / "runs/tiny"), "--out", str(tmp_path / "bands.json")])
    assert not (tmp_path / "bands.json").exists()
