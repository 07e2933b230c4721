"""explain.html from its template, page.html: one self-contained file, with the pictures inside it.

Nothing is fetched and no script runs. Two tabs, which are radio buttons, choose between the moments
before and after training; a browser without CSS's :has shows both.
"""

import base64
from pathlib import Path

import jinja2  # torch requires it, so that requirements.txt need not

from tools.explain.numbers import ExplainedImage
from tools.explain.pictures import EXPERTS, file_name


def render(explained: ExplainedImage, pictures: dict[str, bytes]) -> str:
    """Return the text of explain.html; every value is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    encoded = {name: base64.b64encode(png).decode() for name, png in pictures.items()}
    return environment.get_template("page.html").render(
        explained=explained, c=explained.run.c, pictures=encoded, expert_colours=EXPERTS,
        file_name=file_name)
