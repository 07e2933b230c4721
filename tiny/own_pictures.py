"""Stage 0 on a set's own pictures (`--stage0-pictures data`): encoders that know them, not a toy's.

    CLIP      contrastively: which of several answers to the same question is this picture's?
    EVA       self-supervised: sees a picture with cells hidden, rebuilds its pixels at every token
    ConvNeXt  the same, on its coarser grid

tiny/pretrain.py trains the same encoders on the tiny world, where every label is known. Here there
are only pictures and conversations, so the teachers learn without labels.

Letters: N pictures, B pictures of a batch, Q questions about them, C answers to choose from, S
sentences, T tokens, n_i tokens of an encoder, R pixels of the loader's square image.
"""

import hashlib
import inspect
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data import InputError
from real.image_files import DiskImages
from teachers import VisionEncoder
from tiny.llm import WordTokenizer
from tiny.pretrain import SEED, clip_for_contrast, fit, text_encoder

IMAGES = 6_000      # at most so many pictures, as many as of the tiny world
QUESTIONS = 8       # of one picture in a batch
ANSWERS = 16        # to choose from
WORDS = 77          # of a sentence at most, as of CLIP's texts
HIDDEN = 0.4        # share of the cells that are hidden
CELLS = 8           # in a row of a picture
PATCH = 8           # pixels in a row of what a token rebuilds
RECIPES = {  # steps, batch, peak learning rate
    "clip": (600, 64, 1e-3),
    "eva": (350, 32, 2e-3),
    "convnext": (450, 32, 2e-3),
}


class OwnPictures(NamedTuple):
    """Pictures of a set and what is said of each: all of it can be a job's argument."""

    folder: str
    size: int                                # R
    names: list[str]                         # of N pictures
    turns: list[list[tuple[str, str]]]       # of each: (question, answer)
    made_of: str                             # changes when a picture does, or this file

    def load(self) -> torch.Tensor:
        """The pictures, uint8 (N, 3, R, R)."""
        read = DiskImages(Path(self.folder), self.size, allow_outside=True)  # looked at before
        return torch.stack([read(name) for name in tqdm(self.names, desc="pictures", leave=False)])


def own_pictures(records: Iterable[dict], folder: Path, size: int) -> OwnPictures:
    """The pictures of a set's records, a random IMAGES of them if they are more.

    Raises InputError if there are none.
    """
    turns = {}
    for record in records:
        if "image" in record:
            turns.setdefault(record["image"], []).extend(answered(record["conversations"]))
    if not turns:
        raise InputError("--stage0-pictures data: no record of --data has an image to learn from")
    names = sorted(turns)
    if len(names) > IMAGES:
        names = sorted(random.Random(SEED).sample(names, IMAGES))
    source = inspect.getsource(sys.modules[__name__])
    made_of = hashlib.sha256((source + DiskImages(folder, size).fingerprint(names)).encode())
    return OwnPictures(str(folder), size, names, [turns[name] for name in names],
                       made_of.hexdigest())


def answered(conversation: list[dict]) -> list[tuple[str, str]]:
    """(question, answer) pairs of a conversation, which may begin or end with anyone's turn."""
    pairs = []
    for turn, reply in zip(conversation, conversation[1:]):
        if turn["from"] == "human" and reply["from"] == "gpt":
            pairs.append((turn["value"].replace("<image>", "").strip(), reply["value"].strip()))
    return pairs


class Sentences:
    """Every "question answer" of a set once, and which of them answer the same question."""

    def __init__(self, turns: list[list[tuple[str, str]]]):
        self.number = {}    # (question, answer): its sentence
        self.rivals = {}    # question: the sentences that answer it
        for pair in (pair for said in turns for pair in said):
            if pair not in self.number:
                self.number[pair] = len(self.number)
                self.rivals.setdefault(pair[0], []).append(self.number[pair])
        texts = [f"{question} {answer}" for question, answer in self.number]
        self.tokenizer = WordTokenizer.from_texts(texts)
        tokens = [torch.tensor(self.tokenizer.encode(text)[:WORDS]) for text in texts]
        self.ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True,
                                             padding_value=self.tokenizer.pad)          # (S, T)

    def choices(self, pair: tuple[str, str], chance: random.Random) -> list[int]:
        """ANSWERS sentences at most: the pair's own first, then others to the same question.

        A question that has one answer in the whole set, as when no two are alike, is held against
        sentences of anything.
        """
        own = self.number[pair]
        others = [sentence for sentence in self.rivals[pair[0]] if sentence != own]
        if not others:
            others = chance.choices(range(len(self.number)), k=ANSWERS)
            others = sorted(set(others) - {own})
        return [own, *chance.sample(others, min(len(others), ANSWERS - 1))]


