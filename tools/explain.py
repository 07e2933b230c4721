"""See the method at work: one image through one training step, as a page to look at.

    python -m tools.explain runs/tiny                     # its first held-out picture (10 s)
    python -m tools.explain runs/tiny --row 7             # another
    python -m tools.explain runs/tiny photo.png --question "what colour?" --answer red

Writes RUN/explain.html, one file that needs no network, and its pictures as PNG in RUN/explain/.
Works for runs of every preset, and for the authors' checkpoint, whose folder holds no teachers.
"""

import dataclasses
from pathlib import Path

from plumbing.cli import Parser, run
from plumbing.finished_run import WholeRun, load_whole_run
from plumbing.run_folder import read_log
from plumbing.sets import load_eval_set
from real.image_files import load_image
from tools import explain_panels as panels
from tools.explain_numbers import answer, look, make_batch, measure
from tools.explain_page import Gallery, page, section

STEPS = (  # title, what the paper calls it, its formula, where the code is, the panel
    ("One image, as each encoder sees it", "Vision encoders: each has a resolution and a grid of "
     "its own; all look at the same square, so a place is a place in all of them.", "",
     "teachers.py: VisionEncoder.view", panels.views),
    ("What CLIP looks at", "Token weight: in the block that makes CLIP's tokens, [CLS] asks every "
     "patch j, once in each of the h heads. Drawn is its attention to the patches, the mean over "
     "the heads.", "softmax_j( (V^cls W^Q) (V^res_j W^K)^T / sqrt(d/h) )",
     "teachers.py: cls_scores", panels.attention),
    ("W^tok: how much each token counts", "Token weight, as the paper has it, the map of the panel "
     "above, and as the released code computes it.",
     "W^tok = softmax_j( (V^cls W^Q) (V^res_j W^K)^T / sqrt(d/h) ), the mean over the heads",
     "kd_loss.py: token_weights", panels.token_weights),
    ("The expert of each patch", "Mixture of LoRA experts: a router sends each token of each layer "
     "to one expert, which adds to the frozen FFN.",
     "F*(x) = F(x) + E_i(x),  i = argmax_e softmax(f(x))_e", "mole.py: MoLE", panels.experts),
    ("The tokens as colours", "V^s, and V^t_i behind its encoder adapter: the first three "
     "principal components as red, green and blue, on one basis for all tokens of a space.",
     "V^t_i = W_2 GELU(W_1 V_i)", "teachers.py: EncoderAdapter", panels.tokens),
    ("W^tea: how much each teacher counts", "Teacher weight: CLIP's share is fixed, in the paper "
     "high: the LLM knows CLIP's tokens, and the student shall stay near them. The others share "
     "the rest.",
     "W^tea_i = (1 - clip_share) softmax_i( mean_j V^cls . V^t_ij / sqrt(d) )",
     "kd_loss.py: teacher_weights", panels.teacher_weights),
    ("Where student and teacher differ", "KD loss: the mean squared error of each token.",
     "MSE(V^t_ij, V^s_j)", "kd_loss.py: token_errors", panels.errors),
    ("The loss, added up", "KD loss and total loss. Check it by hand: the last line of each table "
     "is the sum of the products above it. Weighed MSE: sum_j (W^tok_j + 1/n) MSE_ij.",
     "L_kd = sum_i W^tea_i sum_j (W^tok_j + 1/n) MSE_ij;  L_total = L_text + lambda L_kd + ...",
     "kd_loss.py: kd_loss, model.py: MoVEKD.forward", panels.loss_sum),
    ("What the text loss sees", "Text loss: the next token, on the answers only.",
     "L_text = mean over answer tokens of -log p", "data.py: conversation_ids, model.py: text_loss",
     panels.text),
    ("The answer", "The VLM after training, greedily, token by token. Each question is asked "
     "alone; in the panel above it has the turns before it.", "",
     "model.py: VLM.generate", panels.answers),
    ("Every tensor", "Names and sizes of this step. B images, R pixels of the loader's square, "
     "R_s of the student's view; n tokens and d width of the student; m teachers, n_i and d_i of "
     "teacher i; h heads, L layers, E experts; T text tokens, V vocabulary, D width of the LLM.",
     "",
     "model.py: MoVEKD.forward", panels.shapes),
)


