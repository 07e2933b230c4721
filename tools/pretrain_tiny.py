"""Stage 0 of the tiny world: makes the "pretrained" models that the real method downloads, each by the kind of training that gives
the real one its own skill.

    python -m tools.pretrain_tiny           # train what is missing under runs/stage0 and print what each model knows

    CLIP      contrastively with captions: shape, colour, background; [CLS] learns where to look
    EVA       densely: at every token, is the object here, and where are its centre, its size, its turn?
    ConvNeXt  on fine texture at a higher resolution: which pattern?
    LLM       on text alone: the next word of the data's captions and dialogues

`train.py --tiny` calls stage0() and finds the files from then on; each file's name carries a hash of all that made it.
"""

import functools
import hashlib
import inspect
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

import data
from data import ATTRIBUTES, WordTokenizer
from model import TinyLLM, flop_counter
from teachers import VisionEncoder, is_real

FOLDER = Path("runs/stage0")
SEED = 0  # the pretrained models are downloads in the real method: the same for every seed of a run
IMAGES = 6_000

# steps, batch, peak learning rate
RECIPES = {"clip": (450, 64, 1e-3), "eva": (350, 32, 2e-3), "convnext": (500, 32, 2e-3), "llm": (250, 32, 3e-3)}


def fit(name: str, modules: nn.Module, loss_of, scale: float) -> float:
    """AdamW with one cycle of learning rate on loss_of(generator, batch size); returns the FLOPs spent."""
    steps, batch, lr = RECIPES[name]
    steps = max(2, round(steps * scale))
    optimizer = torch.optim.AdamW(modules.parameters(), lr=lr, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    generator, flops = torch.Generator().manual_seed(SEED), 0.0
    modules.train()
    for step in (bar := tqdm(range(steps), desc=f"stage 0: {name}", mininterval=2)):
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


def pictures(scale: float, seed: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Scenes (N, 7), their images (N, 3, 96, 96), their geometry."""
    scenes = data.sample_scenes("train", max(64, round(IMAGES * scale)), seed)
    return scenes, data.render(scenes, seed), data.scene_geometry(scenes, seed)


def pretrain_clip(spec: str, scale: float) -> tuple[nn.Module, float]:
    """InfoNCE between [CLS] and a caption encoder that is thrown away after. In so small a world several images of a batch share
    a caption, so the target of an image is every equal caption, not its own alone."""
    scenes, images, _ = pictures(scale, seed=10)
    g = torch.Generator().manual_seed(SEED)
    captions = [data.caption(scene, g) for scene in scenes.tolist()]
    tokenizer = WordTokenizer.from_records([{"conversations": [{"value": c}]} for c in captions])
    tokens = [tokenizer.encode(c) for c in captions]
    ids = nn.utils.rnn.pad_sequence([torch.tensor(t) for t in tokens], batch_first=True, padding_value=tokenizer.pad)   # (N, T)
    clip = VisionEncoder(spec, num_classes=64)
    for module in clip.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()  # timm's std of 0.02 is meant for width 1024; at 96 shapes are then learned late
    nn.init.normal_(clip.net.pos_embed, std=0.3)  # likewise: at 0.02 a token hardly says where it is
    text = nn.ModuleDict({"embed": nn.Embedding(len(tokenizer.vocabulary), 64),
                          "layer": nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True), "head": nn.Linear(64, 64)})
    temperature = nn.ParameterDict({"log": torch.tensor(2.5)})

    def loss_of(generator, batch):
        rows = torch.randint(len(images), (batch,), generator=generator)
        image = F.normalize(clip.net(clip.view(images[rows])), dim=-1)                  # (B, 64)
        padding = ids[rows] == tokenizer.pad                                            # (B, T)
        words = text["layer"](text["embed"](ids[rows]), src_key_padding_mask=padding)   # (B, T, 64)
        words = words.masked_fill(padding[:, :, None], 0).sum(dim=1)                    # (B, 64)
        logits = image @ F.normalize(text["head"](words), dim=-1).T * temperature["log"].exp()      # (B, B)
        same = (ids[rows][:, None] == ids[rows]).all(dim=-1).float()                    # (B, B)
        target = same / same.sum(dim=1, keepdim=True)                                   # (B, B)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    flops = fit("clip", nn.ModuleList([clip, text, temperature]), loss_of, scale)
    clip.net.reset_classifier(0)  # the projection into the shared space goes with the caption encoder
    return clip.net, flops


def cells(encoder: VisionEncoder, geometry: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """From the centre of each token's cell to the object's centre: dx, dy (N, n_i), in half images."""
    side = round(encoder.num_tokens ** 0.5)
    line = (torch.arange(side) + 0.5) / side * 2 - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    return geometry["x"][:, None] - x.flatten(), geometry["y"][:, None] - y.flatten()


def pretrain_eva(spec: str, scale: float) -> tuple[nn.Module, float]:
    """A dense head at every token, as a detector's: is the object here, and where are its centre, its size, its turn?"""
    _, images, geometry = pictures(scale, seed=11)
    eva = VisionEncoder(spec)
    head = nn.Sequential(nn.LayerNorm(eva.dim), nn.Linear(eva.dim, 5))
    here = (torch.hypot(*cells(eva, geometry)) < geometry["radius"][:, None]).float()   # (N, n)
    box = torch.stack([geometry["x"], geometry["y"], geometry["radius"].log(), geometry["angle"]], dim=-1)      # (N, 4)
    box = (box - box.mean(dim=0)) / box.std(dim=0)

    def loss_of(generator, batch):
        rows = torch.randint(len(images), (batch,), generator=generator)
        out = head(eva(images[rows]).tokens)                                            # (B, n, 5)
        error = (out[..., 1:] - box[rows, None]).square().mean()
        return error + F.binary_cross_entropy_with_logits(out[..., 0], here[rows])

    flops = fit("eva", nn.ModuleList([eva, head]), loss_of, scale)
    return eva.net, flops


def pretrain_convnext(spec: str, scale: float) -> tuple[nn.Module, float]:
    """Names the pattern at every token that the object covers, at twice the student's resolution."""
    scenes, images, geometry = pictures(scale, seed=12)
    pattern = scenes[:, list(ATTRIBUTES).index("pattern")]
    convnext = VisionEncoder(spec)
    head = nn.Sequential(nn.LayerNorm(convnext.dim), nn.Linear(convnext.dim, len(ATTRIBUTES["pattern"])))
    distance = torch.hypot(*cells(convnext, geometry))                                  # (N, n)
    here = (distance < 0.8 * geometry["radius"][:, None]) | (distance == distance.amin(dim=1, keepdim=True))      # (N, n)

    def loss_of(generator, batch):
        rows = torch.randint(len(images), (batch,), generator=generator)
        logits = head(convnext(images[rows]).tokens)                                    # (B, n, 4)
        return F.cross_entropy(logits[here[rows]], pattern[rows, None].expand_as(here[rows])[here[rows]])

    flops = fit("convnext", nn.ModuleList([convnext, head]), loss_of, scale)
    return convnext.net, flops


def pretrain_llm(shape: tuple, scale: float, texts: list[list[int]], pad: int) -> tuple[nn.Module, float]:
    """Plain language modelling: the loss is on every token."""
    llm = TinyLLM(*shape)

    def loss_of(generator, batch):
        rows = [texts[i] for i in torch.randint(len(texts), (batch,), generator=generator).tolist()]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])        # (B, T)
        logits = llm(llm.embed(ids), (ids != pad).long())                               # (B, T, V)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=pad)

    flops = fit("llm", llm, loss_of, scale)
    return llm, flops


