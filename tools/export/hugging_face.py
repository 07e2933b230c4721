"""A run as transformers' LLaVA; its experts, if it has any, come as code that a user must trust."""

from pathlib import Path

import jinja2
import torch
import transformers
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from data import InputError
from model import VLM, Ensemble, Student
from plumbing.config import RECIPES, Config
from plumbing.files import library_errors, read_json
from tiny.llm import TinyLLM, WordTokenizer
from tools.export.modeling_movekd import MoVEKDConfig, MoVEKDForConditionalGeneration
from tools.export.student import write_source

HERE = Path(__file__).parent
NAMES = {       # parts of a tensor's name: timm's, CLIPVisionModel's
    "cls_token": "embeddings.class_embedding", "pos_embed": "embeddings.position_embedding.weight",
    "patch_embed.proj": "embeddings.patch_embedding", "norm_pre": "pre_layrnorm",
    "blocks.": "encoder.layers.", ".norm": ".layer_norm", ".attn.proj": ".self_attn.out_proj"}


def write_llava(run: Path, vlm: VLM, tokenizer, c: Config, folder: Path) -> None:
    """Write a run's VLM, on the CPU in fp32, as a folder for transformers. Raises InputError."""
    if isinstance(vlm.student, Ensemble):
        raise InputError(f"{run}: is the baseline that sees with all encoders; LLaVA has one")
    words = tokenizer.tokenizer if c.llm else word_tokenizer(tokenizer)
    processor = llava_processor(vlm.student, tokenizer, words)
    with library_errors(lambda e: f"{run}: transformers' LLaVA has no place for it ({e})"):
        model = llava_model(vlm, c, processor.image_token_id)
    model.generation_config.update(eos_token_id=tokenizer.eos, pad_token_id=tokenizer.pad,
                                   max_new_tokens=c.max_new_tokens)
    if all(p.equal(p.bfloat16().float()) for p in model.parameters()):
        model.bfloat16()        # half the bytes, and nothing lost: a run in bf16 has saved it so
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if c.mole_experts:
        write_source(folder / "modeling_movekd.py", "modeling_movekd.py")
    paths = (run / "versions.json", run / "result.json")    # the authors' checkpoint has neither
    facts = {path.stem: read_json(path) for path in paths if path.exists()}
    card = jinja2.Template((HERE / "card.md").read_text(encoding="utf-8"), trim_blocks=True)
    text = card.render(c=c, name=run.resolve().name, fields=RECIPES, library=transformers, **facts)
    (folder / "README.md").write_text(text, encoding="utf-8")


@torch.no_grad()
def llava_model(vlm: VLM, c: Config, image_token: int) -> transformers.PreTrainedModel:
    """Return the VLM as transformers' LLaVA, which shares its tensors. Raises InputError."""
    student = vlm.student
    llm = vlm.llm.model if c.llm else tiny_llama(vlm.llm, c)
    llm.config.name_or_path = ""        # a folder of this machine
    if image_token >= llm.get_input_embeddings().num_embeddings:
        llm.resize_token_embeddings(image_token + 1)    # a mean of all words, never the likeliest
    decoder, head = llm.get_decoder(), llm.get_output_embeddings()
    x = torch.randn(1, 4, vlm.llm.dim)                                      # (1, 4, D)
    logits = decoder(inputs_embeds=x)[0] @ head.weight.T                    # (1, 4, V)
    if not logits.allclose(llm(inputs_embeds=x).logits, atol=1e-3, rtol=1e-3):
        raise ValueError("its logits are more than one matrix times the last hidden state")
    block = student.blocks[0]
    ffn = getattr(block.mlp, "ffn", block.mlp)
    vision = transformers.CLIPVisionConfig(
        hidden_size=student.dim, intermediate_size=ffn.fc1.out_features,
        patch_size=student.net.patch_embed.patch_size[0], num_hidden_layers=len(student.blocks),
        num_attention_heads=block.attn.num_heads, image_size=student.image_size,
        hidden_act={"QuickGELU": "quick_gelu", "GELU": "gelu"}[type(ffn.act).__name__],
        layer_norm_eps=block.norm1.eps)
    fields = {
        "vision_config": vision, "text_config": llm.config, "image_token_index": image_token,
        "tie_word_embeddings": llm.config.tie_word_embeddings,
        "image_seq_length": student.num_tokens,
        "vision_feature_layer": -1}     # CLIP's last but one: the student has no last block
    with torch.device("meta"):          # no memory: the tensors come from the VLM
        if c.mole_experts:
            MoVEKDConfig.register_for_auto_class()
            MoVEKDForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
            config = MoVEKDConfig(mole=student.mole_options, **fields)
            model = MoVEKDForConditionalGeneration(config)
        else:
            model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**fields))
    tower = model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)       # 5.3 has one level more
    tower.load_state_dict(vision_tensors(student), assign=True)
    projector = model.model.multi_modal_projector
    projector.linear_1, projector.linear_2 = vlm.projector[0], vlm.projector[2]
    model.model.language_model, model.lm_head = decoder, head
    return model.eval()


