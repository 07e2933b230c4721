"""Apple's GPU, as far as a machine without one can tell. No test here has run on it.

torch's own table of kernels (native_functions.yaml, which it ships) says which operators Metal has;
the operators of a step are recorded on the CPU and looked up there.
"""

import ast
import dataclasses
import re
from pathlib import Path

import pytest
import torch
import torchgen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data import InputError, to_device
from plumbing.sets import loader_options
from plumbing.checks import check_mps, check_place, find_device
from plumbing.cli import run
from plumbing.config import SMALL, TINY, recipe
from plumbing.files import flop_counter
from tests.common import HERE, total_loss, whole_method

OURS = [HERE / f"{name}.py" for name in ("data", "kd_loss", "model", "mole", "teachers", "train")]
for folder in ("tiny", "plumbing", "tools"):
    OURS += [path for path in sorted((HERE / folder).glob("*.py")) if path.name[:5] != "test_"]
TABLE = Path(torchgen.__file__).with_name("packaged") / "ATen/native/native_functions.yaml"
EVERYWHERE = {"CompositeImplicitAutograd", "CompositeExplicitAutograd",
              "CompositeExplicitAutogradNonFunctional"}
# the CPU's attention: Metal has its own, or takes it apart; and marks of a profiler
NOT_METALS = ("_scaled_dot_product_flash_attention_for_cpu", "_record_function")


@pytest.fixture
def mac(monkeypatch):
    """A Mac, as far as torch says: an Apple GPU, and none of NVIDIA's."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def kernels() -> dict[str, tuple[set, str | None]]:
    """Of each operator: where it has a kernel, and the operator that stands for it."""
    found = {}
    for entry in TABLE.read_text(encoding="utf-8").split("\n- func: ")[1:]:
        keys = set()
        for line in re.findall(r"^    ([A-Z][\w, ]*):", entry, re.MULTILINE):
            keys.update(key.strip() for key in line.split(","))
        other = re.search(r"structured_delegate: (\S+)", entry)
        if "dispatch:" not in entry and not other:
            keys = EVERYWHERE
        found[entry.split("(")[0].strip()] = (keys, other and other.group(1))
    return found


def on_metal(name: str, table: dict) -> bool:
    """Whether an operator runs there."""
    keys, other = table[name]
    return on_metal(other, table) if other else bool(keys & {"MPS", *EVERYWHERE})


class Recorder(TorchDispatchMode):
    """Notes every operator that runs inside, and those that make float64 or complex numbers."""

    def __init__(self):
        super().__init__()
        self.operators = set()
        self.wide = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function._schema.name.split("::")[1]
        overload = function._schema.overload_name
        name += f".{overload}" if overload else ""
        self.operators.add(name)
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor) and tensor.dtype in (torch.float64, torch.complex64):
                self.wide.add(name)
        return out


def test_the_table_can_tell():
    """It knows what Metal has, by itself or in parts, and what it lacks."""
    table = kernels()
    for name, there in (("add.Tensor", True), ("_upsample_bicubic2d_aa", True), ("matmul", True),
                        ("linalg_eig", False), ("_cudnn_rnn", False)):
        assert on_metal(name, table) == there, name


@pytest.mark.parametrize("name", ["", "paper", "released", "ours"])
def test_every_operator_of_a_step_is_on_metal(name):
    """Forward, backward, AdamW and a greedy answer of a recipe; none makes float64."""
    c = dataclasses.replace(TINY, **(recipe(name) if name else {}))
    model, teachers, batch = whole_method(c, n_text=1)
    model.set_stage(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    with Recorder() as recorder:
        total_loss(model(batch, teachers), c).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        visual = model.vlm.student(batch["images"])
        model.vlm.generate(visual, batch["input_ids"][:2], batch["attention_mask"][:2], 3, 4)
    table = kernels()
    wanted = {op for op in recorder.operators if not op.startswith(NOT_METALS)}
    lacking = {op for op in wanted if not on_metal(op, table)}
    if torch.__version__ < "2.14":  # older ones lack this one, which the heads of "ours" need
        lacking.discard("_upsample_bilinear2d_aa_backward")
    assert len(wanted) > 90 and not lacking
    assert not recorder.wide


def on_cpu(node: ast.expr) -> bool:
    """Whether an expression is a call of .cpu(), or something of that."""
    while isinstance(node, (ast.Call, ast.Attribute, ast.Subscript)):
        if isinstance(node, ast.Attribute) and node.attr == "cpu":
            return True
        node = node.func if isinstance(node, ast.Call) else node.value
    return False


def test_nothing_that_apples_gpu_lacks():
    """No .cuda(); .double() after .cpu() only, for Metal has no float64."""
    for path in OURS:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            place = f"{path}: line {node.lineno}"
            assert node.func.attr != "cuda", place
            if node.func.attr == "double" and path.name != "probe.py":  # its scenes are on the CPU
                assert on_cpu(node.func.value), place


def test_auto_takes_the_first_that_is_here(mac, monkeypatch):
    """cuda, then mps, then cpu; a device that is named is taken."""
    assert find_device("auto") == "mps" and find_device("cpu") == "cpu"
    check_place(dataclasses.replace(TINY, device="mps"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert find_device("auto") == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert find_device("auto") == "cpu"


def test_what_cannot_be_trained_there_is_one_line(mac, monkeypatch):
    """torch shards nothing on Apple's GPU, and bf16 here is FSDP's."""
    check_mps(dataclasses.replace(TINY, device="mps"))
    check_mps(dataclasses.replace(SMALL, device="cpu", processes=2))
    with pytest.raises(InputError, match="--precision fp32, or --device cpu"):
        check_mps(dataclasses.replace(SMALL, device="mps"))
    with pytest.raises(InputError, match="one process has the GPU"):
        check_mps(dataclasses.replace(TINY, device="mps", processes=2))
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InputError, match="one process has the GPU"):
        check_mps(dataclasses.replace(TINY, device="mps"))


def test_copies_to_it_are_waited_for():
    """An asynchronous copy from memory that is not pinned may read what is no longer there."""
    class Noted(torch.Tensor):
        def to(self, device, non_blocking):
            return device, non_blocking

    tensor = torch.zeros(2).as_subclass(Noted)
    assert to_device(tensor, "mps") == ("mps", False)
    assert to_device({48: tensor}, "cuda") == {48: ("cuda", True)}
    assert to_device(["a.png"], "mps") == ["a.png"]
    assert not loader_options(dataclasses.replace(TINY, device="mps"))["pin_memory"]


def test_an_operator_that_it_lacks_is_one_line(capsys):
    """With the two ways out."""
    def program():
        raise NotImplementedError("The operator 'aten::x' is not currently implemented for the MPS "
                                  "device.\nIf you want this op to be considered ...")

    with pytest.raises(SystemExit) as status:
        run(program)
    line = capsys.readouterr().err
    assert status.value.code == 2 and line.startswith("error: --device mps: The operator 'aten::x'")
    assert "PYTORCH_ENABLE_MPS_FALLBACK=1" in line and "considered" not in line


def test_its_attention_is_counted():
    """The FLOP counter knows it: 2 products of (B, h, T, T, width), 2 FLOPs each."""
    q = torch.empty(2, 3, 5, 7, device="meta")
    with flop_counter() as counter:
        known = counter.flop_registry[torch.ops.aten._scaled_dot_product_attention_math_for_mps]
    assert known(q, q, q, out_val=None) == 2 * 2 * 2 * 3 * 5 * 5 * 7
