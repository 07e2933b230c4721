"""The models that learn: the student encoder, the projector, a tiny LLM, and the VLM that joins them.

    images -> Student -> V^s (B, n, d) -> projector -> in the places of <image> -> LLM -> next-token logits

Letters: B samples, T tokens of text with the image's n among them, D width of the LLM, h heads, V vocabulary;
n, d tokens and width of the student.
"""

import inspect
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from data import IGNORE, InputError, import_transformers, llm_error, read_json
from mole import MoleForm, MoleInit, RouterGrad, add_mole
from teachers import ClipEncoder, Teachers


class Student(ClipEncoder):
    """CLIP with a mixture of LoRA experts in every FFN; hidden layer -2, [CLS] dropped.  uint8 (B, 3, R, R) -> V^s (B, n, d)

    With LoRA-B = 0 it is CLIP bit for bit, so the VLM at step 0 is exactly LLaVA-1.5.
    """

    def add_experts(self, num_experts: int, rank: int, alpha: float, dropout: float, router_grad: RouterGrad = "straight_through",
                    form: MoleForm = "ffn", init: MoleInit = "zero") -> "Student":
        add_mole(self.net, num_experts, rank, alpha, dropout, router_grad, form, init)
        return self

    @property
    def blocks(self) -> nn.ModuleList:
        return self.net.blocks

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net.forward_features(self.view(images))[:, 1:]                      # (B, n, d)


class Ensemble(nn.Module):
    """The multi-encoder VLM that distillation wants to replace: every frozen encoder runs, their tokens are brought to one scale and to
    CLIP's grid and joined by channel.  uint8 (B, 3, R, R) -> (B, n, d_1 + ... + d_m)"""

    blocks = ()

    def __init__(self, teachers: Teachers):
        super().__init__()
        self.teachers = teachers
        self.num_tokens = teachers.encoders["clip"].num_tokens
        self.dim = sum(encoder.dim for encoder in teachers.encoders.values())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        side, maps = round(self.num_tokens ** 0.5), []
        for out in self.teachers(images).values():
            tokens = F.layer_norm(out.tokens, out.tokens.shape[-1:])                    # (B, n_i, d_i)
            grid = tokens.transpose(1, 2).unflatten(2, (round(tokens.shape[1] ** 0.5), -1))    # (B, d_i, side_i, side_i)
            maps.append(F.interpolate(grid, (side, side), mode="bilinear", antialias=True))             # (B, d_i, side, side)
        return torch.cat(maps, dim=1).flatten(2).transpose(1, 2)                        # (B, n, d_1 + ... + d_m)


class Projector(nn.Sequential):
    """LLaVA-1.5's two-layer MLP from the student's tokens to word embeddings.  (B, n, d) -> (B, n, D)"""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__(nn.Linear(dim_in, dim_out), nn.GELU(), nn.Linear(dim_out, dim_out))


# ---------------------------------------------------------------------------------------------------------------------
# The tiny LLM: Vicuna (a Llama) in miniature. Parameter names are those of transformers' Llama, so weights can be exchanged.


class Attention(nn.Module):
    """Causal self-attention with rotary position embedding.  (B, T, D) -> (B, T, D)"""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(self, x, rotary, mask, cache: list | None):
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))                 # (B, h, T, D/h)
        q, k = rotate(q, *rotary), rotate(k, *rotary)                                   # (B, h, T, D/h)
        if cache is not None:  # keys and values of the tokens before these; T_all = T_past + T
            if cache:
                k, v = torch.cat([cache[0], k], dim=2), torch.cat([cache[1], v], dim=2)     # (B, h, T_all, D/h)
            cache[:] = [k, v]
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)                     # (B, h, T, D/h)
        return self.o_proj(x.transpose(1, 2).flatten(2))                                # (B, T, D)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding: turns the pair (x_i, x_{i + D/2h}) by position * theta_i.  (B, h, T, D/h) -> the same"""
    a, b = x.chunk(2, dim=-1)                                                           # (B, h, T, D/2h)
    return (x * cos + torch.cat([-b, a], dim=-1) * sin).to(x.dtype)                     # (B, h, T, D/h)


class SwiGLU(nn.Module):
    """FFN(x) = W_down( SiLU(W_gate x) * W_up x ).  (B, T, D) -> (B, T, D)"""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))              # (B, T, D)


