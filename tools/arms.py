"""The arms of tools/compare.py, each a command line of train.py, and the experiments made of them.

Every arm has the same data, the same number of steps and the same stage 1.
"""

HEADS = "--adapter-direction student_to_teacher"
UNIFORM = "--kd-token-weight uniform --kd-teacher-weight uniform"

ARMS = {  # name: (what it is, flags of train.py)
    # baselines
    "llava": ("LLaVA-1.5: frozen CLIP", "--student frozen --lambda-kd 0 --mole-experts 0"),
    "no-kd": ("fine-tuned, MoLE, no KD", "--lambda-kd 0"),
    "ensemble": ("multi-encoder VLM: all encoders side by side, nothing distilled",
                 "--student ensemble --lambda-kd 0 --mole-experts 0"),
    # the paper's method, and what it is made of
    "movekd": ("**MoVE-KD**", ""),
    "no-mole": ("MoVE-KD without MoLE", "--mole-experts 0"),
    "no-token-weight": ("MoVE-KD, token weights uniform", "--kd-token-weight uniform"),
    "no-teacher-weight": ("MoVE-KD, teacher weights uniform", "--kd-teacher-weight uniform"),
    "clip-only": ("teacher CLIP alone: fine-tuning that stays near CLIP", "--teachers clip"),
    "clip-eva": ("MoVE-KD, teachers CLIP + EVA", "--teachers clip eva"),
    "clip-convnext": ("MoVE-KD, teachers CLIP + ConvNeXt", "--teachers clip convnext"),
    # alpha / rank is 1/32, theirs
    "released": ("MoVE-KD, released code's arithmetic", "--recipe released --mole-alpha 0.25"),
    # heads on the student's side, step by step to our recipe
    "student-to-teacher": ("heads student -> teacher (AM-RADIO)", HEADS),
    "heads-channel": ("+ targets standardised per channel", f"{HEADS} --target-norm channel"),
    "heads-per-token": ("+ heads see one token at a time",
                        f"{HEADS} --target-norm channel --adapter-form per_token"),
    "ours-share-0.2": ("+ CLIP's share 0.2", "--recipe ours --clip-share 0.2"),
    "ours": ("**our recipe** (CLIP's share 0.1)", "--recipe ours"),
    # the paper's own components, one after the other
    "interpolation": ("+ KD, tokens and channels resized", "--mole-experts 0 "
                      f"--adapter-form interpolation {UNIFORM}"),
    "adapters": ("+ encoder adapters", f"--mole-experts 0 {UNIFORM}"),
    "adapters-mole": ("+ MoLE", UNIFORM),
    # MoLE: when does it help?
    "ours-no-mole": ("our recipe without MoLE", "--recipe ours --mole-experts 0"),
    "movekd-experts": ("MoVE-KD, MoLE alone learns", "--student experts"),
    "ours-experts": ("our recipe, MoLE alone learns", "--recipe ours --student experts"),
    # three targets that no adapter brings together: teachers in open conflict
    "conflict": ("no adapters, CLIP's share 1/3",
                 "--adapter-form interpolation --clip-share 0.333"),
    "conflict-no-mole": ("the same without MoLE", "--adapter-form interpolation "
                         "--clip-share 0.333 --mole-experts 0"),
    "ours-few": ("our recipe, 300 answered images", "--recipe ours --n-train 300"),
    "ours-few-no-mole": ("the same without MoLE",
                         "--recipe ours --n-train 300 --mole-experts 0"),
}
SHARES = (0.05, 0.1, 0.2, 0.4, 0.8)  # CLIP's, of the teacher weights
for _share in SHARES:
    if _share != 0.4:  # movekd's own
        ARMS[f"paper-share-{_share}"] = (f"MoVE-KD, CLIP's share {_share}",
                                         f"--clip-share {_share}")
    if _share not in (0.1, 0.2):
        ARMS[f"ours-share-{_share}"] = (f"our recipe, CLIP's share {_share}",
                                        f"--recipe ours --clip-share {_share}")
TITLES = {arm: title for arm, (title, _) in ARMS.items()}

MAIN = ["llava", "no-kd", "ensemble", "movekd", "no-mole", "no-token-weight", "no-teacher-weight",
        "clip-only", "clip-eva", "clip-convnext", "released", "student-to-teacher", "ours"]

# The paper's component table, 7B, average over its benchmarks: from a note on the paper.
LADDER = {  # rung: published number, or None
    "llava": 66.5,
    "interpolation": 66.3,
    "adapters": 66.7,
    "adapters-mole": 67.4,
    "no-teacher-weight": 67.7,  # + token weights
    "movekd": 68.0,             # + teacher weights
    "student-to-teacher": None,
    "heads-channel": None,
    "heads-per-token": None,
    "ours-share-0.2": None,
    "ours": None,
    "ensemble": None,
}
LADDER_TITLES = {**TITLES, "no-teacher-weight": "+ token weights", "movekd": "+ teacher weights",
                 "ours": "+ CLIP's share 0.1: our recipe", "ensemble": "all encoders side by side"}
MOLE = ["llava", "movekd-experts", "ours-experts", "movekd", "no-mole", "ours", "ours-no-mole",
        "conflict", "conflict-no-mole", "ours-few", "ours-few-no-mole"]


def share_arm(direction: str, share: float) -> str:
    """The arm with CLIP's share in the paper's direction ("paper") or in ours ("ours")."""
    if direction == "paper":
        return "movekd" if share == 0.4 else f"paper-share-{share}"
    return "ours" if share == 0.1 else f"ours-share-{share}"


EXPERIMENTS = {  # flag: (its arms, seeds)
    "main": (MAIN, 5),
    "ladder": (list(LADDER), 3),
    "shares": ([share_arm(direction, share) for direction in ("paper", "ours")
                for share in SHARES], 1),
    "mole": (MOLE, 3),
}
