"""``HookPointList``: the result of ``model.hook_points()``, which prints as a table."""

from collections.abc import Iterable

from tljax.hooks.points import HookPointSpec


class HookPointList(tuple[HookPointSpec, ...]):
    """Hook points in firing order; prints as a table (and as an HTML table in notebooks)."""

    batch: int | None
    pos: int | None

    def __new__(
        cls, points: Iterable[HookPointSpec], batch: int | None = None, pos: int | None = None
    ) -> "HookPointList":
        self = super().__new__(cls, points)
        self.batch, self.pos = batch, pos
        return self

    def shape_text(self, point: HookPointSpec) -> str:
        """Returns the shape as text, such as ``[batch, pos, 64]``, with numbers where they are known."""
        sizes = dict(point.sizes) | {
            "batch": self.batch,
            "pos": self.pos,
            "query_pos": self.pos,
            "key_pos": self.pos,
        }
        return "[" + ", ".join(str(sizes.get(axis) or axis) for axis in point.axes) + "]"

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Returns ``(name, axes, shape, meaning)`` of each point."""
        return [
            (
                p.name,
                " ".join(p.axes),
                self.shape_text(p),
                p.meaning + (" (only when named)" if p.optional else ""),
            )
            for p in self
        ]

    def __str__(self) -> str:
        rows = [("name", "axes", "shape", "meaning"), *self.rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)) + f"  {row[3]}"
            for row in rows
        )

    __repr__ = __str__

    def _repr_html_(self) -> str:
        cells = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in self.rows())
        return f"<table><tr><th>name</th><th>axes</th><th>shape</th><th>meaning</th></tr>{cells}</table>"

    def to_markdown(self) -> str:
        """Returns the table in Markdown."""
        lines = ["| name | shape | meaning |", "|---|---|---|"]
        return (
            "\n".join(lines + [f"| `{name}` | {shape} | {meaning} |" for name, _, shape, meaning in self.rows()]) + "\n"
        )
