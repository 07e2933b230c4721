"""The panels of explain.html, one function each, in the order of a training step."""

from typing import NamedTuple

import torch

from plumbing.finished_run import WholeRun
from tools.explain_numbers import FORMS, Answer, Looks, Moment, as_colours, weighed_errors
from tools.explain_page import Gallery, bars, beside, chips, missing, row, table, when
from tools.explain_pictures import (ERROR, EXPERTS, HEAT, colour_picture, expert_picture,
                                    heat_picture, photograph, scale_picture, to_png, view_picture)
from tools.explain_words import NO_TEACHERS, attention_words, mask_words, place_name


def file_name(panel: str, what: str, moment: str) -> str:
    """The name of a picture: "tokens-Vt-eva-before"."""
    plain = "".join(letter if letter.isalnum() else "-" for letter in what.replace("^", ""))
    return "-".join(part for part in (panel, plain, moment) if part)


class Story(NamedTuple):
    """All that the page tells."""

    run: WholeRun
    image: torch.Tensor             # uint8 (3, R, R)
    name: str                       # of the image
    looks: Looks
    moments: dict[str, Moment]      # "before" and "after", or "" alone: as it is
    w_means: dict[str, float]       # W^tea, the mean of the run's last logged steps
    answers: list[Answer]


def views(story: Story, gallery: Gallery) -> str:
    """The image as each encoder sees it."""
    student = story.run.model.vlm.student
    encoders = {"student": student}
    if story.run.teachers:
        encoders.update(story.run.teachers.encoders)
    R = story.image.shape[-1]
    figures = [gallery.figure("image", to_png(photograph(story.image)), f"the image {story.name}",
                              "the loader's image", f"{R} x {R} px")]
    for name, encoder in encoders.items():
        side, pixels = round(encoder.num_tokens ** 0.5), encoder.image_size
        caption = f"{pixels} x {pixels} px, {side} x {side} tokens of width {encoder.dim}"
        figures.append(gallery.figure(f"view-{name}", view_picture(encoder, story.image[None].to(
            story.run.c.device)), f"the image as {name} sees it, {caption}", name, caption))
    return row(figures) + ("" if story.run.teachers else missing(NO_TEACHERS))


def attention(story: Story, gallery: Gallery) -> str:
    """CLIP's [CLS] attention, and in words."""
    looks = story.looks
    w = looks.weights["paper"]
    words = attention_words(looks)
    figure = gallery.figure("attention", heat_picture(w, story.image, w.max().item()), words,
                            f"where the [CLS] of the {looks.whose} looks",
                            f"black 0, bright {w.max():.3f} of what the patches get",
                            gallery.image("scale-attention", scale_picture(HEAT),
                                          "colour scale from dark, 0, to bright, the most",
                                          "scale"))
    return beside([figure], f"<p>{words}</p>")


def token_weights(story: Story, gallery: Gallery) -> str:
    """W^tok in the paper's form and in the released one, on one scale, with their numbers."""
    looks = story.looks
    highest = looks.weights["paper"].max().item()
    figures = []
    for form in FORMS[:2]:
        w = looks.weights[form]
        alt = f"W^tok, {form} form: from {w.min():.4f} to {w.max():.4f}"
        figures.append(gallery.figure(f"wtok-{form}", heat_picture(w, story.image, highest), alt,
                                      f"{form}", f"smallest {w.min():.4f}, largest {w.max():.4f}"))
    rows = [[form, f"{looks.weights[form].max():.4f}", f"{looks.n_max[form]:.2f}",
             f"{looks.entropy[form]:.4f}"] for form in FORMS]
    n = len(looks.weights["paper"])
    form = story.run.model.token_weight
    return beside(
        figures, table(["form", "largest", "n x largest", "entropy / log n"], rows)
        + f"<p>n x largest is 1 when all weigh alike, and n = {n} when one token has all. The "
        "released code takes a softmax of numbers that are a softmax already (over the patches "
        "and [CLS]). They lie between 0 and 1, so two of the new weights differ at most by the "
        "factor e = 2.718, whatever CLIP looks at; and as they sum to no more than 1 over many "
        "tokens, nearly all are close to 0, where the exponential is flat. So the released "
        "weights are nearly uniform. A token weighs W^tok + 1/n in L_kd, which is then about 2/n: "
        f"twice a plain mean over the patches. This run uses the form {form!r}.</p>")


