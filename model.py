"""The student, the projector, the VLM that joins them with an LLM, and MoVE-KD: all of the method.

    images -> Student -> V^s (B_img, n, d) -> Projector -> in the places of <image> -> LLM -> logits
                           |
                           +-> compared with the teachers: MoVEKD.forward

Letters: B samples, B_img of them with an image, T text tokens (an image's n among them), n tokens
and d width of the student, m teachers with n_i tokens and d_i width, E experts, L layers of the
student, D width of the LLM, V vocabulary.
"""

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

    V^s is hidden layer -2, [CLS] dropped. With the up matrices 0 the student is CLIP bit for bit,
    so the VLM at step 0 is exactly LLaVA-1.5.
    """

    def add_experts(self, **options) -> "Student":
        """Put MoLE around every FFN; options as `mole.add_mole` takes them."""
        add_mole(self.net, **options)
        return self

    @property
    def blocks(self) -> nn.ModuleList:
        return self.net.blocks

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net.forward_features(self.view(images))[:, 1:]                       # (B, n, d)


class Ensemble(nn.Module):
    """The multi-encoder VLM's eyes, which distillation wants to replace: every encoder runs.

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
    """LLaVA-1.5's two-layer MLP from the student's tokens to words.  (B, n, d) -> (B, n, D)"""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__(nn.Linear(dim_in, dim_out), nn.GELU(), nn.Linear(dim_out, dim_out))


class VLM(nn.Module):
    """Student, projector and LLM: images and text in, next-token logits out.

    The LLM is any module with `dim`, `blocks`, `embed(ids)`, `forward(inputs_embeds,
    attention_mask, cache, logits_at)` and `new_cache()`: tiny/llm.py or real/pretrained_llm.py.
    """

    def __init__(self, student: Student | Ensemble, llm: nn.Module, image_token: int):
        super().__init__()
        self.student = student
        self.llm = llm
        self.image_token = image_token
        self.projector = Projector(student.dim, llm.dim)

    @property
    def blocks(self) -> list[nn.Module]:
        """The equal blocks of student and LLM, which are sharded and recomputed one by one."""
        return [*self.student.blocks, *self.llm.blocks]

    def splice(self, input_ids: torch.Tensor, visual: torch.Tensor | None) -> torch.Tensor:
        """Word embeddings, the projected visual tokens in the places of the image token.

        input_ids (B, T), visual (B_img, n, d) of the batch's images in order -> (B, T, D)
        A text-only sample simply has no such place. Raises InputError if the numbers differ.
        """
        places = input_ids == self.image_token                                              # (B, T)
        # the image token need not be a word of the LLM
        x = self.llm.embed(input_ids.masked_fill(places, 0))                             # (B, T, D)
        rows, columns = places.nonzero(as_tuple=True)                         # 2 x (B_img * n,)
        given = 0 if visual is None else visual.shape[0] * visual.shape[1]
        if given != len(rows):
            raise InputError(f"{len(rows)} image tokens in the text, but {given} visual tokens: "
                            "each <image> needs one image, and each image one <image>")
        if visual is None:
            return x                                                                     # (B, T, D)
        projected = self.projector(visual).to(x.dtype)                               # (B_img, n, D)
        return x.index_put((rows, columns), projected.flatten(0, 1))                     # (B, T, D)

    def forward(self, visual: torch.Tensor | None, input_ids: torch.Tensor,
                attention_mask: torch.Tensor | None,
                logits_at: torch.Tensor | None = None) -> torch.Tensor:
        """visual (B_img, n, d), input_ids and attention_mask (B, T) -> logits (B, T, V)

        Without a mask every token sees all tokens before it: right where padding stands last. With
        logits_at (K,) the logits are those of these positions alone, (B, K, V).
        """
        x = self.splice(input_ids, visual)                                               # (B, T, D)
        return self.llm(x, attention_mask, logits_at=logits_at)                          # (B, K, V)

    @torch.no_grad()
    def generate(self, visual: torch.Tensor | None, input_ids: torch.Tensor,
                 attention_mask: torch.Tensor, eos: int, max_new_tokens: int) -> torch.Tensor:
        """Greedy answers to left-padded prompts (B, T): new ids (B, <= max_new_tokens).

        A sample that has ended goes on with eos. The cache keeps each layer's keys and values, so
        that a new token costs one token's work.
        """
        cache = self.llm.new_cache()
        x = self.splice(input_ids, visual)                                               # (B, T, D)
        answer = []
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)         # (B,)
        for _ in range(max_new_tokens):
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
    """What each token should predict, its follower's label; nothing follows the last: (B, T)"""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)                                       # (B, T)


def text_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """L_text, the mean next-token cross-entropy over the answer tokens: (B, K, V), (B, K) -> ()

    All other targets are IGNORE.
    """
    predicted = logits.flatten(0, 1).float()                                            # (B * K, V)
    return F.cross_entropy(predicted, targets.flatten(), ignore_index=IGNORE)                 # ()


# ------------------------------------------------------------------------------------------------
# The whole method


