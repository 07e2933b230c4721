"""Small models, batches and runs for all tests. Fixtures are in conftest.py.

Import this before anything that imports a model hub: no test may ask one.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms.v2.functional import to_pil_image

import train
from data import Conversations, collate
from model import VLM, MoVEKD, Student
from mole import MoLE, mole_layers
from plumbing.build import build_movekd
from plumbing.cli import run
from plumbing.config import TINY, Config
from plumbing.files import write_json
from plumbing.signals import SIGNALS
from teachers import ClipEncoder, Teachers, VisionEncoder, parse_spec
from tiny.llm import TinyLLM, WordTokenizer
from tiny.pictures import render
from tiny.scenes import sample_scenes
from tiny.world import WorldImages, world_records

HERE = Path(__file__).parent.parent
C = TINY
# under nohup, or in the background, some signals are ignored: the programs under test inherit that
for number in SIGNALS:
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)


def images(n: int) -> torch.Tensor:
    """Return n pictures of the tiny world, uint8 (n, 3, R, R)."""
    return render(sample_scenes("train", n))


def noise(width: int, height: int) -> Image.Image:
    """Return a picture of random squares, 5 pixels wide."""
    draw = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(draw).resize((width * 5, height * 5), 0).crop((0, 0, width, height))


def save_png(path: Path, image: torch.Tensor) -> None:
    to_pil_image(image).save(path)


def world_on_disk(folder: Path, word: str = "heart", new: str = "heart") -> None:
    """Write 16 of the tiny world's pictures, in two sizes, and train.json with a word replaced."""
    folder.mkdir()
    for i, image in enumerate(WorldImages("train", 16).images):
        save_png(folder / f"{i}.png", image[:, :90 + 6 * (i % 2)])
    text = json.dumps(world_records("train", "chat", 16)).replace("train-0/", "")
    write_json(folder / "train.json", json.loads(text.replace(word, new)))


def conversation(*texts: str) -> list[dict]:
    """Return question, answer, question, ... as LLaVA's turns."""
    turns = []
    for i, text in enumerate(texts):
        turns.append({"from": ("human", "gpt")[i % 2], "value": text})
    return turns


def some_conversations(n: int = 12, n_text: int = 6, max_length: int = 999) -> Conversations:
    """Return n dialogues about a picture and n_text without one."""
    records = world_records("train", "chat", n) + world_records("train", "text", n_text)
    tokenizer = WordTokenizer.from_records(records)
    return Conversations(records, WorldImages("train", n), tokenizer, "v1", 36, max_length)


MOLE = {"num_experts": 3, "rank": 2, "alpha": 4.0, "dropout": 0.0,
        "router_grad": "straight_through", "init": "zero"}


def random_mole(router_grad: str = "straight_through") -> MoLE:
    """Return a MoLE layer whose experts are not zero: d = 8, E = 3, r = 2."""
    layer = MoLE(nn.Linear(8, 8), 8, **{**MOLE, "router_grad": router_grad})
    nn.init.normal_(layer.lora.up.weight)
    return layer


def tiny_teachers() -> Teachers:
    return Teachers({"clip": ClipEncoder(C.clip), "eva": VisionEncoder(C.eva),
                     "convnext": VisionEncoder(C.convnext)})


def small_vlm(vocabulary: int = 40) -> VLM:
    """Return a VLM with experts of rank 4 and an LLM of width 32."""
    student = Student(C.clip)
    student.add_experts(form="ffn", **{**MOLE, "rank": 4})
    llm = TinyLLM(vocabulary, dim=32, depth=2, heads=4, hidden=48)
    return VLM(student, llm, WordTokenizer.image).eval()


def whole_method(c: Config = C, n_text: int = 0) -> tuple[MoVEKD, Teachers, dict]:
    """Return model, teachers and a batch of two samples with an image and n_text without."""
    teachers = tiny_teachers()
    records = world_records("train", "chat", 2) + world_records("train", "text", n_text)
    words = world_records("train", "chat", 200) + world_records("train", "text", 200)
    tokenizer = WordTokenizer.from_records(words)
    dataset = Conversations(records, WorldImages("train", 2), tokenizer, "v1", 36, 999)
    vlm = small_vlm(len(tokenizer.vocabulary))
    model = build_movekd(c, vlm, teachers)
    for layer in mole_layers(vlm.student):  # no expert is zero
        nn.init.normal_(layer.lora.up.weight, std=0.1)
    return model, teachers, collate([dataset[i] for i in range(len(dataset))], 0)


