"""Pictures as HTML: how tokens are written, what escapes them, and the object a notebook shows."""

import dataclasses
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tljax.safetensors_files import replace_file


@dataclasses.dataclass(frozen=True, repr=False)
class Html:
    """A picture as HTML: the last line of a notebook cell shows it.

    Attributes:
        html: the picture, to be placed inside a page; styles and script included, nothing is fetched.
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

    def __html__(self) -> str:  # the name by which templates know what is escaped already
        return self.html

    def __repr__(self) -> str:
        return f"Html({self.title!r}, {len(self.html)} characters; .save(path) writes it as a page)"


def render(template: str, *, title: str | None, kind: str, data: Mapping[str, Any], **values: Any) -> Html:
    """A template filled in; every text in it is escaped here, by jinja.

    Args:
        template: its name in ``templates/``.
        title: a heading, if any.
        kind: what the picture is, the page's title where there is no heading.
        data: what the script reads, as JSON.
        values: what else the template names.
    """
    heading = None if title is None else spelt(title)
    html = _environment().get_template(template).render(title=heading, data=data, **values)
    return Html(html, heading or kind)


def spelt(text: str) -> str:
    """A text with its control characters (invisible ones, halves of surrogate pairs) written as escapes."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def token_label(token: str) -> str:
    """A token by itself: spaces at its ends as ``·``, newlines as ``↵``.

    >>> token_label(" John"), token_label("\\n\\n"), token_label("\\t")
    ('·John', '↵↵', '\\\\t')
    """
    start, end = len(token) - len(token.lstrip(" ")), len(token.rstrip(" "))
    inner = token[start:end]
    return "·" * start + spelt_lines(inner, "↵") + "·" * (len(token) - max(start, end)) or "∅"


def running_token(token: str) -> str:
    """A token as part of its text: spaces as they are, a line break after ``↵``."""
    return spelt_lines(token, "↵\n") or "∅"


def spelt_lines(token: str, newline: str) -> str:
    """:func:`spelt`, with ``newline`` in the place of newlines."""
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
