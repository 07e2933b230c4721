"""tools.export_student: the encoder alone gives the run's tokens, without this repository."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data import InputError
from model import Student
from plumbing.config import TINY
from plumbing.files import write_json
from plumbing.finished_run import load_run, load_student
from tests.common import images, save_png
from tools import export_student, student_alone

ALONE = """
import sys, torch
from student import Student
student = Student(".").eval()
with torch.no_grad():
    torch.save(student(student.read_photo("photo.png")), "tokens.pt")
assert not {"model", "mole", "teachers", "plumbing"} & set(sys.modules)
"""


@pytest.fixture
def picture(tmp_path):
    """A photograph that is not square."""
    save_png(tmp_path / "photo.png", images(1)[0][:, 20:110])
    return tmp_path / "photo.png"


def tokens_alone(folder: Path) -> torch.Tensor:
    """V^s as a stranger gets it: a process that has never heard of this repository."""
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=folder, capture_output=True,
                          encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "tokens.pt")


def test_the_file_can_be_read_in_a_minute():
    """student.py has 60 lines at most, and imports nothing but torch, timm and what they bring."""
    text = Path(student_alone.__file__).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            found.add(node.module)
    allowed = {"json", "pathlib", "PIL", "timm", "torch", "torch.nn", "torchvision.transforms.v2"}
    assert found == allowed


@pytest.mark.parametrize("kind", ["ours", "released", "full"])
def test_the_same_tokens_without_the_repository(kind, workplace, released_folder, full_run,
                                                picture):
    """student.py's tokens = load_student's = the run's, to 1e-6; both forms of MoLE.

    The student of the run of --full sees a view of the original, not of the loader's square.
    """
    folder = {"ours": workplace / "runs/tiny", "released": released_folder, "full": full_run}[kind]
    student, read_photo = load_student(folder)
    export_student.main([str(folder), str(picture.parent)])
    with torch.no_grad():
        V_s = student(read_photo(picture))
        same = load_run(folder, "cpu")[0].student(read_photo(picture))
    assert V_s.equal(same)
    assert tokens_alone(picture.parent).allclose(V_s, atol=1e-6, rtol=0)
    with pytest.raises(InputError, match="is there already"):
        export_student.main([str(folder), str(picture.parent)])


def test_a_batch_of_the_loader_and_no_experts(tmp_path):
    """uint8 images (B, 3, R, R) as in training; a student without MoLE is timm's model alone."""
    student = Student(TINY.clip)
    student.loader_size = 128
    torch.save(export_student.plain_weights(student), tmp_path / "student.pt")
    write_json(tmp_path / "student.json", export_student.student_config(student, tmp_path))
    alone = student_alone.Student(tmp_path)
    assert alone(images(3)).allclose(student(images(3)), atol=1e-6, rtol=0)
    assert not [name for name, _ in alone.named_parameters() if "router" in name]
