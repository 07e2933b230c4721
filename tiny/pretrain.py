"""Stage 0: makes the "pretrained" models that the real method downloads, each by its own training.

    CLIP      contrastively with captions: shape, colour, background; [CLS] learns where to look
    EVA       densely: at every token, is the object here; where are its centre, its size, its turn?
    ConvNeXt  on fine texture: which pattern?
    LLM       on text alone: the next word of the data's captions and dialogues

The files are in tiny/weights, made by `python -m tiny.pretrain` (2 min). `train.py --tiny` calls
stage0(), which takes them; for other encoders or other words it makes its own, once.

Letters: N pictures, B pictures or texts of a batch, S texts, T tokens, n_i tokens of an encoder.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import plumbing.files as files
import tiny
from data import conversation_ids
from teachers import VisionEncoder, create_net
from tiny.llm import TinyLLM, WordTokenizer
from tiny.pictures import render
from tiny.scenes import ATTRIBUTES, sample_scenes, scene_geometry
from tiny.world import caption, tiny_set

SHIPPED = Path(__file__).parent / "weights"
SEED = 0  # the pretrained models are downloads in the real method: the same for every seed of a run
IMAGES = 6_000
WORDS = 77  # of a text for CLIP at most, as of CLIP's own
# the module to train, its loss_of(generator, batch size), and the net in it to keep
Training = tuple[nn.Module, Callable, nn.Module]

# ------------------------------------------------------------------------------------------------
# The four trainings


def pictures(scale: float, seed: int) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Return scenes (N, 7), their images (N, 3, R, R) and their geometry."""
    scenes = sample_scenes("train", max(64, round(IMAGES * scale)), seed)
    return scenes, render(scenes, seed), scene_geometry(scenes, seed)