def total_loss(terms: dict, c: Config = C) -> torch.Tensor:
    """Return L_total of train.py, by default with TINY's weights."""
    return train.total_loss(c, terms)


SHORT = ("--tiny --stage0-scale 0.01 --max-steps 4 --log-every 1 --n-pretrain 128 --n-train 64 "
         "--n-described 32 --n-text 32 --n-eval 12 --stage1-batch 16 --stage2-batch 8").split()
FILES = ("config.json versions.json vocabulary.json log.jsonl model.safetensors curves.png "
         "samples.png result.json predictions.jsonl").split()     # that a run leaves
# two samples a step: with one for each of two processes, one process often has no image, and some
# expert no token
SHARED = ("--stage1-batch 2 --stage2-batch 2 --max-steps 10 --log-every 1 --save-every 4 "
          "--keep 9").split()


def run_here(folder: Path, *flags: str) -> None:
    """Run train.py in this process, as if started in `folder`."""
    with contextlib.chdir(folder):
        train.main(list(flags))


def error_of(argv: list[str], capsys, main=train.main) -> str:
    """Return the one error line of `train.py ARGV`, the last on stderr; exit status 2."""
    with pytest.raises(SystemExit) as end:
        run(lambda: main(argv))
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    assert [line.startswith("error: ") for line in lines] == [False] * (len(lines) - 1) + [True]
    return lines[-1]