def tiny_llama(llm: TinyLLM, c: Config) -> transformers.LlamaForCausalLM:
    """Return the tiny LLM as transformers' Llama; the names of its tensors are the same."""
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=llm.lm_head.out_features, hidden_size=c.lm_dim, intermediate_size=c.lm_hidden,
        num_hidden_layers=c.lm_depth, num_attention_heads=c.lm_heads, rms_norm_eps=1e-6))
    llama.model.load_state_dict(llm.state_dict(), strict=False)     # all of it but the head
    llama.lm_head = llm.lm_head
    return llama


def vision_tensors(student: Student) -> dict[str, torch.Tensor]:
    """Return the student's tensors under the names of transformers' CLIPVisionModel."""
    # the norm after the last block is there, and nothing reads it
    theirs = {f"post_layernorm.{kind}": torch.ones(student.dim) for kind in ("weight", "bias")}
    for name, tensor in student.net.state_dict().items():
        for part, their_part in NAMES.items():
            name = name.replace(part, their_part)
        if ".attn.qkv." in name:        # timm has q, k and v in one matrix
            for letter, rows in zip("qkv", tensor.chunk(3), strict=True):
                theirs[name.replace("attn.qkv", f"self_attn.{letter}_proj")] = rows.clone()
        else:
            theirs[name] = tensor
    for name in (NAMES["cls_token"], NAMES["pos_embed"]):
        theirs[name] = theirs[name].squeeze()                               # (d,), (1 + n, d)
    return theirs


def llava_processor(student: Student, tokenizer, words) -> transformers.LlavaProcessor:
    """Return the student's view of an image, and the prompt "v1", as transformers' processor."""
    words.add_tokens("<image>", special_tokens=True)
    # some tokenizers put a space before a text, but not if it follows a token
    gap = "" if getattr(tokenizer, "anew_after_end", True) else " "
    template = f"{{%- set gap = {gap!r} %}}\n{{%- set system = {tokenizer.system!r} %}}\n"
    size = {"height": student.image_size, "width": student.image_size}
    images = transformers.LlavaImageProcessor(
        do_pad=True, do_center_crop=False, size=size, crop_size=size,
        image_mean=student.mean, image_std=student.std)
    return transformers.LlavaProcessor(
        images, words, patch_size=student.net.patch_embed.patch_size[0],
        vision_feature_select_strategy="default", num_additional_image_tokens=1,    # [CLS]
        chat_template=template + (HERE / "chat_template.jinja").read_text(encoding="utf-8"))


def word_tokenizer(tokenizer: WordTokenizer) -> transformers.PreTrainedTokenizerFast:
    """Return the tiny tokenizer as one of transformers."""
    # the library's \w has accents and lacks numbers such as 1/2
    pattern = tokenizer._pattern.pattern.replace(r"\w", r"[\p{L}\p{N}_]")
    pattern = Regex(pattern.replace(r"\W", r"[^\p{L}\p{N}_]"))
    words = Tokenizer(models.WordLevel(tokenizer.ids, unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Split(pattern, "removed", invert=True)
    words.add_special_tokens(tokenizer.SPECIAL)     # found before anything becomes lower case
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        clean_up_tokenization_spaces=False)
