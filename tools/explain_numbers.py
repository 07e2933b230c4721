"""The quantities of one training step on one image, for tools/explain.py.

Every number comes out of the method's own functions (kd_loss.py, mole.py, teachers.py, model.py).

Letters as everywhere; here B = 1, and rows lose it: a (1, n, d) of the method is (n, d) here.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from data import IGNORE, Conversations, collate
from kd_loss import kd_loss, on_grid, token_errors, token_weights
from model import MoVEKD, Student, text_loss
from mole import router_probs
from plumbing.config import Config
from teachers import ClipEncoder, TeacherOutput, Teachers
from tools.explain_shapes import teacher_shapes, text_shapes

FORMS = ("paper", "released", "uniform")    # of W^tok


class Looks(NamedTuple):
    """What CLIP's [CLS] looks at, and the token weights that each form makes of it."""

    weights: dict[str, torch.Tensor]    # W^tok (n,) by form
    n_max: dict[str, float]             # n times the largest: 1 is uniform, n is one token alone
    entropy: dict[str, float]           # over log n: 1 is uniform, 0 is one token alone
    itself: float                       # the share of [CLS]'s attention that stays on [CLS]
    whose: str                          # whose [CLS]: the frozen teacher's, or the student's own


class Word(NamedTuple):
    """One token of the conversation: an answer's is seen by the loss."""

    text: str
    answer: bool
    loss: float         # its -log p; nan where the loss does not look
    count: int = 1      # image tokens, all alike, are one Word


class Answer(NamedTuple):
    """A generated answer to one question."""

    question: str
    truth: str
    tokens: list[tuple[str, float, list[tuple[str, float]]]]    # text, its p, the likeliest others


class Moment(NamedTuple):
    """One forward of the whole method, before or after training."""

    V_s: torch.Tensor                       # (n, d)
    experts: list[torch.Tensor]             # L x (1 + n,), the expert of each token, [CLS] first
    probs: list[torch.Tensor]               # L x (1 + n, E)
    student: dict[str, torch.Tensor]        # m x (n, d), what is compared with each teacher
    targets: dict[str, torch.Tensor]        # m x (n, d), V^t_i
    w_tea: dict[str, float]                 # W^tea
    errors: dict[str, torch.Tensor]         # m x (n_i,), MSE of each token
    teacher_losses: dict[str, float]        # sum_j (W^tok_j + 1/n) MSE_ij
    terms: dict[str, float]                 # L_text, L_kd, L_balance of MoVEKD.forward
    words: list[Word]
    shapes: list[tuple[str, str, tuple]]    # name, letters, size


def make_batch(c: Config, tokenizer, record: dict, image: torch.Tensor, n: int, side: str
               ) -> dict:
    """A batch of one record about one image (3, R, R), on the device of the run."""
    rows = Conversations([record], lambda name: image, tokenizer, "v1", n, c.max_length)
    batch = collate([rows.sample(0)], tokenizer.pad, side)
    return {key: value.to(c.device) if torch.is_tensor(value) else value
            for key, value in batch.items()}


@torch.no_grad()
def look(student: Student, outputs: dict[str, TeacherOutput], images: torch.Tensor) -> Looks:
    """Token weights of one image (1, 3, R, R). Without teachers it is the student's own [CLS]."""
    clip = outputs.get("clip") or ClipEncoder.forward(student, images)
    scores = clip.cls_scores                                                     # (1, h, 1 + n)
    weights = {form: token_weights(scores, form)[0].cpu() for form in FORMS}
    n_max, entropy = {}, {}
    for form, w in weights.items():
        n_max[form] = len(w) * w.max().item()
        entropy[form] = torch.special.entr(w).sum().item() / math.log(len(w))
    itself = scores.softmax(dim=-1)[..., 0].mean().item()
    return Looks(weights, n_max, entropy, itself, "frozen CLIP" if outputs else "student")


@torch.no_grad()
def measure(model: MoVEKD, teachers: Teachers | None, batch: dict, tokenizer) -> Moment:
    """Everything of one forward on a batch of one sample."""
    model.eval()
    images = batch["images"]
    outputs = teachers(images, batch["image_names"]) if teachers else {}
    V_s = model.vlm.student(images)                                                  # (1, n, d)
    probs = router_probs(model.vlm.student)                                   # L x (1, 1 + n, E)
    logits = model.vlm(V_s, batch["input_ids"], batch["attention_mask"])             # (1, T, V)
    terms = model(batch, teachers)
    student, targets, w_tea, errors, losses = {}, {}, {}, {}, {}
    shapes = text_shapes(model, batch, V_s, logits, probs)
    if outputs:
        student, targets, weights = model.match_tokens(V_s, outputs)
        w_tok = token_weights(outputs["clip"].cls_scores, model.token_weight)        # (1, n)
        _, per_teacher = kd_loss(student, targets, w_tok, weights)
        for i, name in enumerate(targets):
            w_tea[name] = weights[0, i].item()
            errors[name] = token_errors(student[name], targets[name])[0].cpu()       # (n_i,)
            losses[name] = per_teacher[name].item()
        shapes += teacher_shapes(outputs, student, targets, w_tok, weights)
    return Moment(
        V_s[0].float().cpu(), [p[0].argmax(dim=-1).cpu() for p in probs],
        [p[0].float().cpu() for p in probs], rows_of(student), rows_of(targets), w_tea, errors,
        losses, {name: terms[name].item() for name in ("L_text", "L_kd", "L_balance")},
        words_of(batch, logits, tokenizer), shapes)