def own_clip(spec: str, scale: float, pictures: OwnPictures) -> tuple[nn.Module, float]:
    """[CLS] of a picture against sentences: its own is told from other answers to its question.

    CLIP's own contrast, own caption against those of other pictures, is what this is for captions,
    which all answer one question. Of questions it would learn little: "is it red? no" is true of
    most other pictures too.
    """
    images = pictures.load()
    sentences = Sentences(pictures.turns)
    clip = clip_for_contrast(spec)
    text = text_encoder(len(sentences.tokenizer.vocabulary))
    temperature = nn.ParameterDict({"log": torch.tensor(2.5)})
    chance = random.Random(SEED)

    def loss_of(generator: torch.Generator, batch: int) -> torch.Tensor:
        rows = torch.randint(len(images), (batch,), generator=generator)
        image = F.normalize(clip.net(clip.view(images[rows])), dim=-1)                  # (B, 64)
        asked = []      # of each question the picture that it is about
        choices = []    # and its sentences, the right one first
        for i, row in enumerate(rows.tolist()):
            said = pictures.turns[row]
            for pair in chance.sample(said, min(len(said), QUESTIONS)):
                asked.append(i)
                choices.append(torch.tensor(sentences.choices(pair, chance)))
        table = nn.utils.rnn.pad_sequence(choices, batch_first=True, padding_value=-1)  # (Q, C)
        wanted, places = table.clamp(min=0).unique(return_inverse=True)                 # S', (Q, C)
        words = text(sentences.ids[wanted], sentences.tokenizer.pad)                    # (S', 64)
        logits = image @ words.T * temperature["log"].exp()                             # (B, S')
        logits = logits[torch.tensor(asked)].gather(1, places)                          # (Q, C)
        logits = logits.masked_fill(table < 0, float("-inf"))                           # (Q, C)
        return F.cross_entropy(logits, torch.zeros(len(asked), dtype=torch.long))

    modules = nn.ModuleList([clip, text, temperature])
    flops = fit("clip", RECIPES["clip"], modules, loss_of, scale)
    clip.net.reset_classifier(0)
    return clip.net, flops


def patches(images: torch.Tensor, side: int) -> torch.Tensor:
    """The pixels that each of side x side tokens rebuilds: (B, 3, R, R) -> (B, n_i, 3 PATCH^2)"""
    small = F.interpolate(images, side * PATCH, mode="bilinear", antialias=True)
    return F.unfold(small, PATCH, stride=PATCH).transpose(1, 2)                 # (B, n_i, .)


def masked(name: str, spec: str, scale: float, pictures: OwnPictures) -> tuple[nn.Module, float]:
    """Masked image modelling: cells of the picture are grey, a linear head rebuilds all pixels."""
    images = pictures.load()
    encoder = VisionEncoder(spec)
    head = nn.Sequential(nn.LayerNorm(encoder.dim), nn.Linear(encoder.dim, 3 * PATCH ** 2))
    side = round(encoder.num_tokens ** 0.5)

    def loss_of(generator: torch.Generator, batch: int) -> torch.Tensor:
        rows = torch.randint(len(images), (batch,), generator=generator)
        whole = images[rows].float()                                            # (B, 3, R, R)
        hidden = torch.rand(batch, 1, CELLS, CELLS, generator=generator) < HIDDEN
        hidden = F.interpolate(hidden.float(), images.shape[-1])                # (B, 1, R, R)
        shown = (whole * (1 - hidden) + 127 * hidden).to(torch.uint8)           # (B, 3, R, R)
        target = patches(whole, side)                                           # (B, n_i, .)
        target = (target - target.mean()) / (target.std() + 1e-6)               # (B, n_i, .)
        return F.mse_loss(head(encoder(shown).tokens), target)

    flops = fit(name, RECIPES[name], nn.ModuleList([encoder, head]), loss_of, scale)
    return encoder.net, flops


def own_eva(spec: str, scale: float, pictures: OwnPictures) -> tuple[nn.Module, float]:
    """EVA by masked image modelling."""
    return masked("eva", spec, scale, pictures)


def own_convnext(spec: str, scale: float, pictures: OwnPictures) -> tuple[nn.Module, float]:
    """ConvNeXt by masked image modelling."""
    return masked("convnext", spec, scale, pictures)


OWN_MAKERS = {"clip": own_clip, "eva": own_eva, "convnext": own_convnext}
