"""Sentences of explain.html that are made of numbers."""

import math
from html import escape

from tools.explain_numbers import Looks, Moment

NO_TEACHERS = ("the authors' checkpoint holds neither teachers nor adapters, nor what the student "
               "was before training")


def place_name(j: int, side: int) -> str:
    """Where a token is on its grid, counted from 1."""
    return f"row {j // side + 1}, column {j % side + 1}"


def attention_words(looks: Looks) -> str:
    """Where [CLS] looks, as a sentence: a reader without the picture knows it too."""
    w = looks.weights["paper"]
    side = round(len(w) ** 0.5)
    top = w.topk(min(3, len(w)))
    places = [f"{place_name(j, side)} ({100 * v:.1f} %)"
              for v, j in zip(top.values.tolist(), top.indices.tolist())]
    half = int((w.sort(descending=True).values.cumsum(dim=0) < 0.5).sum()) + 1
    return (f"Of {side} x {side} patches, [CLS] of the {looks.whose} looks most at "
            f"{'; '.join(places)}. Of what it gives to the patches, half is on {half} of the "
            f"{len(w)}. {100 * looks.itself:.0f} % of all its attention stays on [CLS] itself; "
            "W^tok leaves that out.")


def mask_words(numbers: Moment) -> str:
    """The tokens; those that the loss sees are marked, with their -log p."""
    parts = []
    for word in numbers.words:
        shown = word.text + (f" x {word.count}" if word.count > 1 else "")
        loss = f" <small>{word.loss:.3f}</small>" if word.answer else ""
        parts.append(f'<span class="{"seen" if word.answer else ""}">{escape(shown)}{loss}</span>')
    losses = [word.loss for word in numbers.words if not math.isnan(word.loss)]
    mean = sum(losses) / len(losses)
    return (f'<p class="words">{" ".join(parts)}</p><p>Marked: the {len(losses)} tokens that the '
            f"loss sees, each with its -log p. Their mean is L_text = {mean:.5f}; all others have "
            "the label -100.</p>")
