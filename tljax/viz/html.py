"""Pictures as HTML: the object that a notebook shows, its templates, and how tokens are written in it."""

import dataclasses
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tljax.safetensors_files import replace_file


@dataclasses.dataclass(frozen=True, repr=False)
class Html:
    """A picture as HTML, which a notebook shows when it ends a cell.

    Attributes:
        html: the picture, to be placed inside a page; it includes its styles and script and fetches nothing.
        title: the title of the page that :meth:`save` writes.
    """

    html: str
    title: str = "tljax"

    def _repr_html_(self) -> str:
        return self.html

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a page (UTF-8) that opens in any browser, without a network."""
        page = _environment().get_template("page.html.jinja").render(title=self.title, picture=self)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replace_file(Path(path)) as stream:
            stream.write(page.encode())

    def __html__(self) -> str:  # templates do not escape what this method returns
        return self.html

    def __repr__(self) -> str:
        return f"Html({self.title!r}, {len(self.html)} characters; .save(path) writes it as a page)"


def render(template: str, *, title: str | None, kind: str, data: Mapping[str, Any], **values: Any) -> Html:
    """Fills in a template; jinja escapes every text in it.

    Args:
        template: its name in ``templates/``.
        title: a heading, if any.
        kind: the kind of picture, which is the page's title if there is no heading.
        data: the data that the script reads, as JSON.
        values: the template's other variables.
    """
    heading = None if title is None else spelt(title)
    html = _environment().get_template(template).render(title=heading, data=data, **values)
    return Html(html, heading or kind)


def spelt(text: str) -> str:
    """Writes the control characters of a text (invisible ones, halves of surrogate pairs) as escapes."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def token_label(token: str) -> str:
    """Writes a token by itself: spaces at its ends as ``·``, newlines as ``↵``.

    >>> token_label(" John"), token_label("\\n\\n"), token_label("\\t")
    ('·John', '↵↵', '\\\\t')
    """
    start, end = len(token) - len(token.lstrip(" ")), len(token.rstrip(" "))
    inner = token[start:end]
    return "·" * start + spelt_lines(inner, "↵") + "·" * (len(token) - max(start, end)) or "∅"


def running_token(token: str) -> str:
    """Writes a token as part of its text: spaces as they are, a line break after ``↵``."""
    return spelt_lines(token, "↵\n") or "∅"


def spelt_lines(token: str, newline: str) -> str:
    """Applies :func:`spelt` to a token, with ``newline`` in place of its newlines."""
    return newline.join(spelt(line) for line in token.split("\n"))


@functools.cache
def _environment() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tljax.viz"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment
