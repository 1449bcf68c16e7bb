"""Where the boxes and lines of a circuit's picture go, in inches, deterministically."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from tljax.circuits.parts import Box, Join

_BOX_WIDTH = {
    "head": 0.52,
    "group": 0.52,
    "mlp": 0.4,
    "expert": 0.52,
    "input": 0.8,
    "logits": 0.8,
    "feature": 0.6,
    "error": 0.6,
}
_HEIGHTS = {"head": 0.29, "group": 0.29}
_HEIGHT = 0.2
_GAP = 0.14
_ROW = 0.56
_PORTS = {"q": -0.34, "k": 0.0, "v": 0.34}
_SWEEPS = 12
_BOWS = (0.0, 0.3, -0.3, 0.6, -0.6, 0.9, -0.9, 1.3, -1.3, 1.8, -1.8)
_SAMPLES = np.linspace(0.04, 0.96, 24)
_CLEAR = 0.03


@dataclasses.dataclass(frozen=True)
class Layout:
    """Places, in inches, y upward.

    Attributes:
        centres: centre of each box, ``[box, 2]``.
        sizes: width and height of each box, ``[box, 2]``.
        curves: the four points of each line's cubic curve, ``[line, 4, 2]``.
        made_of: two points of each line that is no edge, ``[line, 2, 2]``.
        width, height: of the whole.
    """

    centres: np.ndarray
    sizes: np.ndarray
    curves: np.ndarray
    made_of: np.ndarray
    width: float
    height: float


def lay_out(boxes: Sequence[Box], joins: Sequence[Join], made_of: Sequence[Join]) -> Layout:
    """Places boxes in their rows near what they are joined to, and leads lines around boxes."""
    widths = np.asarray([_width(box, joins, number) for number, box in enumerate(boxes)])
    rows = np.asarray([box.row for box in boxes])
    x = _places(rows, widths, joins, made_of)
    tall = _ROW * (1 + 0.5 * min(1.0, len(joins) / 120))
    centres = np.stack([x, rows * tall], axis=1)
    sizes = np.stack([widths, np.asarray([_HEIGHTS.get(box.kind, _HEIGHT) for box in boxes])], axis=1)
    curves = _curves(boxes, joins, centres, sizes)
    half = np.stack([np.zeros(len(boxes)), sizes[:, 1] / 2], axis=1)
    ends = [(centres[one.start] + half[one.start], centres[one.end] - half[one.end]) for one in made_of]
    straight = np.asarray(ends).reshape(-1, 2, 2)
    every = np.concatenate([centres - sizes / 2, centres + sizes / 2, *(_along(curves, t) for t in _SAMPLES)])
    corner = every.min(axis=0)
    size = every.max(axis=0) - corner
    return Layout(centres - corner, sizes, curves - corner, straight - corner, float(size[0]), float(size[1]))


def ports_of(layout: Layout, box: int, port: str) -> tuple[float, float]:
    """Returns where lines into a query, key or value end."""
    x, y = layout.centres[box]
    return float(x + _PORTS[port] * layout.sizes[box, 0]), float(y - layout.sizes[box, 1] / 2)


def _width(box: Box, joins: Sequence[Join], number: int) -> float:
    """Returns a box's width: the ends of the model grow with what is joined to them."""
    if box.kind not in ("input", "logits"):
        return _BOX_WIDTH[box.kind]
    count = sum(number in (one.start, one.end) for one in joins)
    return float(np.clip(0.08 * count, _BOX_WIDTH[box.kind], 4.0))


def _places(rows: np.ndarray, widths: np.ndarray, joins: Sequence[Join], made_of: Sequence[Join]) -> np.ndarray:
    """Returns each box's x: in turn each row goes to the middle of what its boxes are joined to, without overlap."""
    count, lines = len(rows), [*joins, *made_of]
    nearness = np.zeros((count, count))
    for one in lines:
        weight = 1 / (1 + abs(int(rows[one.start]) - int(rows[one.end])))
        nearness[one.start, one.end] += weight
        nearness[one.end, one.start] += weight
    x = np.zeros(count)
    members = [np.flatnonzero(rows == row) for row in range(rows.max() + 1)]
    for row in members:
        x[row] = _apart(np.zeros(len(row)), widths[row])
    for sweep in range(_SWEEPS):
        for row in members if sweep % 2 == 0 else members[::-1]:
            near = nearness[row]
            total = near.sum(axis=1)
            wanted = np.where(total > 0, near @ x / np.maximum(total, 1e-9), x[row])
            order = np.argsort(wanted, kind="stable")
            x[row[order]] = _apart(wanted[order], widths[row[order]])
    return x


def _apart(wanted: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Returns places nearest to those wanted (in squares) whose boxes, in this order, have a gap between them."""
    offsets = np.concatenate([[0.0], np.cumsum((widths[:-1] + widths[1:]) / 2 + _GAP)])
    blocks: list[tuple[float, int]] = []  # mean of wanted minus offset, and number of boxes, of boxes that touch
    for value in wanted - offsets:
        mean, size = float(value), 1
        while blocks and blocks[-1][0] >= mean:
            before, others = blocks.pop()
            mean, size = (mean * size + before * others) / (size + others), size + others
        blocks.append((mean, size))
    return np.repeat([mean for mean, _ in blocks], [size for _, size in blocks]) + offsets


def _curves(boxes: Sequence[Box], joins: Sequence[Join], centres: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Returns the curve of each edge, ``[edge, 4, 2]``, bent as little as keeps it off other boxes."""
    starts = _spread(joins, [one.start for one in joins], [one.end for one in joins], centres, sizes)
    ends = _spread(joins, [one.end for one in joins], [one.start for one in joins], centres, sizes)
    curves = []
    for number, one in enumerate(joins):
        port = _PORTS.get(one.port)
        from_x = starts[number]
        to_x = ends[number] if port is None else centres[one.end, 0] + port * sizes[one.end, 0]
        bottom = centres[one.start, 1] + sizes[one.start, 1] / 2
        top = centres[one.end, 1] - sizes[one.end, 1] / 2
        others = np.asarray([n not in (one.start, one.end) for n in range(len(boxes))])
        tried = np.stack([_curve(from_x, bottom, to_x, top, bow) for bow in _BOWS])
        hits = _hits(tried, centres[others], sizes[others])
        curves.append(tried[int(np.argmin(hits))])
    return np.asarray(curves).reshape(-1, 4, 2)


def _curve(from_x: float, bottom: float, to_x: float, top: float, bow: float) -> np.ndarray:
    rise = 0.4 * (top - bottom)
    return np.asarray([(from_x, bottom), (from_x + bow, bottom + rise), (to_x + bow, top - rise), (to_x, top)])


def _hits(curves: np.ndarray, centres: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Counts the points of each curve that lie on a box."""
    points = np.stack([_along(curves, t) for t in _SAMPLES], axis=1)  # [curve, sample, 2]
    away = np.abs(points[:, :, None] - centres[None, None]) - (sizes / 2 + _CLEAR)[None, None]
    return (away < 0).all(axis=-1).sum(axis=(1, 2))


def _along(curves: np.ndarray, t: float) -> np.ndarray:
    weights = np.asarray([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3])
    return np.einsum("k,ckd->cd", weights, curves)


def _spread(
    joins: Sequence[Join], here: Sequence[int], there: Sequence[int], centres: np.ndarray, sizes: np.ndarray
) -> np.ndarray:
    """Returns where lines leave their boxes ``here``, spread over these in the order of the boxes ``there``."""
    places = np.zeros(len(joins))
    for box in set(here):
        own = [n for n, one in enumerate(here) if one == box]
        own.sort(key=lambda n: (centres[there[n], 0], there[n], joins[n].port))
        share = np.linspace(-0.4, 0.4, len(own)) if len(own) > 1 else np.zeros(1)
        places[own] = centres[box, 0] + share * min(sizes[box, 0], 0.1 * len(own))
    return places
