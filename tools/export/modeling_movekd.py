"""LLaVA whose CLIP has a mixture of LoRA experts (MoLE) in every FFN: the student of MoVE-KD."""

from types import SimpleNamespace

from transformers import LlavaConfig, LlavaForConditionalGeneration

from mole import add_mole


class MoVEKDConfig(LlavaConfig):
    model_type = "movekd_llava"     # as a "llava" it could be loaded without its experts


class MoVEKDForConditionalGeneration(LlavaForConditionalGeneration):
    config_class = MoVEKDConfig

    def __init__(self, config):
        super().__init__(config)
        tower = self.model.vision_tower
        layers = getattr(tower, "vision_model", tower).encoder.layers   # 5.3 has one level more
        for layer in layers:
            layer.mlp.act = layer.mlp.activation_fn     # as timm calls it
        # add_mole takes a timm ViT; these two are all that it reads of one
        vit = SimpleNamespace(blocks=layers, embed_dim=config.vision_config.hidden_size)
        add_mole(vit, **config.mole)
