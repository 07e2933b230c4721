"""The student, the projector, the VLM that joins them with an LLM, and MoVE-KD: all of the method.

    images -> Student -> V^s (B_img, n, d) -> Projector -> in the places of <image> -> LLM -> logits
                           |
                           +-> compared with the teachers: MoVEKD.forward

Letters: B samples, B_img of them with an image, T text tokens (an image's n among them), n tokens
and d width of the student, m teachers with n_i tokens and d_i width, E experts, L layers of the
student, D width of the LLM, V vocabulary.
"""

import dataclasses
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from data import IGNORE, InputError
from kd_loss import TeacherWeight, TokenWeight, kd_loss, teacher_weights, token_weights
from mole import BalanceForm, add_mole, balance_loss, expert_fractions, mole_layers, router_probs
from teachers import AdapterDirection, ClipEncoder, Teachers, adapt, adapt_student

# ------------------------------------------------------------------------------------------------
# Vision


class Student(ClipEncoder):
    """CLIP with a mixture of LoRA experts in every FFN.  uint8 (B, 3, R, R) -> V^s (B, n, d)

    V^s is hidden layer -2, [CLS] dropped. With the up matrices 0, as at step 0, the student is
    CLIP bit for bit.
    """

    def add_experts(self, **options) -> "Student":
        """Put MoLE around every FFN; the options are those of `mole.add_mole`."""
        add_mole(self.net, **options)
        self.mole_options = options     # by which others build it again
        return self

    @property
    def blocks(self) -> nn.ModuleList:
        return self.net.blocks

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net.forward_features(self.view(images))[:, 1:]                       # (B, n, d)


class Ensemble(nn.Module):
    """All encoders side by side: the expensive vision side that distillation wants to replace.

    Their tokens are brought to one scale and to CLIP's grid, and joined by channel.
    uint8 (B, 3, R, R) -> (B, n, d_1 + ... + d_m)
    """

    def __init__(self, teachers: Teachers):
        super().__init__()
        self.teachers = teachers
        self.blocks = ()
        self.num_tokens = teachers.encoders["clip"].num_tokens
        self.dim = sum(encoder.dim for encoder in teachers.encoders.values())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        side = round(self.num_tokens ** 0.5)
        maps = []
        for output in self.teachers(images, []).values():
            tokens = F.layer_norm(output.tokens, output.tokens.shape[-1:])           # (B, n_i, d_i)
            side_i = round(tokens.shape[1] ** 0.5)
            grid = tokens.transpose(1, 2).unflatten(2, (side_i, side_i))  # (B, d_i, side_i, side_i)
            maps.append(F.interpolate(grid, (side, side), mode="bilinear", antialias=True))
        joined = torch.cat(maps, dim=1)                           # (B, d_1 + ... + d_m, side, side)
        return joined.flatten(2).transpose(1, 2)                        # (B, n, d_1 + ... + d_m)


# ------------------------------------------------------------------------------------------------
# Vision and language


class Projector(nn.Sequential):
    """LLaVA-1.5's two-layer MLP from visual tokens to the LLM's width.  (B, n, d) -> (B, n, D)"""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__(nn.Linear(dim_in, dim_out), nn.GELU(), nn.Linear(dim_out, dim_out))