class MoVEKD(nn.Module):
    """VLM and encoder adapters: all that is trained, and the whole method in one forward.

    distil             False leaves L_kd out: no teacher runs
    student            what of it learns: "trained" all of it (its backbone in stage 2), "experts"
                       MoLE only, else nothing (the baselines)
    clip_share         CLIP's fixed share of the teacher weights
    the others         the switches of kd_loss.py, teachers.py and mole.py
    """

    def __init__(self, vlm: VLM, adapters: nn.ModuleDict, target_norms: nn.ModuleDict, *,
                 distil: bool, student: str, clip_share: float, token_weight: TokenWeight,
                 teacher_weight: TeacherWeight, detach: bool, collapse: bool,
                 direction: AdapterDirection, balance_form: BalanceForm):
        super().__init__()
        self.vlm = vlm
        self.adapters = adapters
        self.target_norms = target_norms
        self.distil = distil
        self.student = student
        self.clip_share = clip_share
        self.token_weight = token_weight
        self.teacher_weight = teacher_weight
        self.detach = detach
        self.collapse = collapse
        self.direction = direction
        self.balance_form = balance_form

    def forward(self, batch: dict, teachers: Teachers) -> dict[str, torch.Tensor]:
        """One batch of `data.collate` through the whole method.

        Returns L_text, L_kd and L_balance, means over the batch's answer tokens, images and images
        (0 without an image), then for the log: "experts" (L, E) the experts' shares of the tokens,
        "kd_NAME" each teacher's own loss, "w_NAME" its mean weight. Weighing is the loop's part.
        """
        images, outputs = batch["images"], {}
        # the teachers first: what they need while they run is gone before the student keeps its own
        if self.distil and images is not None:
            outputs = teachers(images, batch["image_names"])                        # m x (B_img, .)
        V_s = None if images is None else self.vlm.student(images)                   # (B_img, n, d)

        # L_text: no mask, for padding stands on the right, and logits only where a sample answers.
        # A stand-in picture (plumbing/machine.py) runs, but stands in no text
        shown = V_s[:0] if batch.get("stand_in") else V_s                            # (B_img, n, d)
        answers = next_tokens(batch["labels"])                                              # (B, T)
        places = (answers != IGNORE).any(dim=0).nonzero().flatten()                           # (K,)
        logits = self.vlm(shown, batch["input_ids"], None, places)                       # (B, K, V)
        L_text = text_loss(logits, answers[:, places])                                          # ()
        terms = {"L_text": L_text, "L_kd": L_text.new_zeros(()), "L_balance": L_text.new_zeros(())}
        if images is None:
            return terms

        # L_balance: is every expert in use? MoLE keeps p of the forward that has just run
        probs = router_probs(self.vlm.student)                              # L x (B_img, 1 + n, E)
        if probs:
            terms["L_balance"] = balance_loss(probs, self.balance_form)                         # ()
            terms["experts"] = torch.stack([expert_fractions(p) for p in probs])            # (L, E)

        # L_kd: teachers' tokens, brought into one space with V^s, compared token by token
        if self.distil:
            student, targets, w_tea = self.match_tokens(V_s, outputs)       # m x (B_img, n, d) each
            w_tok = token_weights(outputs["clip"].cls_scores, self.token_weight)        # (B_img, n)
            terms["L_kd"], per_teacher = kd_loss(student, targets, w_tok, w_tea)                # ()
            for name, loss in per_teacher.items():
                terms[f"kd_{name}"] = loss                                                      # ()
            for name, weight in zip(targets, w_tea.detach().mean(dim=0)):
                terms[f"w_{name}"] = weight                                                     # ()
        return terms

    def match_tokens(self, V_s: torch.Tensor, outputs: dict) -> tuple[dict, dict, torch.Tensor]:
        """What is compared with what: the student's side, the teachers' side, and W^tea (B, m).

        Both sides are m x (B, n, d) in the paper's direction, m x (B, n_i, d_i) in AM-RADIO's.
        """
        if self.direction == "teacher_to_student":
            targets = adapt(outputs, self.adapters)                                  # m x (B, n, d)
            student = dict.fromkeys(targets, V_s)                                    # m x (B, n, d)
            form = self.teacher_weight
        else:
            student, targets = adapt_student(V_s, outputs, self.adapters,
                                             self.target_norms)                  # m x (B, n_i, d_i)
            form = "uniform"  # V^cls has no product with the tokens of another space
        w_tea = teacher_weights(outputs["clip"].cls, targets, self.clip_share, form, self.detach,
                                self.collapse)                                              # (B, m)
        return student, targets, w_tea

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Every parameter, by the part of the method that it belongs to."""
        student = list(self.vlm.student.parameters())
        experts = set()
        for layer in mole_layers(self.vlm.student):
            for module in layer.new_modules():
                experts.update(module.parameters())
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
        """Freeze and unfreeze for a stage.

        Stage 1 trains the experts, the adapters and the projector, stage 2 everything here.
        """
        frozen = {"student backbone", "LLM"} if stage == 1 else set()
        if self.student != "trained":
            frozen.add("student backbone")
        if self.student not in ("trained", "experts"):
            frozen.add("student MoLE")
        for name, parameters in self.parameter_groups().items():
            trained = name not in frozen
            for p in parameters:
                p.requires_grad_(trained)
