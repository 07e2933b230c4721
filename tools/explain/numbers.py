"""The quantities of one training step on one image, as the page shows them.

Every number comes out of the method's own functions (kd_loss.py, mole.py, teachers.py, model.py).

Letters as everywhere; here B = 1, and rows lose it: a (1, n, d) of the method is (n, d) here.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from data import IGNORE, Conversations, collate
from kd_loss import kd_loss, token_errors, token_weights
from model import MoVEKD, Student, text_loss
from mole import router_probs
from teachers import ClipEncoder, TeacherOutput, VisionEncoder
from tools.explain.whole_run import WholeRun

FORMS = ("paper", "released", "uniform")    # of W^tok


class Attention(NamedTuple):
    """CLIP's [CLS] attention, and the token weights that each form makes of it."""

    encoder: str                        # whose [CLS]: the frozen teacher's, or the student's own
    weights: dict[str, torch.Tensor]    # W^tok (n,) by form
    n_max: dict[str, float]             # n times the largest: 1 is uniform, n is one token alone
    entropy: dict[str, float]           # over log n: 1 is uniform, 0 is one token alone
    top: list[tuple[int, float]]        # the five tokens that weigh most, and their W^tok
    half: int                           # how many tokens have half of W^tok
    on_cls: float                       # the fraction of [CLS]'s attention that stays on [CLS]


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
    student: dict[str, torch.Tensor]        # m x (n, d), compared with each teacher
    targets: dict[str, torch.Tensor]        # m x (n, d), V^t_i
    w_tea: dict[str, float]                 # W^tea
    errors: dict[str, torch.Tensor]         # m x (n_i,), MSE of each token
    teacher_losses: dict[str, float]        # sum_j (W^tok_j + 1/n) MSE_ij
    terms: dict[str, float]                 # L_text, L_kd, L_balance of MoVEKD.forward
    words: list[Word]
    shapes: list[tuple[str, str, tuple]]    # name, letters, size


class TokenMap(NamedTuple):
    """Tokens as colours."""

    moment: str
    title: str
    caption: str
    colours: torch.Tensor                   # (n, 3)


class ExplainedImage(NamedTuple):
    """All that the page shows."""

    run: WholeRun
    image: torch.Tensor             # uint8 (3, R, R)
    name: str                       # of the image
    attention: Attention
    moments: dict[str, Moment]      # "before" and "after", or "" alone: as it is
    token_maps: list[TokenMap]
    w_means: dict[str, float]       # W^tea, the mean of the run's last logged steps
    answers: list[Answer]

    def encoders(self) -> dict[str, VisionEncoder]:
        """Return the student and the teachers' encoders, by name."""
        teachers = self.run.teachers.encoders if self.run.teachers else {}
        return {"student": self.run.model.vlm.student, **teachers}

    def highest_error(self, teacher: str) -> float:
        """Return the largest error of a teacher, before or after: its maps have one scale."""
        return max(moment.errors[teacher].max().item() for moment in self.moments.values())


def explain_image(run: WholeRun, name: str, image: torch.Tensor, questions: list[tuple[str, str]],
                  w_means: dict[str, float]) -> ExplainedImage:
    """Compute all numbers of one image (3, R, R).

    questions are (question, true answer); without an answer L_text is that of the model's own.
    """
    answers = []
    turns = []
    for question, truth in questions:
        prompt = {"from": "human", "value": f"<image>\n{question}"}
        answer = generate_answer(run, {"image": name, "conversations": [prompt]}, image, truth)
        answers.append(answer)
        generated = " ".join(text for text, _, _ in answer.tokens if text not in ("</s>", "<s>"))
        before = "" if turns else "<image>\n"
        turns.append({"from": "human", "value": before + question})
        turns.append({"from": "gpt", "value": truth or generated.strip() or "nothing"})
    batch = make_batch(run, {"image": name, "conversations": turns}, image, "right")
    outputs = run.teachers(batch["images"], [name]) if run.teachers else {}
    moments = {}
    if run.start:
        moments["before"] = measure(run, run.start, batch)
    moments["after" if run.start else ""] = measure(run, run.model, batch)
    attention = cls_attention(run.model.vlm.student, outputs, batch["images"])
    return ExplainedImage(run, image, name, attention, moments, token_maps(moments), w_means,
                          answers)


def make_batch(run: WholeRun, record: dict, image: torch.Tensor, side: str) -> dict:
    """Return a batch of one record about one image (3, R, R), padded on one side."""
    c, tokenizer, n = run.c, run.tokenizer, run.model.vlm.student.num_tokens
    rows = Conversations([record], lambda name: image, tokenizer, c.prompt, n, c.max_length)
    batch = collate([rows.sample(0)], tokenizer.pad, side)
    for key, value in batch.items():
        if torch.is_tensor(value):
            batch[key] = value.to(c.device)
    return batch