class VLM(nn.Module):
    """Student, projector and LLM: images and text in, next-token logits out.

    The LLM is tiny/llm.py's, or any module with the same methods (real/pretrained_llm.py).
    """

    def __init__(self, student: Student | Ensemble, llm: nn.Module, image_token: int):
        super().__init__()
        self.student = student
        self.llm = llm
        self.image_token = image_token
        self.projector = Projector(student.dim, llm.dim)

    @property
    def blocks(self) -> list[nn.Module]:
        """Return the blocks of student and LLM, which may be recomputed one by one in backward."""
        return [*self.student.blocks, *self.llm.blocks]

    def splice(self, input_ids: torch.Tensor, visual: torch.Tensor | None) -> torch.Tensor:
        """Return word embeddings, with the projected visual tokens in place of the image tokens.

        input_ids (B, T), visual (B_img, n, d) of the batch's images in order -> (B, T, D)
        A text-only sample simply has no image token. Raises InputError if the counts differ.
        """
        is_image = input_ids == self.image_token                                            # (B, T)
        # The image token need not be a word of the LLM: word 0 stands in for it for a moment.
        x = self.llm.embed(input_ids.masked_fill(is_image, 0))                           # (B, T, D)
        rows, columns = is_image.nonzero(as_tuple=True)                       # 2 x (B_img * n,)
        visual_tokens = 0 if visual is None else visual.shape[0] * visual.shape[1]
        if visual_tokens != len(rows):
            raise InputError(f"{len(rows)} image tokens in the text, but {visual_tokens} visual "
                             "tokens: each <image> needs one image, and each image one <image>")
        if visual is None:
            return x                                                                     # (B, T, D)
        projected = self.projector(visual).to(x.dtype)                               # (B_img, n, D)
        return x.index_put((rows, columns), projected.flatten(0, 1))                     # (B, T, D)

    def forward(self, visual: torch.Tensor | None, input_ids: torch.Tensor,
                attention_mask: torch.Tensor | None,
                logits_at: torch.Tensor | None = None) -> torch.Tensor:
        """visual (B_img, n, d), input_ids and attention_mask (B, T) -> logits (B, T, V)

        Without a mask every token sees all tokens before it: right if padding is on the right. With
        logits_at (K,) the logits are those of these positions alone, (B, K, V).
        """
        x = self.splice(input_ids, visual)                                               # (B, T, D)
        return self.llm(x, attention_mask, logits_at=logits_at)                          # (B, K, V)

    @torch.no_grad()
    def generate(self, visual: torch.Tensor | None, input_ids: torch.Tensor,
                 attention_mask: torch.Tensor, eos: int, max_new_tokens: int) -> torch.Tensor:
        """Answer left-padded prompts (B, T) by greedy decoding: new ids (B, <= max_new_tokens).

        After its end a sample repeats eos. The cache keeps each layer's keys and values, so that a
        new token costs one token's work.
        """
        cache = self.llm.new_cache()
        x = self.splice(input_ids, visual)                                               # (B, T, D)
        answer = []
        done = torch.zeros_like(input_ids[:, 0], dtype=torch.bool)                            # (B,)
        for _ in range(max_new_tokens):
            # The likeliest next token of each sample, from the last position alone.
            token = self.llm(x, attention_mask, cache)[:, -1].argmax(dim=-1)                  # (B,)
            token = token.masked_fill(done, eos)                                              # (B,)
            answer.append(token)
            done = done | (token == eos)                                                      # (B,)
            if done.all():
                break
            x = self.llm.embed(token[:, None])                                           # (B, 1, D)
            attention_mask = F.pad(attention_mask, (0, 1), value=1)                     # (B, T + 1)
        return torch.stack(answer, dim=1)                                   # (B, <= max_new_tokens)


def next_tokens(labels: torch.Tensor) -> torch.Tensor:
    """Shift the labels left by one: each position predicts the token after it.  (B, T) -> (B, T)"""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)                                       # (B, T)


