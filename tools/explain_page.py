"""The bricks of explain.html: figures, bars, tables, sections, and the page that holds them.

One self-contained file: pictures are inside it, nothing is fetched. Without a script both moments,
before and after training, are shown one after the other; with it two tabs choose.
"""

import base64
from html import escape
from pathlib import Path

HERE = Path(__file__).parent
# nothing may be loaded from anywhere: the browser itself would refuse
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


class Gallery:
    """The pictures of a page, by file name; `figure` shows one and keeps it."""

    def __init__(self):
        self.files = {}

    def image(self, name: str, png: bytes, alt: str, kind: str = "") -> str:
        """An <img> with its bytes inside. The text says what a reader without it must know."""
        self.files[f"{name}.png"] = png
        data = base64.b64encode(png).decode()
        return f'<img class="{kind}" alt="{escape(alt)}" src="data:image/png;base64,{data}">'

    def figure(self, name: str, png: bytes, alt: str, title: str, caption: str = "",
               more: str = "") -> str:
        """A picture with a title and a line under it."""
        words = f"<strong>{escape(title)}</strong> {escape(caption)}"
        picture = self.image(name, png, alt)
        return f"<figure>{picture}{more}<figcaption>{words}</figcaption></figure>"


def row(figures: list[str], kind: str = "") -> str:
    """Pictures side by side, as many as the screen has room for."""
    return f'<div class="row {kind}">{"".join(figures)}</div>'


def beside(figures: list[str], words: str) -> str:
    """Pictures with text on their right, or on a narrow screen below them."""
    return (f'<div class="beside"><div class="row" style="--count:{len(figures)}">'
            f'{"".join(figures)}</div><div>{words}</div></div>')


def when(moment: str, html: str) -> str:
    """What is seen of one moment only, "before" or "after"; "" is always seen."""
    if not moment:
        return html
    return f'<div class="{moment}"><h3>{moment} training</h3>{html}</div>'


def table(head: list[str], rows: list[list[str]], last_is_sum: bool = False) -> str:
    """A table; cells that are numbers stand on the right."""
    kinds = ["n" if all(looks_numeric(line[i]) for line in rows) else "" for i in range(len(head))]
    cells = "".join(f'<th class="{kind}">{escape(text)}</th>' for text, kind in zip(head, kinds))
    lines = [f"<tr>{cells}</tr>"]
    for i, line in enumerate(rows):
        cells = "".join(f'<td class="{kind}">{escape(text)}</td>'
                        for text, kind in zip(line, kinds))
        kind = "sum" if last_is_sum and i == len(rows) - 1 else ""
        lines.append(f'<tr class="{kind}">{cells}</tr>')
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def looks_numeric(text: str) -> bool:
    return not text or text[0].isdigit() or text[0] in "-·"


def bars(lines: list[tuple[str, float, str]]) -> str:
    """(label, share of 1, kind) as bars; kind "mean" is a thinner one."""
    parts = []
    for label, share, kind in lines:
        parts.append(f'<span>{escape(label)}</span><div><i class="{kind}" '
                     f'style="width:{100 * share:.1f}%"></i></div><span>{100 * share:.1f} %</span>')
    return f'<div class="bars">{"".join(parts)}</div>'


def chips(labels: list[str], colours: list[tuple]) -> str:
    """A legend: coloured squares and what they mean."""
    parts = [f'<span class="chip" style="background:rgb{colour}"></span>{escape(label)}&ensp; '
             for label, colour in zip(labels, colours)]
    return f'<p class="soft">{"".join(parts)}</p>'


def missing(why: str) -> str:
    """In place of a panel."""
    return f'<p class="missing">Not shown: {escape(why)}.</p>'


def section(number: int, title: str, paper: str, formula: str, code: str, body: str) -> str:
    """A step of the method: what the paper says of it, where the code is, and what it gave here."""
    line = f'<span class="formula">{escape(formula)}</span>' if formula else ""
    return (f'<section id="step{number}"><h2><b>{number}</b>{escape(title)}</h2>'
            f'<div class="paper">{escape(paper)}{line}<code>{escape(code)}</code></div>'
            f"{body}</section>")


def page(title: str, intro: str, sections: list[str], with_tabs: bool) -> str:
    """The whole file."""
    style = (HERE / "explain.css").read_text(encoding="utf-8")
    script = (HERE / "explain.js").read_text(encoding="utf-8")
    tabs = ""
    if with_tabs:
        buttons = "".join(f'<button role="tab" data-when="{name}" aria-selected="false">{name} '
                          "training</button>" for name in ("before", "after"))
        tabs = (f'<div class="when"><div role="tablist" aria-label="The student and the adapters">'
                f"{buttons}</div></div>")
    return ('<!doctype html><html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<link rel="icon" href="data:,"><title>{escape(title)}</title>'
            f"<style>{style}</style></head><body><header><h1>{escape(title)}</h1>{intro}</header>"
            f"{tabs}<main>{''.join(sections)}</main><script>{script}</script></body></html>\n")