class DecoderLayer(nn.Module):
    """x + Attention(norm(x)), then x + SwiGLU(norm(x)).  (B, T, D) -> (B, T, D)"""

    def __init__(self, dim: int, heads: int, hidden: int):
        super().__init__()
        self.input_layernorm, self.self_attn = nn.RMSNorm(dim, eps=1e-6), Attention(dim, heads)
        self.post_attention_layernorm, self.mlp = nn.RMSNorm(dim, eps=1e-6), SwiGLU(dim, hidden)

    def forward(self, x, rotary, mask, cache):
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, cache)            # (B, T, D)
        return x + self.mlp(self.post_attention_layernorm(x))                           # (B, T, D)


class TinyLLM(nn.Module):
    """Two doors, as the real LLM below has: `embed(ids)` and `forward(inputs_embeds, attention_mask)`."""

    def __init__(self, vocab_size: int, dim: int, depth: int, heads: int, hidden: int):
        super().__init__()
        self.dim = dim
        self.embed_tokens = nn.Embedding(vocab_size, dim)
        self.layers = nn.ModuleList(DecoderLayer(dim, heads, hidden) for _ in range(depth))
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.lm_head = nn.Linear(dim, vocab_size, bias=False)
        nn.init.normal_(self.embed_tokens.weight, std=0.3)  # Llama's 0.02 is for width 4096; here look-up in context then comes late

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(ids)                                                   # (B, T, D)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.layers

    def new_cache(self) -> list:
        return [[] for _ in self.layers]

    def forward(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor, cache: list | None = None) -> torch.Tensor:
        """(B, T, D), (B, T_all) -> logits (B, T, V). `cache` holds one list a layer: empty before the prompt, keys and values
        after; attention_mask then covers the past too. Padding may stand on either side: positions count real tokens."""
        T, T_all = inputs_embeds.shape[1], attention_mask.shape[1]
        positions = token_positions(attention_mask)[:, -T:]                             # (B, T)
        rotary = self.rotary(positions)                                                 # 2 x (B, 1, T, D/h)
        causal = torch.ones(T, T_all, dtype=torch.bool, device=positions.device).tril(T_all - T)      # (T, T_all)
        mask = causal & attention_mask[:, None, None, :].bool()                         # (B, 1, T, T_all)
        mask = mask | torch.eye(T_all, dtype=torch.bool, device=mask.device)[-T:]       # padding sees itself: no empty softmax
        x = inputs_embeds
        for i, layer in enumerate(self.layers):
            x = layer(x, rotary, mask, cache[i] if cache is not None else None)         # (B, T, D)
        return self.lm_head(self.norm(x))                                               # (B, T, V)

    def rotary(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of position * theta_i, theta_i = 10000^(-2i / (D/h)): (B, T) -> 2 x (B, 1, T, D/h)"""
        size = self.dim // self.layers[0].self_attn.heads
        theta = 10000.0 ** (-torch.arange(0, size, 2, device=positions.device) / size)  # (D/2h,)
        angle = (positions[:, None, :, None] * theta).repeat(1, 1, 1, 2)                # (B, 1, T, D/h)
        return angle.cos(), angle.sin()


def token_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions that count real tokens, whichever side the padding is on: (B, T) -> (B, T)"""
    return (attention_mask.cumsum(dim=1) - 1).clamp(min=0)                              # (B, T)


class PretrainedLLM(nn.Module):
    """Any causal LM of transformers (Vicuna, SmolLM2, ...) behind the same two doors. `name`: a folder, or a name on the hub.
    With `config`, a transformers config, the model is built from it without weights, else it has its checkpoint's precision."""

    def __init__(self, name: str, config=None):
        super().__init__()
        causal = import_transformers().AutoModelForCausalLM
        try:
            self.model = causal.from_config(config) if config else causal.from_pretrained(name, dtype="auto")
        except (OSError, ValueError) as e:
            raise llm_error(name, f"cannot be loaded ({type(e).__name__})") from None
        self.dim = self.model.config.hidden_size
        # transformers 5.24 renamed it
        self.cache_name = "cache" if "cache" in inspect.signature(self.model.forward).parameters else "past_key_values"

    @classmethod
    def from_config_of(cls, folder: Path) -> "PretrainedLLM":
        """The model that folder/config.json describes, without weights."""
        return cls(str(folder), import_transformers().AutoConfig.from_pretrained(folder))

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.get_decoder().layers

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model.get_input_embeddings()(ids)                                   # (B, T, D)

    def new_cache(self):
        return import_transformers().DynamicCache()

    def forward(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor, cache=None) -> torch.Tensor:
        positions = token_positions(attention_mask)[:, -inputs_embeds.shape[1]:]        # (B, T)
        return self.model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=positions, use_cache=cache is not None,
                          **{self.cache_name: cache}).logits                            # (B, T, V)