def rows_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The only row of each, on the CPU."""
    return {name: tensor[0].float().cpu() for name, tensor in tensors.items()}


def weighed_errors(moment: Moment, w_tok: torch.Tensor) -> dict[str, torch.Tensor]:
    """(W^tok_j + 1/n) MSE_ij of each token: what a teacher's loss is the sum of; m x (n_i,)"""
    weighed = {}
    for name, error in moment.errors.items():
        weighed[name] = (on_grid(w_tok[None], len(error))[0] + 1 / len(error)) * error
    return weighed


def three_colours(spaces: list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
    """Tokens as colours: their first three principal components, one basis a space.

    spaces: lists of (n, d) that lie in one space each -> the same as (n, 3) in 0..1
    """
    colours = []
    for tokens in spaces:
        together = torch.cat(tokens)                                         # (all n, d)
        centred = together - together.mean(dim=0)                            # (all n, d)
        _, _, basis = torch.linalg.svd(centred, full_matrices=False)
        basis = basis[:3]                                                    # (3, d)
        # a component has no sign of its own: the largest weight is made positive
        largest = basis.gather(1, basis.abs().argmax(dim=1, keepdim=True))   # (3, 1)
        values = centred @ (basis * largest.sign()).T                        # (all n, 3)
        low = values.quantile(0.02, dim=0)                                   # (3,)
        high = values.quantile(0.98, dim=0)                                  # (3,)
        shades = ((values - low) / (high - low).clamp(min=1e-9)).clamp(0, 1)
        colours.append(list(shades.split([len(t) for t in tokens])))
    return colours


def as_colours(moments: dict[str, Moment]) -> tuple[list[tuple], list[torch.Tensor]]:
    """All tokens as colours: [(moment, title, caption)] and [(n, 3)], in one order.

    V^s, CLIP's tokens and (in the paper's direction) the adapted tokens lie in one space and share
    one basis; with heads on the student's side each teacher has a space, and a basis, of its own.
    """
    spaces = {}
    for moment, numbers in moments.items():
        own = spaces.setdefault("the student's space", [])
        own.append(((moment, "V^s", "the student's tokens"), numbers.V_s))
        for name, target in numbers.targets.items():
            same = numbers.student[name].equal(numbers.V_s)
            space = own if same else spaces.setdefault(f"the space of {name}", [])
            if not same:
                space.append(((moment, f"H(V^s) for {name}", "the student through its head"),
                              numbers.student[name]))
            space.append(((moment, f"V^t {name}", "the teacher's tokens"), target))
    labels = [label for entries in spaces.values() for label, _ in entries]
    colours = three_colours([[tokens for _, tokens in entries] for entries in spaces.values()])
    return labels, [shades for space in colours for shades in space]


# ------------------------------------------------------------------------------------------------
# Words


def words_of(batch: dict, logits: torch.Tensor, tokenizer) -> list[Word]:
    """The conversation token by token, with the loss of each that the loss sees."""
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"]
    words = []
    for i, token in enumerate(ids):
        if token == tokenizer.image:
            if words and words[-1].text == "<image>":
                words[-1] = words[-1]._replace(count=words[-1].count + 1)
            else:
                words.append(Word("<image>", False, math.nan))
            continue
        answer = labels[0, i].item() != IGNORE
        # the logits of the place before predict this token
        loss = text_loss(logits[:, i - 1:i], labels[:, i:i + 1]) if answer else math.nan
        words.append(Word(token_text(tokenizer, token), answer, float(loss)))
    return words


def token_text(tokenizer, token: int) -> str:
    """One token as text, the control tokens too."""
    if hasattr(tokenizer, "vocabulary"):
        return tokenizer.vocabulary[token]
    return tokenizer.tokenizer.convert_ids_to_tokens(token).replace("▁", " ").replace("Ġ", " ")


@torch.no_grad()
def answer(c: Config, model: MoVEKD, tokenizer, record: dict, image: torch.Tensor,
           truth: str) -> Answer:
    """The greedy answer to the last question of a record, with the probability of each token."""
    vlm = model.vlm.eval()
    batch = make_batch(c, tokenizer, record, image, vlm.student.num_tokens, "left")
    V_s = vlm.student(batch["images"])                                               # (1, n, d)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    new = vlm.generate(V_s, ids, mask, tokenizer.eos, c.max_new_tokens)              # (1, new)
    whole = torch.cat([ids, new], dim=1)                                             # (1, T + new)
    logits = vlm(V_s, whole, F.pad(mask, (0, new.shape[1]), value=1))                # (1, ., V)
    tokens = []
    for i, token in enumerate(new[0].tolist()):
        p = logits[0, ids.shape[1] + i - 1].float().softmax(dim=-1)                  # (V,)
        best = p.topk(4)
        others = [(token_text(tokenizer, k), q) for q, k in zip(best.values.tolist(),
                                                                best.indices.tolist())]
        tokens.append((token_text(tokenizer, token), p[token].item(),
                       [pair for pair in others if pair[0] != token_text(tokenizer, token)]))
    question = record["conversations"][-1]["value"].replace("<image>", "").strip()
    return Answer(question, truth, tokens)