class ClipAndTexts(nn.Module):
    """CLIP with new weights, and a small encoder of texts: both end in one space, of width 64."""

    def __init__(self, spec: str, texts: list[str]):
        super().__init__()
        tokenizer = WordTokenizer.from_texts(texts)
        tokens = [torch.tensor(tokenizer.encode(text)[:WORDS]) for text in texts]
        self.pad = tokenizer.pad
        self.ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=self.pad)
        self.clip = VisionEncoder(spec, create_net(spec, num_classes=64))
        for module in self.clip.modules():
            if isinstance(module, nn.Linear):
                # timm's std of 0.02 is meant for width 1024; at 96 shapes are then learned late
                module.reset_parameters()
        nn.init.normal_(self.clip.net.pos_embed, std=0.3)  # at 0.02 positions hardly differ
        self.embed = nn.Embedding(len(tokenizer.vocabulary), 64)
        self.layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        self.head = nn.Linear(64, 64)
        self.temperature = nn.ParameterDict({"log": torch.tensor(2.5)})

    def forward(self, images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """Compare images with texts, given by number: (B, 3, R, R), (S,) -> logits (B, S)"""
        image = F.normalize(self.clip.net(self.clip.view(images)), dim=-1)              # (B, 64)
        ids = self.ids[texts]                                                           # (S, T)
        padding = ids == self.pad                                                       # (S, T)
        words = self.layer(self.embed(ids), src_key_padding_mask=padding)               # (S, T, 64)
        words = words.masked_fill(padding[:, :, None], 0).sum(dim=1)                    # (S, 64)
        words = F.normalize(self.head(words), dim=-1)                                   # (S, 64)
        return image @ words.T * self.temperature["log"].exp()                          # (B, S)


def pretrain_clip(spec: str, scale: float) -> Training:
    """Train [CLS] by InfoNCE with captions, whose encoder is thrown away afterwards.

    In so small a world several images of a batch share a caption, so the target of an image is
    every equal caption, not its own alone.
    """
    scenes, images, _ = pictures(scale, seed=10)
    generator = torch.Generator().manual_seed(SEED)
    model = ClipAndTexts(spec, [caption(scene, generator) for scene in scenes.tolist()])

    def loss_of(generator: torch.Generator, batch: int) -> torch.Tensor:
        rows = torch.randint(len(images), (batch,), generator=generator)
        logits = model(images[rows], rows)                                              # (B, B)
        ids = model.ids[rows]                                                           # (B, T)
        same = (ids[:, None] == ids).all(dim=-1).float()                                # (B, B)
        target = same / same.sum(dim=1, keepdim=True)                                   # (B, B)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    return model, loss_of, model.clip.net


def cells(encoder: VisionEncoder, geometry: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Return dx, dy (N, n_i) from the centre of each token's cell to the object, in half images."""
    side = round(encoder.num_tokens ** 0.5)
    line = (torch.arange(side) + 0.5) / side * 2 - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    return geometry["x"][:, None] - x.flatten(), geometry["y"][:, None] - y.flatten()


def pretrain_eva(spec: str, scale: float) -> Training:
    """Train a dense head at every token, like a detector's: here or not, centre, size, turn."""
    _, images, geometry = pictures(scale, seed=11)
    eva = VisionEncoder(spec)
    head = nn.Sequential(nn.LayerNorm(eva.dim), nn.Linear(eva.dim, 5))
    distance = torch.hypot(*cells(eva, geometry))                                       # (N, n_i)
    here = (distance < geometry["radius"][:, None]).float()                             # (N, n_i)
    box = torch.stack([geometry["x"], geometry["y"], geometry["radius"].log(),
                       geometry["angle"]], dim=-1)                                      # (N, 4)
    box = (box - box.mean(dim=0)) / box.std(dim=0)                                      # (N, 4)

    def loss_of(generator: torch.Generator, batch: int) -> torch.Tensor:
        rows = torch.randint(len(images), (batch,), generator=generator)
        out = head(eva(images[rows]).tokens)                                         # (B, n_i, 5)
        error = (out[..., 1:] - box[rows, None]).square().mean()
        return error + F.binary_cross_entropy_with_logits(out[..., 0], here[rows])

    return nn.ModuleList([eva, head]), loss_of, eva.net


def pretrain_convnext(spec: str, scale: float) -> Training:
    """Train it to name the pattern at every token that the object covers."""
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
        target = pattern[rows, None].expand_as(covered)                              # (B, n_i)
        return F.cross_entropy(logits[covered], target[covered])

    return nn.ModuleList([convnext, head]), loss_of, convnext.net


def pretrain_llm(shape: tuple, texts: list[list[int]], pad: int) -> Training:
    """Train by plain language modelling: the loss is on every token."""
    llm = TinyLLM(*shape)

    def loss_of(generator: torch.Generator, batch: int) -> torch.Tensor:
        chosen = torch.randint(len(texts), (batch,), generator=generator).tolist()
        rows = [torch.tensor(texts[i]) for i in chosen]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)      # (B, T)
        logits = llm(llm.embed(ids), (ids != pad).long())                               # (B, T, V)
        predicted = logits[:, :-1].flatten(0, 1)                                # (B * (T - 1), V)
        return F.cross_entropy(predicted, ids[:, 1:].flatten(), ignore_index=pad)

    return llm, loss_of, llm


MAKERS = {  # the training; steps, batch, peak learning rate
    "clip": (pretrain_clip, (450, 64, 1e-3)),
    "eva": (pretrain_eva, (350, 32, 2e-3)),
    "convnext": (pretrain_convnext, (700, 48, 2e-3)),
    "llm": (pretrain_llm, (250, 32, 3e-3)),
}

# ------------------------------------------------------------------------------------------------
# Trained once, and found from then on


def train_model(path: Path, name: str, scale: float, maker: tuple, arguments: tuple) -> None:
    """Train one model by AdamW, with one cycle of learning rate, and write its weights."""
    prepare, (steps, batch, lr) = maker
    steps = max(2, round(steps * scale))
    with torch.random.fork_rng(devices=[]):  # the run's own random numbers stay as they are
        torch.manual_seed(SEED)
        model, loss_of, net = prepare(*arguments)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(SEED)
    model.train()
    bar = tqdm(range(steps), desc=f"stage 0: {name}", mininterval=2)
    for _ in bar:
        loss = loss_of(generator, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    if name == "clip":
        net.reset_classifier(0)  # the projection into the space that it shares with texts
    files.write_tensors(path, net.state_dict())


def llm_texts(records: list[dict], tokenizer: WordTokenizer) -> list[list[int]]:
    """Return the training texts of an LLM for these records: the ids of those without an image."""
    # answers about an image that the LLM does not see would teach it to guess
    pure = [record for record in records if "image" not in record] or records
    return [conversation_ids(record, "v1", tokenizer, n=0)[0] for record in pure]


def stage0(models: dict[str, tuple], scale: float, folder: Path) -> dict[str, Path]:
    """Return files with the models' weights, made now in `folder` if missing.

    `models` has each one's entry of MAKERS and the arguments of its training. `scale` multiplies
    the steps. A file's name has a hash of all that made it; one in tiny/weights says in its header
    for what arguments it was made. Raises InputError.
    """
    sources = sorted(Path(__file__).parent.glob("*.py"))
    source = [file.read_text(encoding="utf-8") for file in sources]
    paths = {}
    for name, (_, arguments) in models.items():
        made_for = json.dumps([scale, arguments], default=lambda own: own.fingerprint)
        paths[name] = SHIPPED / f"{name}.safetensors"
        if files.read_about(paths[name]).get("made_for") != files.digest(made_for):
            key = files.digest(*source, made_for)[:12]
            paths[name] = folder / f"{name}-{key}.safetensors"
    missing = [name for name, path in paths.items() if not path.exists()]
    if missing:
        files.require_writable(folder, "--stage0")
        print(f"stage 0: training {', '.join(missing)} (once; kept under {folder})",
              file=sys.stderr)
    for name in missing:
        train_model(paths[name], name, scale, *models[name])
    for path in paths.values():
        files.read_tensors(path, "delete it, and it is made again")
    return paths


def main() -> None:
    """Make tiny/weights anew: the stand-ins of the tiny world, in half precision."""
    pretrain, _ = tiny_set("pretrain", tiny.COUNTS["pretrain"])
    train, _ = tiny_set("train", *(tiny.COUNTS[name] for name in ("train", "described", "text")))
    tokenizer = WordTokenizer.from_records([*pretrain, *train])
    jobs = {name: (MAKERS[name], (spec, 1.0)) for name, spec in tiny.ENCODERS.items()}
    shape = (len(tokenizer.vocabulary), *tiny.LLM.values())
    jobs["llm"] = (MAKERS["llm"], (shape, llm_texts(train, tokenizer), tokenizer.pad))
    for name, job in jobs.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            train_model(path, name, 1.0, *job)
            halves = {key: value.half() for key, value in files.read_tensors(path, "").items()}
            made_for = files.digest(json.dumps([1.0, job[1]]))
            files.write_tensors(SHIPPED / f"{name}.safetensors", halves, made_for=made_for)


if __name__ == "__main__":
    main()
