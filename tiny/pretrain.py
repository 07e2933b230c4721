"""Stage 0: makes the "pretrained" models that the real method downloads, each by its own training.

    CLIP      contrastively with captions: shape, colour, background; [CLS] learns where to look
    EVA       densely: at every token, is the object here; where are its centre, its size, its turn?
    ConvNeXt  on fine texture: which pattern?
    LLM       on text alone: the next word of the data's captions and dialogues

`train.py --tiny` calls stage0() and finds the files from then on. Each file's name carries a hash
of all that made it.

Letters: N pictures, B pictures or texts of a batch, T tokens, n_i tokens of an encoder.
"""

import hashlib
import inspect
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from multiprocessing import active_children, get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data import InputError
from plumbing.files import flop_counter, read_about, read_tensors, write_tensors
from teachers import VisionEncoder, create_net
from tiny.llm import TinyLLM, WordTokenizer
from tiny.pictures import render
from tiny.scenes import ATTRIBUTES, sample_scenes, scene_geometry
from tiny.world import caption, world_records

FOLDER = Path("runs/stage0")
SEED = 0  # the pretrained models are downloads in the real method: the same for every seed of a run
IMAGES = 6_000
PARENT = 0  # the process that a worker of stage 0 works for
RECIPES = {  # steps, batch, peak learning rate
    "clip": (450, 64, 1e-3),
    "eva": (350, 32, 2e-3),
    "convnext": (700, 48, 2e-3),
    "llm": (250, 32, 3e-3),
}


def fit(name: str, recipe: tuple, modules: nn.Module, loss_of: Callable, scale: float) -> float:
    """AdamW with one cycle of learning rate on loss_of(generator, batch); returns the FLOPs.

    recipe: steps, batch, peak learning rate.
    """
    steps, batch, lr = recipe
    steps = max(2, round(steps * scale))
    optimizer = torch.optim.AdamW(modules.parameters(), lr=lr, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(SEED)
    flops = 0.0
    modules.train()
    bar = tqdm(range(steps), desc=f"stage 0: {name}", mininterval=2)
    for step in bar:
        if PARENT and os.getppid() != PARENT:
            sys.exit("stage 0: the run that wanted this model is gone")
        counter = flop_counter()
        with counter if step == 0 else nullcontext():
            loss = loss_of(generator, batch)
            loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        flops = flops or counter.get_total_flops() * steps
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return flops


def pictures(scale: float, seed: int) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Scenes (N, 7), their images (N, 3, R, R), their geometry."""
    scenes = sample_scenes("train", max(64, round(IMAGES * scale)), seed)
    return scenes, render(scenes, seed), scene_geometry(scenes, seed)


# ------------------------------------------------------------------------------------------------
# The four trainings


class TextEncoder(nn.ModuleDict):
    """What CLIP's pictures are held against: words of a text, one layer, their sum."""

    def forward(self, ids: torch.Tensor, pad: int) -> torch.Tensor:
        padding = ids == pad                                                            # (B, T)
        words = self["layer"](self["embed"](ids), src_key_padding_mask=padding)         # (B, T, 64)
        words = words.masked_fill(padding[:, :, None], 0).sum(dim=1)                    # (B, 64)
        return F.normalize(self["head"](words), dim=-1)                                 # (B, 64)


def text_encoder(words: int) -> TextEncoder:
    """A small one with new weights, for a vocabulary of so many words."""
    return TextEncoder({
        "embed": nn.Embedding(words, 64),
        "layer": nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True),
        "head": nn.Linear(64, 64)})


def clip_for_contrast(spec: str) -> VisionEncoder:
    """CLIP with new weights, whose [CLS] ends in the space that it shares with the texts."""
    clip = VisionEncoder(spec, create_net(spec, num_classes=64))
    for module in clip.modules():
        if isinstance(module, nn.Linear):
            # timm's std of 0.02 is meant for width 1024; at 96 shapes are then learned late
            module.reset_parameters()
    nn.init.normal_(clip.net.pos_embed, std=0.3)  # at 0.02 a token hardly says where it is
    return clip


