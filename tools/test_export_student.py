"""tools.export_student: the encoder alone gives the run's tokens, without this repository."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from plumbing.build import load_student
from plumbing.cli import InputError
from plumbing.finished_run import load_run
from tests_common import images, save_png
from tools import export_student

ALONE = """
import sys, torch
from student import load_student, read_photo
student = load_student(".")
with torch.no_grad():
    torch.save(student(read_photo("photo.png", **student.config["photo"])), "tokens.pt")
assert not {"model", "mole", "teachers", "plumbing"} & set(sys.modules)
"""


@pytest.fixture
def picture(tmp_path):
    """A photograph that is not square."""
    save_png(tmp_path / "photo.png", images(1)[0][:, 20:110])
    return tmp_path / "photo.png"


def tokens_alone(folder: Path) -> torch.Tensor:
    """V^s as a stranger gets it: a process that has never heard of this repository."""
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "tokens.pt")


@pytest.mark.parametrize("kind", ["ours", "released"])
def test_the_same_tokens_without_the_repository(kind, workplace, released_folder, picture):
    """student.py's tokens = load_student's = the run's, to 1e-6; both forms of MoLE."""
    folder = {"ours": workplace / "runs/tiny", "released": released_folder}[kind]
    student, read_photo = load_student(folder)
    export_student.main([str(folder), str(picture.parent)])
    with torch.no_grad():
        V_s = student(read_photo(picture))
        same = load_run(folder, "cpu")[0].student(read_photo(picture))
    assert V_s.equal(same)
    assert tokens_alone(picture.parent).allclose(V_s, atol=1e-6, rtol=0)
    with pytest.raises(InputError, match="is there already"):
        export_student.main([str(folder), str(picture.parent)])


def test_three_lines_are_a_full_runs_too(full_run, picture):
    """From a run of --full, without the files that its encoders came from."""
    student, read_photo = load_student(full_run)
    assert student(read_photo(picture)).shape == (1, 36, 96)