MAKERS = {"clip": pretrain_clip, "eva": pretrain_eva, "convnext": pretrain_convnext, "llm": pretrain_llm}

# ---------------------------------------------------------------------------------------------------------------------


def job(name: str, arguments: tuple, path: Path) -> None:
    """Train one model on one thread and write its weights, with the FLOPs in the file's header; runs in a process of its own."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    net, flops = MAKERS[name](*arguments)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")  # two runs may find it missing at once
    save_file(net.state_dict(), temporary, metadata={"tflops": str(flops / 1e12)})
    temporary.rename(path)


def stage0(c, records: list[dict], tokenizer: WordTokenizer) -> tuple[dict[str, Path], float]:
    """Paths of the toy models' weights, trained now if missing, and the TFLOPs they cost: four, but none for a given LLM or for an encoder whose
    name says which real weights it wants. The LLM learns the language of the conversations at hand (`records`), the vision encoders always see the
    tiny world.

    The models know nothing of each other, so they train side by side, one process and one thread each.
    """
    scenes = data.sample_scenes("train", 4)
    world = [data.render(scenes).sum().item(), data.world_records("train", "caption", 4)]
    arguments = {name: (getattr(c, name), c.stage0_scale) for name in ("clip", "eva", "convnext") if not is_real(getattr(c, name))}
    if not c.llm:
        pure = [r for r in records if "image" not in r] or records  # an answer about an image that is not shown teaches guessing
        texts = [data.conversation_ids(r, "v1", tokenizer, n_image=0)[0] for r in pure]
        shape = (len(tokenizer.vocabulary), c.lm_dim, c.lm_depth, c.lm_heads, c.lm_hidden)
        arguments["llm"] = (shape, c.stage0_scale, texts, tokenizer.pad)
    paths = {}
    for name, args in arguments.items():
        source = [inspect.getsource(function) for function in (MAKERS[name], fit, pictures, cells)]
        made_of = json.dumps([source, args, RECIPES[name], SEED, IMAGES, None if name == "llm" else world])
        paths[name] = FOLDER / f"{name}-{hashlib.sha256(made_of.encode()).hexdigest()[:12]}.safetensors"
    missing = [name for name, path in paths.items() if not path.exists()]
    if missing:
        FOLDER.mkdir(parents=True, exist_ok=True)
        print(f"stage 0: training {', '.join(missing)} (once; kept under {FOLDER})", file=sys.stderr)
        with ProcessPoolExecutor(min(len(missing), os.cpu_count()), mp_context=get_context("spawn")) as pool:
            for future in [pool.submit(job, name, arguments[name], paths[name]) for name in missing]:
                future.result()
    return paths, sum(tflops(path) for path in paths.values())


def tflops(path: Path) -> float:
    with safe_open(path, "pt") as file:
        return float(file.metadata()["tflops"])


# ---------------------------------------------------------------------------------------------------------------------
# What does each encoder know?


PROBE = {"train": 2000, "validation": 500}  # images to fit on, images to test on


@functools.cache
def probe_images(split: str, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    scenes = data.sample_scenes(split, n, seed=20)
    return data.render(scenes, seed=20), scenes


@torch.no_grad()
def pooled(encoder: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Mean and maximum of an encoder's tokens over the image: (N, 3, R, R) -> (N, 2d)"""
    tokens = [encoder.eval()(part) for part in images.split(250)]
    tokens = torch.cat([t if torch.is_tensor(t) else t.tokens for t in tokens])         # (N, n, d)
    return torch.cat([tokens.mean(dim=1), tokens.amax(dim=1)], dim=1).double()          # (N, 2d)


