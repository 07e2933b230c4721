"""Stage 0 on the pictures of a data set (`--stage0-pictures data`), which have no labels.

    CLIP      contrastively: which of several answers to the same question fits this picture?
    EVA       self-supervised: sees a picture with cells hidden, rebuilds its pixels at every token
    ConvNeXt  the same, on its coarser grid

Letters: those of tiny/pretrain.py, Q questions, C answers to choose from, R pixels of an image.
"""

import itertools
import json
import random
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data import InputError
from plumbing.files import digest
from teachers import VisionEncoder
from tiny.pretrain import IMAGES, SEED, ClipAndTexts, Training

QUESTIONS = 8       # at most, of one picture in a batch
ANSWERS = 16        # at most, to choose from
HIDDEN = 0.4        # fraction of the cells that are hidden
CELLS = 8           # in a row of a picture
PATCH = 8           # px of the side of the patch that a token rebuilds


class OwnPictures:
    """Pictures of a set's records, a random IMAGES of them if there are more, and their dialogues.

    Raises InputError if there are none. It can be pickled; the pixels are read by `load`.
    """

    def __init__(self, records: Iterable[dict], get_image: Callable):
        turns = {}
        for record in records:
            if "image" not in record:
                continue
            answered = turns.setdefault(record["image"], [])
            for turn, reply in itertools.pairwise(record["conversations"]):
                if turn["from"] == "human" and reply["from"] == "gpt":
                    question = turn["value"].replace("<image>", "").strip()
                    answered.append((question, reply["value"].strip()))
        if not turns:
            raise InputError("--stage0-pictures data: no record of --data has an image")
        count = min(len(turns), IMAGES)
        self.names = sorted(random.Random(SEED).sample(sorted(turns), count))
        self.turns = [turns[name] for name in self.names]  # (question, answer) pairs of each
        self.get_image = get_image
        pixels = [str(get_image.size), get_image.fingerprint(self.names)]
        self.fingerprint = digest(*pixels, json.dumps(self.turns))

    def load(self) -> torch.Tensor:
        """Return the pictures, uint8 (N, 3, R, R)."""
        names = tqdm(self.names, desc="pictures", leave=False)
        return torch.stack([self.get_image(name) for name in names])


def choices(right: int, answers: list[int], count: int, chance: random.Random) -> list[int]:
    """Return the right sentence, then other answers to its question; at most ANSWERS."""
    others = [number for number in answers if number != right]
    if not others:  # a question with one answer: any of the set's `count` sentences
        others = sorted(set(chance.choices(range(count), k=ANSWERS)) - {right})
    return [right, *chance.sample(others, min(len(others), ANSWERS - 1))]


def own_clip(spec: str, pictures: OwnPictures) -> Training:
    """Train [CLS] to pick a picture's answer among other answers to the same question.

    CLIP's contrast would teach little: "is it red? no" is true of most other pictures too.
    """
    images = pictures.load()
    sentences = dict.fromkeys(itertools.chain.from_iterable(pictures.turns))    # each once
    numbers = {turn: number for number, turn in enumerate(sentences)}
    answers = {}    # question: the numbers of its answers
    for (question, _), number in numbers.items():
        answers.setdefault(question, []).append(number)
    model = ClipAndTexts(spec, [" ".join(turn) for turn in numbers])
    chance = random.Random(SEED)

    def loss_of(generator: torch.Generator, batch: int) -> torch.Tensor:
        rows = torch.randint(len(images), (batch,), generator=generator)
        about = []      # which picture of the batch each question is about
        table = []      # the sentences to choose from, the right one first
        for i, row in enumerate(rows.tolist()):
            turns = pictures.turns[row]
            for turn in chance.sample(turns, min(len(turns), QUESTIONS)):
                about.append(i)
                numbered = choices(numbers[turn], answers[turn[0]], len(numbers), chance)
                table.append(torch.tensor(numbered))
        table = nn.utils.rnn.pad_sequence(table, batch_first=True, padding_value=-1)    # (Q, C)
        used, columns = table.clamp(min=0).unique(return_inverse=True)               # (S,) (Q, C)
        logits = model(images[rows], used)[torch.tensor(about)]                         # (Q, S)
        logits = logits.gather(1, columns).masked_fill(table < 0, float("-inf"))        # (Q, C)
        return F.cross_entropy(logits, torch.zeros(len(about), dtype=torch.long))

    return model, loss_of, model.clip.net


def patches(images: torch.Tensor, side: int) -> torch.Tensor:
    """Return the pixels that each token rebuilds: (B, 3, R, R) -> (B, side^2, 3 PATCH^2)"""
    small = F.interpolate(images, side * PATCH, mode="bilinear", antialias=True)
    return F.unfold(small, PATCH, stride=PATCH).transpose(1, 2)                 # (B, n_i, .)


def masked(spec: str, pictures: OwnPictures) -> Training:
    """Train by masked image modelling: cells are grey, a linear head rebuilds all pixels."""
    images = pictures.load()
    encoder = VisionEncoder(spec)
    head = nn.Sequential(nn.LayerNorm(encoder.dim), nn.Linear(encoder.dim, 3 * PATCH ** 2))
    side = round(encoder.num_tokens ** 0.5)

    def loss_of(generator: torch.Generator, batch: int) -> torch.Tensor:
        pixels = images[torch.randint(len(images), (batch,), generator=generator)].float()
        hidden = torch.rand(batch, 1, CELLS, CELLS, generator=generator) < HIDDEN
        hidden = F.interpolate(hidden.float(), images.shape[-1])                # (B, 1, R, R)
        grey = (pixels * (1 - hidden) + 127 * hidden).to(torch.uint8)           # (B, 3, R, R)
        target = patches(pixels, side)                                          # (B, n_i, .)
        target = (target - target.mean()) / (target.std() + 1e-6)               # (B, n_i, .)
        return F.mse_loss(head(encoder(grey).tokens), target)

    return nn.ModuleList([encoder, head]), loss_of, encoder.net


OWN_MAKERS = {  # as MAKERS of tiny/pretrain.py
    "clip": (own_clip, (600, 64, 1e-3)),
    "eva": (masked, (350, 32, 2e-3)),
    "convnext": (masked, (450, 32, 2e-3)),
}
