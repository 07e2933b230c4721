"""What tests share: small models, batches and runs. Fixtures are in conftest.py.

Import this before anything that imports a model hub: no test asks one.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
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
from plumbing.config import TINY, Config
from plumbing.files import write_json
from teachers import ClipEncoder, Teachers, VisionEncoder, parse_spec
from tiny.llm import TinyLLM, WordTokenizer
from tiny.pictures import render
from tiny.scenes import sample_scenes
from tiny.world import WorldImages, world_records

HERE = Path(__file__).parent.parent
C = TINY

# ------------------------------------------------------------------------------------------------
# Pictures and text


def images(n: int) -> torch.Tensor:
    """n pictures of the tiny world, uint8 (n, 3, R, R)."""
    return render(sample_scenes("train", n))


def natural_noise(width: int, height: int) -> Image.Image:
    """Noise whose amplitude falls as 1 / frequency, as in photographs."""
    draw = np.random.default_rng(0)
    fx = np.fft.fftfreq(width)[None, :]
    fy = np.fft.fftfreq(height)[:, None]
    falloff = 1 / np.maximum(np.hypot(fx, fy), 1 / max(width, height))          # (height, width)
    channels = []
    for _ in range(3):
        white = np.fft.fft2(draw.standard_normal((height, width)))
        noise = np.fft.ifft2(white * falloff).real
        channels.append(128 + 50 * noise / noise.std())
    return Image.fromarray(np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8))


def save_png(path: Path, image: torch.Tensor) -> None:
    to_pil_image(image).save(path)


def conversation(*texts: str) -> list[dict]:
    """Question, answer, question, ... as LLaVA's turns."""
    turns = []
    for i, text in enumerate(texts):
        turns.append({"from": ("human", "gpt")[i % 2], "value": text})
    return turns


def some_conversations(n: int = 12, n_text: int = 6, max_length: int = 999) -> Conversations:
    """n dialogues about a picture, n_text without."""
    records = world_records("train", "chat", n) + world_records("train", "text", n_text)
    tokenizer = WordTokenizer.from_records(records)
    return Conversations(records, WorldImages("train", n), tokenizer, "v1", 36, max_length)


# ------------------------------------------------------------------------------------------------
# Models, untrained

MOLE = {"num_experts": 3, "rank": 2, "alpha": 4.0, "dropout": 0.0,
        "router_grad": "straight_through", "init": "zero"}


def random_mole(router_grad: str = "straight_through") -> MoLE:
    """A MoLE layer whose experts are not zero: d = 8, E = 3, r = 2."""
    layer = MoLE(nn.Linear(8, 8), 8, **{**MOLE, "router_grad": router_grad})
    nn.init.normal_(layer.lora.up.weight)
    return layer


def tiny_teachers() -> Teachers:
    return Teachers({"clip": ClipEncoder(C.clip), "eva": VisionEncoder(C.eva),
                     "convnext": VisionEncoder(C.convnext)})


def small_vlm(vocabulary: int = 40) -> VLM:
    """Experts of rank 4, an LLM of width 32."""
    student = Student(C.clip)
    student.add_experts(form="ffn", **{**MOLE, "rank": 4})
    llm = TinyLLM(vocabulary, dim=32, depth=2, heads=4, hidden=48)
    return VLM(student, llm, WordTokenizer.image).eval()


def whole_method(c: Config = C, n_text: int = 0) -> tuple[MoVEKD, Teachers, dict]:
    """Model, teachers, and a batch: two samples with an image and n_text without.

    The experts are not zero.
    """
    teachers = tiny_teachers()
    records = world_records("train", "chat", 2) + world_records("train", "text", n_text)
    words = world_records("train", "chat", 200) + world_records("train", "text", 200)
    tokenizer = WordTokenizer.from_records(words)
    dataset = Conversations(records, WorldImages("train", 2), tokenizer, "v1", 36, 999)
    vlm = small_vlm(len(tokenizer.vocabulary))
    model = build_movekd(c, vlm, teachers)
    for layer in mole_layers(vlm.student):
        nn.init.normal_(layer.lora.up.weight, std=0.1)
    return model, teachers, collate([dataset[i] for i in range(len(dataset))], 0)


def total_loss(terms: dict, c: Config = C) -> torch.Tensor:
    """L_total of train.py, by default with TINY's weights."""
    return train.total_loss(c, terms)


# ------------------------------------------------------------------------------------------------
# Runs

SHORT = ("--tiny --stage0-scale 0.01 --max-steps 4 --log-every 1 --n-pretrain 128 --n-train 64 "
         "--n-described 32 --n-text 32 --n-eval 12 --stage1-batch 16 --stage2-batch 8").split()