def pretrain_clip(spec: str, scale: float) -> tuple[nn.Module, float]:
    """InfoNCE between [CLS] and a caption encoder that is thrown away after.

    In so small a world several images of a batch share a caption, so the target of an image is
    every equal caption, not its own alone.
    """
    scenes, images, _ = pictures(scale, seed=10)
    generator = torch.Generator().manual_seed(SEED)
    captions = [caption(scene, generator) for scene in scenes.tolist()]
    tokenizer = WordTokenizer.from_texts(captions)
    tokens = [torch.tensor(tokenizer.encode(text)) for text in captions]
    ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=tokenizer.pad)  # (N, T)
    clip = clip_for_contrast(spec)
    text = text_encoder(len(tokenizer.vocabulary))
    temperature = nn.ParameterDict({"log": torch.tensor(2.5)})

    def loss_of(generator: torch.Generator, batch: int) -> torch.Tensor:
        rows = torch.randint(len(images), (batch,), generator=generator)
        image = F.normalize(clip.net(clip.view(images[rows])), dim=-1)                  # (B, 64)
        words = text(ids[rows], tokenizer.pad)                                          # (B, 64)
        logits = image @ words.T * temperature["log"].exp()                             # (B, B)
        same = (ids[rows][:, None] == ids[rows]).all(dim=-1).float()                    # (B, B)
        target = same / same.sum(dim=1, keepdim=True)                                   # (B, B)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    modules = nn.ModuleList([clip, text, temperature])
    flops = fit("clip", RECIPES["clip"], modules, loss_of, scale)
    clip.net.reset_classifier(0)  # the projection into the shared space goes with the captions
    return clip.net, flops


def cells(encoder: VisionEncoder, geometry: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """From the centre of each token's cell to the object's: dx, dy (N, n_i), in half images."""
    side = round(encoder.num_tokens ** 0.5)
    line = (torch.arange(side) + 0.5) / side * 2 - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    return geometry["x"][:, None] - x.flatten(), geometry["y"][:, None] - y.flatten()


def pretrain_eva(spec: str, scale: float) -> tuple[nn.Module, float]:
    """A dense head at every token, as a detector's: here or not, centre, size, turn."""
    _, images, geometry = pictures(scale, seed=11)
    eva = VisionEncoder(spec)
    head = nn.Sequential(nn.LayerNorm(eva.dim), nn.Linear(eva.dim, 5))
    here = torch.hypot(*cells(eva, geometry)) < geometry["radius"][:, None]             # (N, n_i)
    here = here.float()                                                                 # (N, n_i)
    box = torch.stack([geometry["x"], geometry["y"], geometry["radius"].log(),
                       geometry["angle"]], dim=-1)                                      # (N, 4)
    box = (box - box.mean(dim=0)) / box.std(dim=0)                                      # (N, 4)

    def loss_of(generator: torch.Generator, batch: int) -> torch.Tensor:
        rows = torch.randint(len(images), (batch,), generator=generator)
        out = head(eva(images[rows]).tokens)                                         # (B, n_i, 5)
        error = (out[..., 1:] - box[rows, None]).square().mean()
        return error + F.binary_cross_entropy_with_logits(out[..., 0], here[rows])

    flops = fit("eva", RECIPES["eva"], nn.ModuleList([eva, head]), loss_of, scale)
    return eva.net, flops


def pretrain_convnext(spec: str, scale: float) -> tuple[nn.Module, float]:
    """Names the pattern at every token that the object covers."""
    scenes, images, geometry = pictures(scale, seed=12)
    pattern = scenes[:, list(ATTRIBUTES).index("pattern")]                              # (N,)
    convnext = VisionEncoder(spec)
    classes = len(ATTRIBUTES["pattern"])
    head = nn.Sequential(nn.LayerNorm(convnext.dim), nn.Linear(convnext.dim, classes))
    distance = torch.hypot(*cells(convnext, geometry))                                  # (N, n_i)
    nearest = distance == distance.amin(dim=1, keepdim=True)                            # (N, n_i)
    here = (distance < 0.8 * geometry["radius"][:, None]) | nearest                     # (N, n_i)

    def loss_of(generator: torch.Generator, batch: int) -> torch.Tensor:
        rows = torch.randint(len(images), (batch,), generator=generator)
        logits = head(convnext(images[rows]).tokens)                                 # (B, n_i, 4)
        covered = here[rows]                                                         # (B, n_i)
        target = pattern[rows, None].expand_as(covered)[covered]
        return F.cross_entropy(logits[covered], target)

    modules = nn.ModuleList([convnext, head])
    flops = fit("convnext", RECIPES["convnext"], modules, loss_of, scale)
    return convnext.net, flops


def pretrain_llm(shape: tuple, scale: float, texts: list[list[int]],
                 pad: int) -> tuple[nn.Module, float]:
    """Plain language modelling: the loss is on every token."""
    llm = TinyLLM(*shape)

    def loss_of(generator: torch.Generator, batch: int) -> torch.Tensor:
        chosen = torch.randint(len(texts), (batch,), generator=generator).tolist()
        rows = [torch.tensor(texts[i]) for i in chosen]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)      # (B, T)
        logits = llm(llm.embed(ids), (ids != pad).long())                               # (B, T, V)
        predicted = logits[:, :-1].flatten(0, 1)                                # (B * (T - 1), V)
        return F.cross_entropy(predicted, ids[:, 1:].flatten(), ignore_index=pad)

    flops = fit("llm", RECIPES["llm"], llm, loss_of, scale)
    return llm, flops


