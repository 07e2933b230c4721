"""The tiny world: stand-ins for the data and the models that a real run downloads."""

ENCODERS = {  # as the real ones, they differ in width, token count and resolution
    "clip": "vit_base_patch16_clip_quickgelu_224 img_size=48 patch_size=8 "
            "embed_dim=96 depth=4 num_heads=4",                             # 36 tokens x 96
    "eva": "eva02_tiny_patch14_224 img_size=64 patch_size=8 "
           "embed_dim=80 depth=3 num_heads=4",                              # 64 x 80
    "convnext": "convnext_atto img_size=128 depths=(1,1,2,1) "
                "dims=(16,32,64,128) ls_init_value=None",                   # 16 x 128
}
LLM = {"dim": 96, "depth": 3, "heads": 4, "hidden": 256}    # SwiGLU's inner width: 8/3 of the width

# What a run of `--tiny` is shown beside, by variant of tools.compare: name, macro accuracy in %
# with its 95 % interval, number of seeds. The figures are those of docs/results.md.
REFERENCES = {
    "llava": ("frozen CLIP", 72.8, 4.1, 10),
    "no-kd": ("no distillation", 66.6, 3.0, 10),
    "ensemble": ("all encoders", 95.8, 0.6, 10),
}

COUNTS = {  # how much of the world `train.py --tiny` sees and `tiny.world export` writes
    "pretrain": 6000,   # captioned images: plentiful, as LLaVA's 558k captions are
    "train": 1000,      # images with questions and answers: scarce
    "described": 1000,  # images with a caption for an answer, in stage 2 as in LLaVA's mix
    "text": 500,        # dialogues without an image, as in LLaVA's mix
    "eval": 500,        # held-out images, one question of each kind
}