# two samples a step: with one for each of two processes, one process often has no image, and some
# expert no token
SHARED = ("--stage1-batch 2 --stage2-batch 2 --max-steps 10 --log-every 1 --save-every 4 "
          "--keep 9").split()


def run_here(folder: Path, *flags: str) -> None:
    """train.py in this process, as if started in `folder`."""
    with contextlib.chdir(folder):
        train.main(list(flags))


def run_script(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    """`python train.py ...` in a process of its own."""
    return subprocess.run([sys.executable, str(HERE / "train.py"), *flags], cwd=folder,
                          capture_output=True, encoding="utf-8")


def assert_same_run(a: Path, b: Path, *more: str) -> None:
    """Two runs have the same log and weights, byte for byte."""
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
    if how == "a pipe":  # which a reader would wait for
        os.mkfifo(path)


# ------------------------------------------------------------------------------------------------
# Files like those that the real run downloads

REAL = {  # real names at toy sizes
    "clip": "vit_base_patch16_clip_quickgelu_224.openai img_size=48 patch_size=8 embed_dim=96 "
            "depth=4 num_heads=4",
    "eva": "eva02_tiny_patch14_224.mim_in22k img_size=64 patch_size=16 embed_dim=80 depth=3 "
           "num_heads=4",
    "convnext": "convnext_atto.d2_in1k img_size=64 depths=(1,1,2,1) dims=(16,32,64,128)",
    "sam": "samvit_base_patch16.sa1b img_size=64 embed_dim=32 depth=2 num_heads=2 "
           "global_attn_indexes=(1,) neck_chans=24 window_size=2",
}
# EVA's file has another patch size and resolution than its spec, as for the real run
IN_FILE = {"eva": {"img_size": 84, "patch_size": 14}}


def random_file(name: str, folder: Path) -> nn.Module:
    """The timm model of REAL[name] with random weights, its head on, saved as the hub has it."""
    model, size, options = parse_spec(REAL[name])
    if not model.startswith("convnext"):
        options["img_size"] = size
    net = timm.create_model(model, **{**options, **IN_FILE.get(name, {})})
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    state = {key: value.contiguous() for key, value in net.state_dict().items()}
    save_file(state, folder / f"{model}.safetensors")
    return net


def llama_pieces(tokenizers, size: int = 700) -> tuple[dict[str, int], list]:
    """(vocabulary, merges) of a tokenizer with Llama's settings, made of the tiny world's words.

    As a sentencepiece model of byte-pair encoding: pieces that begin with a space, and a byte each
    for what is no piece. LlamaTokenizer(vocabulary, merges) reads with it.
    """
    texts = ["A chat between a curious user and an artificial intelligence assistant. USER: "]
    for record in world_records("train", "chat", 50) + world_records("train", "caption", 50):
        for turn in record["conversations"]:
            texts += turn["value"].splitlines()
    model = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    single = [f"<0x{byte:02X}>" for byte in range(256)]
    model.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<unk>", "<s>", "</s>", *single], show_progress=False))
    pieces = json.loads(model.to_str())["model"]
    return pieces["vocab"], [tuple(merge) for merge in pieces["merges"]]


def full_flags(real_folder: Path, llama_folder: Path) -> list[str]:
    """`--full`, with files in place of downloads, at toy sizes."""
    flags = ["--full", "--device", "cpu", "--precision", "fp32", "--data-root", str(real_folder),
             "--weights", str(real_folder), "--llm", str(llama_folder)]
    for name, spec in REAL.items():
        flags += [f"--{name}", spec]
    return flags + ("--stage1-batch 4 --stage2-batch 4 --micro-batch 2 "
                    "--log-every 1 --workers 1 --mole-rank 4 "
                    "--teachers clip eva convnext sam").split()


def released_tensors(llama: nn.Module, vision: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of the authors' layout: 2 experts of rank 4 in each of 3 blocks of width 128."""
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
                tensors[f"{mlp}{part}.{e}.lora_A.weight"] = torch.randn(4, d_in)
                tensors[f"{mlp}{part}.{e}.lora_A.bias"] = torch.randn(4)
                tensors[f"{mlp}{part}.{e}.lora_B.weight"] = torch.randn(d_out, 4)
                tensors[f"{mlp}{part}.{e}.lora_B.bias"] = torch.randn(d_out)
    for i, d_in in ((0, 128), (2, 32)):
        tensors[f"model.mm_projector.{i}.weight"] = torch.randn(32, d_in)
        tensors[f"model.mm_projector.{i}.bias"] = torch.randn(32)
    tensors.update(llama.state_dict())
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def released_json(llama_folder: Path, folder: Path) -> None:
    """config.json and tokenizer of a checkpoint in the authors' layout."""
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