def experts(story: Story, gallery: Gallery) -> str:
    """The expert of each patch, one grid a layer, and those of the patches CLIP looks at."""
    first = next(iter(story.moments.values()))
    if not first.experts:
        return missing("this student has no experts (--mole-experts 0)")
    count = first.probs[0].shape[-1]
    html = chips([f"expert {e + 1}" for e in range(count)],
                 [EXPERTS[e % len(EXPERTS)] for e in range(count)])
    for moment, numbers in story.moments.items():
        figures = []
        for layer, chosen in enumerate(numbers.experts, start=1):
            patches = chosen[1:]
            side = round(len(patches) ** 0.5)
            shares = torch.bincount(patches, minlength=count) / len(patches)
            words = ", ".join(f"{100 * s:.0f} % expert {e + 1}" for e, s in enumerate(shares))
            grid = ""
            if side <= 8:
                lines = [" ".join(str(e + 1) for e in line)
                         for line in patches.reshape(side, side).tolist()]
                grid = "; row by row: " + " / ".join(lines)
            figures.append(gallery.figure(
                file_name("experts", str(layer), moment),
                expert_picture(patches, story.image), f"layer {layer}: {words}{grid}",
                f"layer {layer}", f"{words}; [CLS] itself: expert {chosen[0] + 1}"))
        html += when(moment, row(figures) + top_experts(story, numbers))
    return html


def top_experts(story: Story, numbers: Moment) -> str:
    """The five patches that [CLS] looks at most, and the expert of each in every layer."""
    w = story.looks.weights["paper"]
    if len(w) != len(numbers.experts[0]) - 1:
        return ""
    side = round(len(w) ** 0.5)
    rows = []
    for j in w.topk(min(5, len(w))).indices.tolist():
        chosen = [f"{layer[1 + j] + 1}" for layer in numbers.experts]
        rows.append([place_name(j, side), f"{w[j]:.3f}", *chosen])
    head = ["patch", "W^tok"] + [f"layer {k + 1}" for k in range(len(numbers.experts))]
    return ("<p>The patches that [CLS] looks at most, and the expert that took each:</p>"
            + table(head, rows))


def tokens(story: Story, gallery: Gallery) -> str:
    """V^s and V^t_i as colours, on a common basis a space, before and after training."""
    html = ""
    names, colours = as_colours(story.moments)
    for moment in story.moments:
        figures = []
        for (owner, title, caption), shades in zip(names, colours):
            if owner == moment:
                side = round(len(shades) ** 0.5)
                figures.append(gallery.figure(
                    file_name("tokens", title, moment),
                    colour_picture(shades), f"{title} as colours, {side} x {side} tokens: alike "
                    "colours are alike tokens", title, caption))
        html += when(moment, row(figures))
    return html + ("" if story.run.teachers else missing(NO_TEACHERS))


def teacher_weights(story: Story, gallery: Gallery) -> str:
    """W^tea as bars, this image beside the mean of the run."""
    if not story.run.teachers:
        return missing(NO_TEACHERS)
    html = ""
    for moment, numbers in story.moments.items():
        lines = []
        for name, weight in numbers.w_tea.items():
            lines.append((f"{name}, this image", weight, ""))
            if moment == "after" and name in story.w_means:
                lines.append((f"{name}, mean", story.w_means[name], "mean"))
        html += when(moment, bars(lines))
    note = ("The mean is that of the training images of the last ten steps in the run's log. "
            if story.w_means else "")
    form = "uniform, as V^cls has no product with another space" if (
        story.run.model.direction == "student_to_teacher") else story.run.model.teacher_weight
    return html + (f"<p class='soft'>{note}CLIP's share is fixed at "
                   f"{story.run.model.clip_share:g} where other teachers share the rest. The "
                   f"others' form (--kd-teacher-weight): {form}.</p>")