@torch.no_grad()
def cls_attention(student: Student, outputs: dict[str, TeacherOutput], images: torch.Tensor
                  ) -> Attention:
    """Read off where [CLS] looks in one image (1, 3, R, R).

    Without teachers' outputs it is the student's own [CLS].
    """
    clip = outputs.get("clip") or ClipEncoder.forward(student, images)
    scores = clip.cls_scores                                                     # (1, h, 1 + n)
    weights, n_max, entropy = {}, {}, {}
    for form in FORMS:
        w = token_weights(scores, form)[0].cpu()                                 # (n,)
        weights[form] = w
        n_max[form] = len(w) * w.max().item()
        entropy[form] = torch.special.entr(w).sum().item() / math.log(len(w))
    w, order = weights["paper"].sort(descending=True)                            # 2 x (n,)
    top = list(zip(order[:5].tolist(), w[:5].tolist(), strict=True))
    half = int((w.cumsum(dim=0) < 0.5).sum()) + 1
    on_cls = scores.softmax(dim=-1)[..., 0].mean().item()
    return Attention("frozen CLIP" if outputs else "student", weights, n_max, entropy, top, half,
                     on_cls)


@torch.no_grad()
def measure(run: WholeRun, model: MoVEKD, batch: dict) -> Moment:
    """Run one forward on a batch of one sample, and note everything of it."""
    model.eval()
    images = batch["images"]
    outputs = run.teachers(images, batch["image_names"]) if run.teachers else {}
    V_s = model.vlm.student(images)                                                  # (1, n, d)
    probs = router_probs(model.vlm.student)                                   # L x (1, 1 + n, E)
    logits = model.vlm(V_s, batch["input_ids"], batch["attention_mask"])             # (1, T, V)
    terms = model(batch, run.teachers)
    student, targets, w_tea, errors, losses = {}, {}, {}, {}, {}
    shapes = text_shapes(model, batch, V_s, logits, probs)
    if outputs:
        student, targets, weights = model.match_tokens(V_s, outputs)
        w_tok = token_weights(outputs["clip"].cls_scores, run.c.kd_token_weight)     # (1, n)
        _, per_teacher = kd_loss(student, targets, w_tok, weights)
        for i, name in enumerate(targets):
            w_tea[name] = weights[0, i].item()
            errors[name] = token_errors(student[name], targets[name])[0].cpu()       # (n_i,)
            losses[name] = per_teacher[name].item()
        shapes += teacher_shapes(outputs, student, targets, w_tok, weights)
    return Moment(
        V_s=V_s[0].float().cpu(), experts=[p[0].argmax(dim=-1).cpu() for p in probs],
        student=only_rows(student), targets=only_rows(targets), w_tea=w_tea, errors=errors,
        teacher_losses=losses,
        terms={name: terms[name].item() for name in ("L_text", "L_kd", "L_balance")},
        words=words_of(run, batch, logits), shapes=shapes)