def run_script(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    """Run `python train.py ...` in a process of its own, started from a notebook."""
    environment = {**os.environ, "MPLBACKEND": "module://not_in_this_environment"}
    return subprocess.run([sys.executable, str(HERE / "train.py"), *flags], cwd=folder,
                          capture_output=True, encoding="utf-8", env=environment)


def start(folder: Path, *flags: str) -> subprocess.Popen:
    """Start a short run of train.py in a process group of its own; its output comes in pipes."""
    return subprocess.Popen([sys.executable, str(HERE / "train.py"), *SHORT, *flags], cwd=folder,
                            encoding="utf-8", stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            start_new_session=True)


def stop(process: subprocess.Popen, name: str) -> str:
    """Send a run's processes a signal in the middle of stage 1; return its last words, status 3."""
    for line in process.stdout:
        if line.startswith("stage 1 step 3 "):
            os.killpg(process.pid, getattr(signal, name))
            break
    _, errors = process.communicate()
    assert process.returncode == 3, errors
    assert f"stopped by {name} at stage 1, step " in errors
    return errors


def assert_same_run(a: Path, b: Path, *more: str) -> None:
    """Check that two runs have the same log and weights, byte for byte."""
    for name in ("log.jsonl", "model.safetensors", *more):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def damage(path: Path, how: str) -> None:
    """Damage a file: "flipped" (one bit), "halved", "empty", "a folder", "a pipe" or "missing"."""
    content = path.read_bytes()
    if how == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:])
    elif how == "halved":
        path.write_bytes(content[:len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    if how == "a folder":
        path.mkdir()
    if how == "a pipe":     # a reader would wait for it
        os.mkfifo(path)


class RunsCode:
    """Unpickled, it makes the file "pwned"."""

    def __reduce__(self):
        return open, ("pwned", "w")


REAL = {  # real names at toy sizes
    "clip": "vit_base_patch16_clip_quickgelu_224.openai img_size=48 patch_size=8 embed_dim=96 "
            "depth=4 num_heads=4",
    "eva": "eva02_tiny_patch14_224.mim_in22k img_size=64 patch_size=16 embed_dim=80 depth=3 "
           "num_heads=4",
    "convnext": "convnext_atto.d2_in1k img_size=64 depths=(1,1,2,1) dims=(16,32,64,128)",
    "sam": "samvit_base_patch16.sa1b img_size=64 embed_dim=32 depth=2 num_heads=2 "
           "global_attn_indexes=(1,) neck_chans=24 window_size=2",
}
# EVA's file has another patch size and resolution than its spec, as in the real run
IN_FILE = {"eva": {"img_size": 84, "patch_size": 14}}


def random_file(name: str, folder: Path) -> nn.Module:
    """Save the timm model of REAL[name], random, its head on, as the hub has it; return it."""
    model, size, options = parse_spec(REAL[name])
    if not model.startswith("convnext"):
        options["img_size"] = size
    net = timm.create_model(model, **{**options, **IN_FILE.get(name, {})})
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    state = {key: value.contiguous() for key, value in net.state_dict().items()}
    save_file(state, folder / f"{model}.safetensors")
    return net


def llama_pieces() -> tuple[dict[str, int], list]:
    """Return (vocabulary, merges) for LlamaTokenizer, made of the tiny world's words.

    As in sentencepiece: pieces that begin with a space, and a byte each for what is no piece.
    """
    tokenizers = pytest.importorskip("tokenizers")
    texts = ["A chat between a curious user and an artificial intelligence assistant. USER: "]
    for record in world_records("train", "chat", 50) + world_records("train", "caption", 50):
        for turn in record["conversations"]:
            texts += turn["value"].splitlines()
    model = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    single = [f"<0x{byte:02X}>" for byte in range(256)]
    model.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", "<s>", "</s>", *single], show_progress=False))
    pieces = json.loads(model.to_str())["model"]
    return pieces["vocab"], [tuple(merge) for merge in pieces["merges"]]


def full_flags(real_folder: Path, llama_folder: Path) -> list[str]:
    """Return the flags of `--full` with files in place of downloads, at toy sizes."""
    flags = ["--full", "--device", "cpu", "--precision", "fp32", "--data-root", str(real_folder),
             "--weights", str(real_folder), "--llm", str(llama_folder)]
    for name, spec in REAL.items():
        flags += [f"--{name}", spec]
    return flags + ("--distil-batch 4 --stage1-batch 4 --stage2-batch 4 --micro-batch 2 "
                    "--log-every 1 --workers 1 --mole-rank 4 "
                    "--teachers clip eva convnext sam").split()


def write_released(folder: Path, llama_folder: Path, llama: nn.Module, vision: nn.Module) -> None:
    """Write a checkpoint in the authors' layout: 2 experts of rank 4, 3 blocks of width 128."""
    prefix = "model.vision_tower.vision_tower.vision_model."
    tensors = {}
    for name, tensor in vision.state_dict().items():
        name = prefix + name.removeprefix("vision_model.")
        tensors[name.replace(".mlp.", ".mlp.original_module.")] = tensor
    for i in range(3):
        mlp = f"{prefix}encoder.layers.{i}.mlp."
        tensors[mlp + "router.weight"] = torch.randn(2, 128)
        tensors[mlp + "router.bias"] = torch.randn(2)
        for part, d_in, d_out in (("moe_down", 128, 512), ("moe_up", 512, 128)):
            for e in range(2):
                for name, shape in (("lora_A", (4, d_in)), ("lora_B", (d_out, 4))):
                    tensors[f"{mlp}{part}.{e}.{name}.weight"] = torch.randn(shape)
                    tensors[f"{mlp}{part}.{e}.{name}.bias"] = torch.randn(shape[0])
    for i, d_in in ((0, 128), (2, 32)):
        tensors[f"model.mm_projector.{i}.weight"] = torch.randn(32, d_in)
        tensors[f"model.mm_projector.{i}.bias"] = torch.randn(32)
    tensors.update(llama.state_dict())
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    for path in llama_folder.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.update(model_type="move_llava_llama", mm_hidden_size=128, mm_projector_type="mlp2x_gelu",
                  architectures=["MoVELlavaLlamaForCausalLM"], mm_vision_select_layer=-2,
                  image_aspect_ratio="pad", kd={"kd_mode": False})
    config["torch_dtype"] = config.pop("dtype", "float32")
    config["moe"] = {"moe_encoder": True, "moe_encoder_dense": False, "moe_encoder_lora_rank": 4,
                     "moe_encoder_lora_alpha": 1, "moe_encoder_num_experts": 2}
    write_json(folder / "config.json", config)
