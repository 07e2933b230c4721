"""The variants that tools.compare trains, each a command line of train.py, and its experiments."""

REVERSED = "--adapter-direction student_to_teacher"
UNIFORM = "--kd-token-weight uniform --kd-teacher-weight uniform"
TOKENS = f"{REVERSED} --target-norm channel --adapter-form per_token"
MOLE = "--mole-experts 3 --balance-weight 0.01"
CLS = "--kd-token-weight paper"
CONFLICT = "--adapter-form interpolation --clip-share 0.333"

VARIANTS = {  # name: (description, flags of train.py)
    # baselines
    "llava": ("frozen CLIP, as in LLaVA-1.5", "--student frozen --lambda-kd 0 --mole-experts 0"),
    "no-kd": ("no distillation", "--lambda-kd 0"),
    "ensemble": ("all encoders side by side, frozen",
                 "--student ensemble --lambda-kd 0 --mole-experts 0"),
    # the paper's method, and without each of its components
    "movekd": ("**MoVE-KD**", ""),
    "no-mole": ("MoVE-KD without MoLE", "--mole-experts 0"),
    "no-token-weight": ("MoVE-KD, teacher weights alone", "--kd-token-weight uniform"),
    "no-teacher-weight": ("MoVE-KD, token weights alone", "--kd-teacher-weight uniform"),
    "clip-only": ("CLIP as only teacher", "--teachers clip"),
    "clip-eva": ("MoVE-KD, teachers CLIP + EVA", "--teachers clip eva"),
    "clip-convnext": ("MoVE-KD, teachers CLIP + ConvNeXt", "--teachers clip convnext"),
    # alpha / rank is the authors' 1/32
    "released": ("MoVE-KD, released code's arithmetic", "--recipe released --mole-alpha 0.25"),
    # reversed adapters, step by step to ours
    "reversed": ("adapters from student to teacher (AM-RADIO)", REVERSED),
    "reversed-channel": ("+ targets standardised per channel", f"{REVERSED} --target-norm channel"),
    "reversed-per-token": ("+ adapters see one token at a time", TOKENS),
    "reversed-per-token-0.1": ("+ CLIP's weight 0.1", f"{TOKENS} --clip-share 0.1"),
    "ours-no-distil": ("ours, no phase of L_kd alone", "--recipe ours --distil-epochs 0"),
    "ours": ("**ours**", "--recipe ours"),
    "reversed-0.1": ("reversed adapters and CLIP's weight 0.1", f"{REVERSED} --clip-share 0.1"),
    # ours with more of the paper, and without CLIP's low weight
    "ours-mole": ("ours with MoLE", f"--recipe ours {MOLE}"),
    "ours-token-weight": ("ours with token weights", f"--recipe ours {CLS}"),
    "ours-both": ("ours with MoLE and token weights", f"--recipe ours {MOLE} {CLS}"),
    "ours-0.333": ("ours, CLIP's weight as the others'", "--recipe ours --clip-share 0.333"),
    # the paper's own components, one after the other
    "interpolation": ("+ KD, tokens and channels resized",
                      f"--mole-experts 0 --adapter-form interpolation {UNIFORM}"),
    "adapters": ("+ encoder adapters", f"--mole-experts 0 {UNIFORM}"),
    "adapters-mole": ("+ MoLE", UNIFORM),
    # MoLE: when does it help?
    "argmax-router": ("MoVE-KD, no gradient in the router", "--mole-router-grad none"),
    "movekd-experts": ("MoVE-KD, MoLE alone learns", "--student experts"),
    "ours-experts": ("ours, MoLE alone learns", f"--recipe ours {MOLE} --student experts"),
    # three targets that no adapter brings together: teachers in open conflict
    "conflict": ("no adapters, CLIP's weight 1/3", CONFLICT),
    "conflict-no-mole": ("the same without MoLE", f"{CONFLICT} --mole-experts 0"),
    "ours-few": ("ours, 300 answered images", "--recipe ours --n-train 300"),
    "ours-few-mole": ("the same with MoLE", f"--recipe ours --n-train 300 {MOLE}"),
}
for _share in (0.05, 0.1, 0.2, 0.4):  # CLIP's, of the teacher weights; the paper's is 0.8
    VARIANTS[f"movekd-{_share}"] = (f"MoVE-KD, CLIP's weight {_share}", f"--clip-share {_share}")
for _share in (0.05, 0.2, 0.4, 0.8):  # ours is 0.1
    VARIANTS[f"ours-{_share}"] = (f"ours, CLIP's weight {_share}",
                                  f"--recipe ours --clip-share {_share}")

EXPERIMENTS = {  # flag: its variants, and how many seeds each has; "compare" is the default
    "compare": dict.fromkeys((
        "llava", "no-kd", "ensemble", "movekd", "no-mole", "no-token-weight", "no-teacher-weight",
        "clip-only", "clip-eva", "clip-convnext", "released", "reversed", "ours"), 5),
    "quick": dict.fromkeys(("llava", "no-kd", "movekd", "ours", "ensemble"), 1),
    "ladder": dict.fromkeys((
        "llava", "interpolation", "adapters", "adapters-mole", "no-teacher-weight", "movekd",
        "reversed", "reversed-channel", "reversed-per-token", "reversed-per-token-0.1",
        "ours-no-distil", "ours", "ensemble"), 3),
    "ablation": dict.fromkeys((
        "ours", "ours-mole", "ours-token-weight", "ours-both", "ours-0.333", "ours-no-distil"), 5),
    "shares": dict.fromkeys((
        "movekd-0.05", "movekd-0.1", "movekd-0.2", "movekd-0.4", "movekd",
        "ours-0.05", "ours", "ours-0.2", "ours-0.4", "ours-0.8"), 1),
    "mole": dict.fromkeys((
        "llava", "movekd-experts", "ours-experts", "movekd", "argmax-router", "no-mole", "ours",
        "ours-mole", "conflict", "conflict-no-mole", "ours-few", "ours-few-mole"), 3),
}