def errors(story: Story, gallery: Gallery) -> str:
    """Each teacher's error map, on one scale before and after."""
    if not story.run.teachers:
        return missing(NO_TEACHERS)
    names = next(iter(story.moments.values())).errors
    highest = {name: max(m.errors[name].max().item() for m in story.moments.values())
               for name in names}
    html = ""
    for moment, numbers in story.moments.items():
        figures = []
        for name, error in numbers.errors.items():
            alt = f"{moment} training, the error of teacher {name}: mean {error.mean():.4f}"
            figures.append(gallery.figure(
                f"error-{name}-{moment}", heat_picture(error, story.image, highest[name], ERROR),
                alt, name, f"mean {error.mean():.4f}, largest {error.max():.4f}; scale to "
                f"{highest[name]:.4f}", gallery.image(f"scale-error-{name}-{moment}",
                                                      scale_picture(ERROR), "colour scale from "
                                                      "dark, 0, to yellow, the most", "scale")))
        html += when(moment, row(figures, "big"))
    return html


def loss_sum(story: Story, gallery: Gallery) -> str:
    """The loss, term by term, so that a reader can add it up."""
    model, c = story.run.model, story.run.c
    html = ""
    for moment, numbers in story.moments.items():
        rows, total = [], 0.0
        weighed = weighed_errors(numbers, story.looks.weights[model.token_weight])
        for name, loss in numbers.teacher_losses.items():
            product = numbers.w_tea[name] * loss
            total += product
            rows.append([name, f"{weighed[name].sum():.5f}", f"· {numbers.w_tea[name]:.5f}",
                         f"{product:.5f}"])
        if rows:
            rows.append(["L_kd, their sum", "", "", f"{total:.5f}"])
            html_kd = table(["teacher", "weighed MSE", "W^tea", "product"], rows, True)
        else:
            html_kd = missing(NO_TEACHERS)
        terms = numbers.terms
        L_total = (terms["L_text"] + c.lambda_kd * terms["L_kd"]
                   + c.balance_weight * terms["L_balance"])
        rows = [["L_text", f"{terms['L_text']:.5f}", "· 1", f"{terms['L_text']:.5f}"]]
        for name, weight in (("L_kd", c.lambda_kd), ("L_balance", c.balance_weight)):
            rows.append([name, f"{terms[name]:.5f}", f"· {weight:g}",
                         f"{weight * terms[name]:.5f}"])
        rows.append(["L_total, their sum", "", "", f"{L_total:.5f}"])
        html += when(moment, html_kd + table(["term", "value", "weight", "product"], rows, True))
    return html


def text(story: Story, gallery: Gallery) -> str:
    """The conversation with its label mask, and the loss of each answer token."""
    html = ""
    for moment, numbers in story.moments.items():
        html += when(moment, mask_words(numbers))
    return html + ("" if not story.run.c.llm or "before" not in story.moments else
                   "<p class='soft'>Before training: the student and the projector as they "
                   "started, but the trained LLM, which is not loaded twice.</p>")


def answers(story: Story, gallery: Gallery) -> str:
    """What the trained model answers, token by token."""
    rows = []
    for answer in story.answers:
        for k, (token, p, others) in enumerate(answer.tokens):
            rivals = ", ".join(f"{text} {100 * q:.1f} %" for text, q in others[:3])
            rows.append([answer.question if k == 0 else "", answer.truth if k == 0 else "",
                         token, f"{100 * p:.1f} %", rivals])
    return table(["question", "true answer", "token", "p", "next likeliest"], rows)


def shapes(story: Story, gallery: Gallery) -> str:
    """Every tensor's name and size."""
    numbers = list(story.moments.values())[-1]
    rows = [[name, letters, " x ".join(map(str, size)) if letters != "()" else "a number"]
            for name, letters, size in numbers.shapes]
    return table(["tensor", "letters", "here"], rows)
