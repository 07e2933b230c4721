"""The tiny world: stand-ins for the data and the models that a real run downloads."""

COUNTS = {  # how much of the world `train.py --tiny` sees and `tiny.world export` writes
    "pretrain": 6000,   # captioned images: plentiful, as LLaVA's 558k captions are
    "train": 1000,      # images with questions and answers: scarce
    "described": 1000,  # images with a caption for an answer, in stage 2 as in LLaVA's mix
    "text": 500,        # dialogues without an image, as in LLaVA's mix
    "eval": 500,        # held-out images, one question of each kind
}