def only_rows(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the only row of each tensor, on the CPU."""
    return {name: tensor[0].float().cpu() for name, tensor in tensors.items()}


# ------------------------------------------------------------------------------------------------
# Names, letters and sizes of the tensors


def text_shapes(model: MoVEKD, batch: dict, V_s: torch.Tensor, logits: torch.Tensor,
                probs: list[torch.Tensor]) -> list[tuple[str, str, tuple]]:
    """Return names, letters and sizes on the way from the image to the text's logits."""
    student = model.vlm.student
    shapes = [("images, uint8", "(B, 3, R, R)", batch["images"].shape),
              ("student.view(images)", "(B, 3, R_s, R_s)", student.view(batch["images"]).shape)]
    if probs:
        shapes.append(("router p, each of L layers", "(B, 1 + n, E)", probs[0].shape))
    return shapes + [("V^s", "(B, n, d)", V_s.shape),
                     ("projected", "(B, n, D)", model.vlm.projector(V_s).shape),
                     ("input_ids, labels", "(B, T)", batch["input_ids"].shape),
                     ("logits", "(B, T, V)", logits.shape)]


def teacher_shapes(outputs: dict[str, TeacherOutput], student: dict, targets: dict,
                   w_tok: torch.Tensor, w_tea: torch.Tensor) -> list[tuple[str, str, tuple]]:
    """Return names, letters and sizes of the distillation."""
    clip = outputs["clip"]
    shapes = [("CLIP's V^cls", "(B, d)", clip.cls.shape),
              ("[CLS] row before the softmax", "(B, h, 1 + n)", clip.cls_scores.shape),
              ("W^tok", "(B, n)", w_tok.shape)]
    for name, output in outputs.items():
        shapes.append((f"teacher {name}'s tokens", "(B, n_i, d_i)", output.tokens.shape))
        shapes.append((f"compared: student's side, {name}", "(B, n, d)", student[name].shape))
        shapes.append((f"compared: V^t of {name}", "(B, n, d)", targets[name].shape))
    return shapes + [("W^tea", "(B, m)", w_tea.shape), ("L_text, L_kd, L_balance", "()", ())]


# ------------------------------------------------------------------------------------------------
# Tokens as colours


def three_colours(tokens: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return tokens of one space as colours: their first three principal components, on one basis.

    Each (n, d) becomes (n, 3) in 0..1.
    """
    together = torch.cat(tokens)                                         # (all n, d)
    centred = together - together.mean(dim=0)                            # (all n, d)
    _, _, basis = torch.linalg.svd(centred, full_matrices=False)
    basis = basis[:3]                                                    # (3, d)
    # a component has no sign of its own: the largest weight is made positive
    largest = basis.gather(1, basis.abs().argmax(dim=1, keepdim=True))   # (3, 1)
    values = centred @ (basis * largest.sign()).T                        # (all n, 3)
    low = values.quantile(0.02, dim=0)                                   # (3,)
    high = values.quantile(0.98, dim=0)                                  # (3,)
    colours = ((values - low) / (high - low).clamp(min=1e-9)).clamp(0, 1)
    return list(colours.split([len(t) for t in tokens]))


def token_maps(moments: dict[str, Moment]) -> list[TokenMap]:
    """Return all tokens as colours.

    V^s, CLIP's tokens and (in the paper's direction) the adapted tokens lie in one space and share
    one basis; with heads on the student's side each teacher has a space, and a basis, of its own.
    """
    spaces = {"student": []}
    for moment, numbers in moments.items():
        own = spaces["student"]
        own.append(TokenMap(moment, "V^s", "the student's tokens", numbers.V_s))
        for name, target in numbers.targets.items():
            space = own
            if not numbers.student[name].equal(numbers.V_s):
                space = spaces.setdefault(name, [])
                space.append(TokenMap(moment, f"H(V^s) for {name}", "the student through its head",
                                      numbers.student[name]))
            space.append(TokenMap(moment, f"V^t {name}", "the teacher's tokens", target))
    maps = []
    for space in spaces.values():
        colours = three_colours([entry.colours for entry in space])
        for entry, shades in zip(space, colours, strict=True):
            maps.append(entry._replace(colours=shades))
    return maps


# ------------------------------------------------------------------------------------------------
# Words


def words_of(run: WholeRun, batch: dict, logits: torch.Tensor) -> list[Word]:
    """Return the conversation token by token, with the loss of each that the loss sees."""
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"]
    words = []
    for i, token in enumerate(ids):
        if token == run.tokenizer.image:
            if words and words[-1].text == "<image>":
                words[-1] = words[-1]._replace(count=words[-1].count + 1)
            else:
                words.append(Word("<image>", False, math.nan))
            continue
        answer = labels[0, i].item() != IGNORE
        # the logits of the place before predict this token
        loss = text_loss(logits[:, i - 1:i], labels[:, i:i + 1]) if answer else math.nan
        words.append(Word(token_text(run.tokenizer, token), answer, float(loss)))
    return words


def token_text(tokenizer, token: int) -> str:
    """Return one token as text, the control tokens too."""
    if hasattr(tokenizer, "vocabulary"):
        return tokenizer.vocabulary[token]
    return tokenizer.tokenizer.convert_ids_to_tokens(token).replace("▁", " ").replace("Ġ", " ")


@torch.no_grad()
def generate_answer(run: WholeRun, record: dict, image: torch.Tensor, truth: str) -> Answer:
    """Answer the last question of a record greedily, and note the probability of each token."""
    vlm = run.model.vlm.eval()
    batch = make_batch(run, record, image, "left")
    V_s = vlm.student(batch["images"])                                               # (1, n, d)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    new = vlm.generate(V_s, ids, mask, run.tokenizer.eos, run.c.max_new_tokens)      # (1, new)
    text = torch.cat([ids, new], dim=1)                                              # (1, T + new)
    logits = vlm(V_s, text, F.pad(mask, (0, new.shape[1]), value=1))                 # (1, ., V)
    tokens = []
    for i, token in enumerate(new[0].tolist()):
        p = logits[0, ids.shape[1] + i - 1].float().softmax(dim=-1)                  # (V,)
        best = p.topk(4)
        others = []
        for probability, other in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            if other != token:
                others.append((token_text(run.tokenizer, other), probability))
        tokens.append((token_text(run.tokenizer, token), p[token].item(), others[:3]))
    question = record["conversations"][-1]["value"].replace("<image>", "").strip()
    return Answer(question, truth, tokens)