def ridge(x: torch.Tensor, y: torch.Tensor, x_test: torch.Tensor) -> torch.Tensor:
    """Linear prediction of y (N, k) from standardised x (N, f), for x_test (M, f) -> (M, k)"""
    mean, std = x.mean(dim=0), x.std(dim=0) + 1e-6
    x, x_test = (x - mean) / std, (x_test - mean) / std
    gram = x.T @ x + 10.0 * torch.eye(x.shape[1], dtype=x.dtype)
    return x_test @ torch.linalg.solve(gram, x.T @ (y - y.mean(dim=0))) + y.mean(dim=0)


def probe(encoder: nn.Module) -> dict[str, float]:
    """Held-out accuracy (%) of a linear classifier per attribute on an encoder's pooled tokens: what a reader of token contents, without
    a map of their places, can tell. Scenes of the validation split."""
    (images, scenes), (images_test, scenes_test) = (probe_images(split, n) for split, n in PROBE.items())
    x, x_test = pooled(encoder, images), pooled(encoder, images_test)
    accuracy = {}
    for i, (name, values) in enumerate(ATTRIBUTES.items()):
        choice = ridge(x, F.one_hot(scenes[:, i], len(values)).double(), x_test).argmax(dim=1)
        accuracy[name] = 100 * (choice == scenes_test[:, i]).double().mean().item()
    return accuracy


def explained(encoder: nn.Module, teacher: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Share (%) of the variance of a teacher's pooled tokens, given for the probe's training and test images, that is linear in the
    encoder's own: does it hold what the teacher sees?"""
    y, y_test = teacher
    mean, std = y.mean(dim=0), y.std(dim=0) + 1e-6
    y, y_test = (y - mean) / std, (y_test - mean) / std
    x, x_test = (pooled(encoder, probe_images(split, n)[0]) for split, n in PROBE.items())
    error = y_test - ridge(x, y, x_test)
    return 100 * (1 - error.square().mean() / (y_test - y_test.mean(dim=0)).square().mean()).item()


def main(argv: list[str] | None = None) -> None:
    import train  # here, not above: train.py itself imports this file
    data.Parser(description=__doc__).parse_args(argv)
    c = train.TINY
    sets = train.load_sets(c)
    paths, _ = stage0(c, sets["train"][0], WordTokenizer.from_records(sets["pretrain"][0] + sets["train"][0]))
    print(f"linear probe, %   {'  '.join(f'{name:>10}' for name in ATTRIBUTES)}")
    for name, encoder in train.build_teachers(c, paths).encoders.items():
        print(f"{name:17} {'  '.join(f'{value:10.0f}' for value in probe(encoder).values())}")


if __name__ == "__main__":
    data.run(main)