def main(argv: list[str] | None = None) -> None:
    """One image of a run, explained."""
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path,
                        help="a run folder of train.py, or a checkpoint of the authors' layout")
    parser.add_argument("image", type=Path, nargs="?",
                        help="an image file; without it, one of the run's held-out pictures")
    parser.add_argument("--row", type=int, default=0, help="which held-out picture, from 0")
    parser.add_argument("--question", default="what shape?", help="to ask about the image file")
    parser.add_argument("--answer", default="", help="its true answer; \"\": what the model says, "
                        "so that L_text rates the model by itself")
    parser.add_argument("--weights", default="", help="folder of the encoders' files, if they are "
                        "no longer where the run found them")
    parser.add_argument("--out", type=Path, help="folder for explain.html (default: the run's)")
    args = parser.parse_args(argv)
    whole = load_whole_run(args.run, weights=args.weights)
    # one picture to draw, of which each encoder makes its view
    whole = whole._replace(c=dataclasses.replace(whole.c, image_views="one"))
    if args.image:
        name, image = args.image.name, load_image(args.image, whole.c.image_size)
        pairs = [(args.question, args.answer)]
    else:
        name, image, pairs = held_out_picture(parser, args, whole)
    gallery = Gallery()
    story = tell(whole, name, image, pairs, last_teacher_weights(args.run))
    html = write_page(story, gallery)
    out = args.out or args.run
    (out / "explain").mkdir(parents=True, exist_ok=True)
    for file, png in gallery.files.items():
        (out / "explain" / file).write_bytes(png)
    temporary = out / "explain.html.tmp"
    temporary.write_text(html, encoding="utf-8")
    temporary.replace(out / "explain.html")
    print(f"{out / 'explain.html'}: {name}; open it in a browser. Its {len(gallery.files)} "
          f"pictures are in {out / 'explain'}/")


def held_out_picture(parser: Parser, args, whole: WholeRun) -> tuple:
    """(name, pixels, [(question, answer)]) of a picture of the run's held-out set."""
    held_out = load_eval_set(whole.c)
    if held_out is None:
        parser.error(f"{args.run} has no held-out set: python -m tools.explain {args.run} IMAGE "
                     '--question "..."')
    records, get_image = held_out
    pairs = {}
    for record in records:
        turns = [turn["value"].replace("<image>", "").strip() for turn in record["conversations"]]
        if "image" in record:
            pairs.setdefault(record["image"], []).extend(zip(turns[::2], turns[1::2]))
    names = list(pairs)
    if not 0 <= args.row < len(names):
        parser.error(f"--row {args.row}: the held-out set has {len(names)} pictures, from 0")
    name = names[args.row]
    return name, get_image(name), pairs[name]


def last_teacher_weights(folder: Path, lines: int = 10) -> dict[str, float]:
    """The mean of each teacher's weight over the last lines of the run's log that have one."""
    if not (folder / "log.jsonl").exists():
        return {}
    rows = [row for row in read_log(folder) if "w_clip" in row][-lines:]
    names = [name for name in (rows[0] if rows else ()) if name.startswith("w_")]
    return {name.removeprefix("w_"): sum(row[name] for row in rows) / len(rows) for name in names}


def tell(whole: WholeRun, name: str, image, pairs: list[tuple[str, str]],
         w_means: dict[str, float]) -> panels.Story:
    """All numbers of the page."""
    c, tokenizer, n = whole.c, whole.tokenizer, whole.model.vlm.student.num_tokens
    answers, turns = [], []
    for question, truth in pairs:
        asked = {"image": name, "conversations": [
            {"from": "human", "value": f"<image>\n{question}"}]}
        given = answer(c, whole.model, tokenizer, asked, image, truth)
        answers.append(given)
        before = "" if turns else "<image>\n"
        turns.append({"from": "human", "value": before + question})
        ids = [text for text, _, _ in given.tokens if text not in ("</s>", "<s>")]
        turns.append({"from": "gpt", "value": truth or " ".join(ids).strip() or "nothing"})
    record = {"image": name, "conversations": turns}
    batch = make_batch(c, tokenizer, record, image, n, "right")
    outputs = whole.teachers(batch["images"], [name]) if whole.teachers else {}
    moments = {}
    if whole.start:
        moments["before"] = measure(whole.start, whole.teachers, batch, tokenizer)
    moments["after" if whole.start else ""] = measure(whole.model, whole.teachers, batch,
                                                      tokenizer)
    looks = look(whole.model.vlm.student, outputs, batch["images"])
    return panels.Story(whole, image, name, looks, moments, w_means, answers)


def write_page(story: panels.Story, gallery: Gallery) -> str:
    """explain.html; the gallery is filled with its pictures."""
    sections = []
    for number, (title, paper, formula, code, panel) in enumerate(STEPS, start=1):
        sections.append(section(number, title, paper, formula, code, panel(story, gallery)))
    c = story.run.c
    distilled = ("" if c.lambda_kd or not story.run.teachers else " This run was trained without "
                 "distillation: L_kd is not in its loss, and CLIP the only teacher shown.")
    intro = (f'<p>One training step of MoVE-KD on the image <code>{story.name}</code> of the run '
             f"<code>{c.out}</code>, in the order in which the code goes. Beside each step stands "
             "what the paper calls it. V^s: the n tokens of the student, a patch of the image "
             "each; V^t_i: those of teacher i, brought to the student's form by its adapter; "
             f"[CLS]: the token that CLIP keeps for the whole image.{distilled}</p>")
    return page("One image through a step of MoVE-KD", intro, sections, "before" in story.moments)


if __name__ == "__main__":
    run(main)
