"""tools.ask: questions to a run of ours, of any kind, and to the authors' checkpoint."""

import pytest

from data import InputError
from plumbing.files import read_json
from tools import ask


def asked(capsys, *argv) -> list[str]:
    """Return the lines that tools.ask prints."""
    capsys.readouterr()
    ask.main([str(arg) for arg in argv])
    return capsys.readouterr().out.splitlines()


def test_ask_answers_from_a_run_folder(workplace, capsys):
    """tools.ask loads a run strictly and gives the answers that the run's own evaluation gave."""
    lines = asked(capsys, workplace / "runs/tiny", "--n", "48")
    accuracy = read_json(workplace / "runs/tiny/result.json")["macro_accuracy"]
    assert len(lines) == 48
    right = sum(line.endswith("(right)") for line in lines)
    assert 100 * right / 48 == pytest.approx(accuracy)


def test_ask_says_which_words_are_new(workplace, photo, capsys):
    """A question with a word that the run has never seen gets a note; no picture, one line."""
    ask.main([str(workplace / "runs/tiny"), str(photo), "what flavour?"])
    assert "never seen the word(s) flavour" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"^gone.png: no such image file$"):
        ask.main([str(workplace / "runs/tiny"), "gone.png", "what shape?"])


def test_ask_answers_from_other_folders(full_run, released_folder, photo, monkeypatch, capsys):
    """A run of --full stands alone: neither the encoders' files nor the LLM's are read.

    The authors' checkpoint answers too; --full has no held-out set, which is one line.
    """
    monkeypatch.setattr("real.encoder_weights.fill_net", None)
    monkeypatch.setattr("real.encoder_weights.ask_hub", None)
    for folder in (full_run, released_folder):
        assert len(asked(capsys, folder, photo, "what shape?")) == 1
    with pytest.raises(InputError, match="runs/full has no held-out set"):
        ask.main([str(full_run)])