# ---------------------------------------------------------------------------------------------------------------------


class VLM(nn.Module):
    """Student, projector and LLM: images and text in, next-token logits out."""

    def __init__(self, student: Student | Ensemble, llm: nn.Module, image_token: int):
        super().__init__()
        self.student, self.llm, self.image_token = student, llm, image_token
        self.projector = Projector(student.dim, llm.dim)

    @property
    def blocks(self) -> list[nn.Module]:
        """The equal parts of student and LLM, which are sharded and recomputed one by one."""
        return [*self.student.blocks, *self.llm.blocks]

    def splice(self, input_ids: torch.Tensor, visual: torch.Tensor | None) -> torch.Tensor:
        """Word embeddings with the projected student tokens in the places of the image token.  (B, T), (B_img, n, d) -> (B, T, D)

        `visual` holds the images of the batch in order; a text-only sample simply has no such place."""
        places = input_ids == self.image_token                                          # (B, T)
        x = self.llm.embed(input_ids.masked_fill(places, 0))  # the image token need not be a word     (B, T, D)
        given = 0 if visual is None else visual.shape[0] * visual.shape[1]
        if given != places.sum():
            raise InputError(f"{int(places.sum())} image tokens in the text, but {given} visual tokens: "
                             "each <image> needs one image, and each image one <image>")
        if visual is None:
            return x                                                                    # (B, T, D)
        return x.masked_scatter(places[:, :, None], self.projector(visual).to(x.dtype)) # (B, T, D)

    def forward(self, visual: torch.Tensor | None, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.llm(self.splice(input_ids, visual), attention_mask)                 # (B, T, V)

    @torch.no_grad()
    def generate(self, visual: torch.Tensor | None, input_ids: torch.Tensor, attention_mask: torch.Tensor, eos: int,
                 max_new_tokens: int) -> torch.Tensor:
        """Greedy answers to left-padded prompts: (B, T) -> new ids (B, <= max_new_tokens), eos after a sample's end. The cache
        keeps each layer's keys and values, so that a new token costs one token's work."""
        cache = self.llm.new_cache()
        x, answer = self.splice(input_ids, visual), []                                  # (B, T, D)
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for _ in range(max_new_tokens):
            token = self.llm(x, attention_mask, cache)[:, -1].argmax(dim=-1)            # (B,)
            token = token.masked_fill(done, eos)                                        # (B,)
            answer.append(token)
            done = done | (token == eos)                                                # (B,)
            if done.all():
                break
            x = self.llm.embed(token[:, None])                                          # (B, 1, D)
            attention_mask = F.pad(attention_mask, (0, 1), value=1)                     # (B, T_all)
        return torch.stack(answer, dim=1)                                               # (B, <= max_new_tokens)


# ---------------------------------------------------------------------------------------------------------------------
# The authors' released weights: a LLaVA checkpoint whose vision tower carries the experts


TOWER = "model.vision_tower.vision_tower.vision_model."  # their prefix of the student


def released_files(folder: Path) -> list[Path]:
    if not (files := sorted(folder.glob("*.safetensors"))):
        raise InputError(f"{folder}: holds no *.safetensors; convert its pytorch_model*.bin with safetensors first")
    return files


def released_config(folder: Path) -> tuple[dict, "transformers.LlamaConfig"] | None:
    """What a folder with the authors' checkpoint says of itself: (fields of our Config, config of its LLM). None if it is not one."""
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or "moe" not in config:
        return None
    LlamaConfig = import_transformers().LlamaConfig
    moe = config["moe"]
    if moe.get("dense"):
        raise InputError(f"{folder / 'config.json'}: moe.dense is true: every token goes through all experts; only argmax routing is built here")
    shapes = {}
    for path in released_files(folder):
        with safe_open(path, "pt") as file:
            shapes |= {name.removeprefix(TOWER): file.get_slice(name).get_shape() for name in file.keys() if name.startswith(TOWER)}
    (tokens, D), patch = shapes["embeddings.position_embedding.weight"], shapes["embeddings.patch_embedding.weight"][-1]
    depth = 1 + max(int(name.split(".")[2]) for name in shapes if name.startswith("encoder.layers."))
    clip = (f"vit_large_patch14_clip_quickgelu_336 img_size={round((tokens - 1) ** 0.5) * patch} patch_size={patch} embed_dim={D} depth={depth} "
            f"num_heads={D // 64}")  # CLIP's heads are 64 wide
    llm = LlamaConfig(**{k: v for k, v in config.items() if k in LlamaConfig().to_dict() and k not in ("model_type", "architectures")})
    return {"clip": clip, "mole_rank": moe["moe_encoder_lora_rank"], "mole_alpha": float(moe["lora_alpha"]), "mole_experts": moe["num_experts"]}, llm


def load_released(vlm: VLM, folder: Path) -> None:
    """Fill student (mole_form "fc1_fc2"), projector and LLM from the authors' checkpoint. Strict both ways: every tensor of ours is filled,
    every tensor of theirs is used, or belongs to what is never run (the last block, the final norm, the position ids)."""
    theirs = {name: tensor for file in released_files(folder) for name, tensor in load_file(file).items()}
    ours, blocks = {}, len(vlm.student.net.blocks)
    take = theirs.pop
    try:
        ours["student.net.cls_token"] = take(TOWER + "embeddings.class_embedding")[None, None]
        ours["student.net.pos_embed"] = take(TOWER + "embeddings.position_embedding.weight")[None]
        ours["student.net.patch_embed.proj.weight"] = take(TOWER + "embeddings.patch_embedding.weight")
        for kind in ("weight", "bias"):
            ours[f"student.net.norm_pre.{kind}"] = take(f"{TOWER}pre_layrnorm.{kind}")
            for i in (0, 2):
                ours[f"projector.{i}.{kind}"] = take(f"model.mm_projector.{i}.{kind}")
        for i in range(blocks):
            ours |= _released_block(theirs, f"{TOWER}encoder.layers.{i}.", f"student.net.blocks.{i}.", vlm.student.net.blocks[i].mlp)
    except KeyError as missing:
        raise InputError(f"{folder}: has no tensor {missing.args[0]!r}; the authors' checkpoints have") from None
    unused = (f"{TOWER}encoder.layers.{blocks}.", TOWER + "post_layernorm.", TOWER + "embeddings.position_ids")
    theirs = {name: tensor for name, tensor in theirs.items() if not name.startswith(unused)}
    ours |= {f"llm.model.{name}": tensor for name, tensor in theirs.items()}
    wrong = vlm.state_dict()
    for name, tensor in ours.items():
        if name not in wrong:
            raise InputError(f"{folder}: the tensor {name.removeprefix('llm.model.')!r} has no place in the model")
        if wrong.pop(name).shape != tensor.shape:
            raise InputError(f"{folder}: {name} has shape {tuple(tensor.shape)}, not {tuple(vlm.state_dict()[name].shape)}")
    if wrong:
        raise InputError(f"{folder}: has nothing for {next(iter(wrong))}")
    vlm.load_state_dict(ours)


def _released_block(theirs: dict, a: str, b: str, mole: nn.Module) -> dict[str, torch.Tensor]:
    """One block's tensors, from prefix a to prefix b: q, k, v joined, the experts' LoRAs stacked. Raises KeyError for a missing one."""
    ours, take = {}, theirs.pop
    for kind in ("weight", "bias"):
        ours[f"{b}attn.qkv.{kind}"] = torch.cat([take(f"{a}self_attn.{p}_proj.{kind}") for p in "qkv"])
        for there, here in (("self_attn.out_proj", "attn.proj"), ("layer_norm1", "norm1"), ("layer_norm2", "norm2"), ("mlp.router", "mlp.router"),
                            ("mlp.original_module.fc1", "mlp.ffn.fc1"), ("mlp.original_module.fc2", "mlp.ffn.fc2")):
            ours[f"{b}{here}.{kind}"] = take(f"{a}{there}.{kind}")
    width = mole.ffn.fc1.in_features
    for there in ("moe_down", "moe_up"):
        A, a_bias, B, b_bias = ([take(f"{a}mlp.{there}.{e}.lora_{m}.{kind}") for e in range(mole.num_experts)]
                                for m, kind in (("A", "weight"), ("A", "bias"), ("B", "weight"), ("B", "bias")))
        here = f"{b}mlp.lora_fc1." if A[0].shape[1] == width else f"{b}mlp.lora_fc2."  # the shapes tell which Linear it belongs to
        ours |= {here + "A.weight": torch.cat(A), here + "A.bias": torch.cat(a_bias), here + "B.weight": torch.cat(B, dim=1),
                 here + "bias": torch.stack(b_bias)}
    return ours


def text_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """L_text: the mean next-token cross-entropy over the answer tokens only (labels IGNORE elsewhere).  (B, T, V), (B, T) -> ()"""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE)


def flop_counter() -> FlopCounterMode:
    """torch's counter, taught the fused attention of the CPU, which it would count as 0."""
    cpu_attention = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
            lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v),
    }
    return FlopCounterMode(display=False, custom_mapping=cpu_attention)