MAKERS = {"clip": pretrain_clip, "eva": pretrain_eva, "convnext": pretrain_convnext,
          "llm": pretrain_llm}

# ------------------------------------------------------------------------------------------------
# Side by side, once


def job(maker: Callable, arguments: tuple, path: Path) -> None:
    """Train one model on one thread and write its weights, in a process of its own."""
    global PARENT
    PARENT = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    tqdm.set_lock(threading.RLock())  # tqdm's own, a semaphore, would be left behind by a kill
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    net, flops = maker(*arguments)
    write_tensors(path, net.state_dict(), tflops=flops / 1e12)


def stage0(toys: dict[str, tuple[Callable, tuple]]) -> tuple[dict[str, Path], float]:
    """Files with the toy models' weights, trained now if missing, and the TFLOPs they cost.

    `toys`: of each model that is wanted, the function that makes it and its arguments. The models
    know nothing of each other, so they train side by side, one process and one thread each. Raises
    InputError for a damaged file, or if a process is killed.
    """
    scenes = sample_scenes("train", 4)
    world = [render(scenes).sum().item(), world_records("train", "caption", 4)]
    paths = {}
    for name, (maker, args) in toys.items():
        parts = (maker, fit, pictures, cells, clip_for_contrast, text_encoder, TextEncoder)
        source = [inspect.getsource(part) for part in parts]
        made_of = [source, args, RECIPES[name], SEED, IMAGES, None if name == "llm" else world]
        key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:12]
        paths[name] = FOLDER / f"{name}-{key}.safetensors"
    missing = [name for name, path in paths.items() if not path.exists()]
    if missing:
        FOLDER.mkdir(parents=True, exist_ok=True)
        print(f"stage 0: training {', '.join(missing)} (once; kept under {FOLDER})",
              file=sys.stderr)
        workers = min(len(missing), os.cpu_count())
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            jobs = [pool.submit(job, *toys[name], paths[name]) for name in missing]
            try:
                for future in jobs:
                    future.result()
            except BrokenProcessPool:
                raise InputError("stage 0: one of its processes was killed, as for want of memory; "
                                "start again: what is ready is kept") from None
            except BaseException:  # a signal too: none of them may train on
                pool.shutdown(wait=False, cancel_futures=True)
                for process in active_children():
                    process.terminate()
                print(file=sys.stderr)  # ends the line of their bars
                raise
    tflops = 0.0
    for path in paths.values():
        read_tensors(path, "delete it, and it is made again")
        tflops += read_about(path).get("tflops", 0.0)
    return paths, tflops