def text_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return L_text, the mean cross-entropy where target is not IGNORE: (B, K, V), (B, K) -> ()"""
    predicted = logits.flatten(0, 1).float()                                            # (B * K, V)
    return F.cross_entropy(predicted, targets.flatten(), ignore_index=IGNORE)                 # ()


# ------------------------------------------------------------------------------------------------
# The whole method


@dataclasses.dataclass
class MethodOptions:
    """The switches of the method; their values are explained in kd_loss.py, mole.py, teachers.py"""

    distil: bool                    # False leaves L_kd out: no teacher runs
    student_learns: Literal["all", "experts", "nothing"]   # in stage 2; "nothing": baselines
    freeze: tuple[str, ...]         # names of parameter_groups that learn in no stage
    clip_share: float               # CLIP's fixed teacher weight
    token_weight: TokenWeight
    teacher_weight: TeacherWeight
    detach: bool
    collapse: bool
    direction: AdapterDirection
    balance_form: BalanceForm


class MoVEKD(nn.Module):
    """The VLM and the encoder adapters: everything that trains, and the method in one forward"""

    def __init__(self, vlm: VLM, adapters: nn.ModuleDict, target_norms: nn.ModuleDict,
                 options: MethodOptions):
        super().__init__()
        self.vlm = vlm
        self.adapters = adapters
        self.target_norms = target_norms
        self.options = options
        self.stage = 2

    def forward(self, batch: dict, teachers: Teachers) -> dict[str, torch.Tensor]:
        """Run one batch of `data.collate` through the whole method; return its losses.

        L_text is a mean over the answer tokens, L_kd and L_balance over the images (0 if there are
        none); train.py adds them up. The rest is for the log: "experts" (L, E) the fraction of the
        tokens that each expert got, "kd_NAME" each teacher's own loss, "w_NAME" its mean weight.
        """
        # Run the teachers first: their memory is freed before the student keeps its activations.
        images = batch["images"]
        outputs = {}
        if self.options.distil and images is not None:
            outputs = teachers(images, batch["image_names"])                        # m x (B_img, .)
        V_s = None if images is None else self.vlm.student(images)                   # (B_img, n, d)

        zero = torch.zeros((), device=batch["labels"].device)                                   # ()
        terms = {"L_text": zero, "L_kd": zero, "L_balance": zero}

        # L_text: the LLM reads V^s and the words, and predicts the answers. Right padding needs no
        # mask under causal attention. Positions without an answer in any sample get no logits.
        if self.stage > 0:
            answers = next_tokens(batch["labels"])                                          # (B, T)
            logits_at = (answers != IGNORE).any(dim=0).nonzero().flatten()                    # (K,)
            logits = self.vlm(V_s, batch["input_ids"], None, logits_at)                  # (B, K, V)
            L_text = text_loss(logits, answers[:, logits_at])                                   # ()
            terms["L_text"] = L_text
        if images is None:
            return terms

        # L_balance: is every expert in use? MoLE holds the p of the forward that has just run.
        probs = router_probs(self.vlm.student)                              # L x (B_img, 1 + n, E)
        if probs:
            terms["L_balance"] = balance_loss(probs, self.options.balance_form)                 # ()
            terms["experts"] = torch.stack([expert_fractions(p) for p in probs])            # (L, E)

        # L_kd: the student's and the teachers' tokens, in one space, compared token by token.
        if self.options.distil:
            student_tokens, targets, w_tea = self.match_tokens(V_s, outputs)
            cls_scores = outputs["clip"].cls_scores                              # (B_img, h, 1 + n)
            w_tok = token_weights(cls_scores, self.options.token_weight)                # (B_img, n)
            terms["L_kd"], per_teacher = kd_loss(student_tokens, targets, w_tok, w_tea)         # ()
            terms.update({f"kd_{name}": loss for name, loss in per_teacher.items()})            # ()
            for name, weight in zip(targets, w_tea.detach().mean(dim=0), strict=True):
                terms[f"w_{name}"] = weight                                                     # ()
        return terms

    def match_tokens(self, V_s: torch.Tensor, outputs: dict) -> tuple[dict, dict, torch.Tensor]:
        """Bring V^s and the teachers' tokens into common spaces; return both, and W^tea (B, m).

        Both sides are m x (B, n, d) in the paper's direction, m x (B, n_i, d_i) in AM-RADIO's.
        """
        options = self.options
        weight_form = options.teacher_weight
        if options.direction == "teacher_to_student":
            # The adapters bring every teacher to the student's space: V^s is compared with each.
            targets = adapt(outputs, self.adapters)                                  # m x (B, n, d)
            student_tokens = dict.fromkeys(targets, V_s)                             # m x (B, n, d)
        else:
            # The adapters are heads: they bring V^s to each teacher's space. V^cls and a teacher's
            # tokens then differ in width, so they have no dot product: equal weights.
            student_tokens, targets = adapt_student(V_s, outputs, self.adapters, self.target_norms)
            weight_form = "uniform"
        w_tea = teacher_weights(outputs["clip"].cls, targets, options.clip_share, weight_form,
                                detach=options.detach, collapse=options.collapse)           # (B, m)
        return student_tokens, targets, w_tea

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return every parameter, by the part of the method that it belongs to."""
        experts = set()
        for layer in mole_layers(self.vlm.student):
            for module in layer.new_modules():
                experts.update(module.parameters())
        student = list(self.vlm.student.parameters())
        groups = {
            "student backbone": [p for p in student if p not in experts],
            "student MoLE": [p for p in student if p in experts],
            "projector": list(self.vlm.projector.parameters()),
            "LLM": list(self.vlm.llm.parameters()),
        }
        for name, adapter in self.adapters.items():
            groups[f"adapter {name}"] = list(adapter.parameters())
        return groups

    def set_stage(self, stage: int) -> None:
        """Freeze and unfreeze: stage 1 trains experts, adapters and projector, stage 2 all.

        0 is our distillation-only phase, "distil": student and adapters, without the LLM.
        """
        self.stage = stage
        # CLIP and the LLM are pretrained: in stage 1 only the new modules learn.
        frozen = [{"projector", "LLM"}, {"student backbone", "LLM"}, set()][stage]
        frozen.update(self.options.freeze)
        # An ablation trains the experts alone; baselines have no trained student.
        if self.options.student_learns != "all":
            frozen.add("student backbone")
        if self.options.student_learns == "nothing":
            frozen.add("student MoLE")
        for name, parameters in self.parameter_groups().items():
            for p in parameters:
                p.requires_grad_(name not in frozen)
