"""Colour scales, the same in pages and in figures."""

import dataclasses
import functools

import numpy as np

from tljax.errors import InputError

SEQUENTIAL, DIVERGING = "Blues", "RdBu"

_LEVELS = 100


@dataclasses.dataclass(frozen=True)
class Scale:
    """A colour scale: values from ``low`` to ``high`` in one of matplotlib's colour maps.

    Attributes:
        low, high: the values of the first and the last colour, which values outside get too.
        colours: ``"Blues"`` (pale to dark) or ``"RdBu"`` (red, white, blue).
    """

    low: float
    high: float
    colours: str = SEQUENTIAL

    def levels(self, values: np.ndarray) -> np.ndarray:
        """Returns the index of each value's colour in :meth:`palette`."""
        share = (np.asarray(values, np.float64) - self.low) / (self.high - self.low)
        return np.round(np.clip(share, 0, 1) * _LEVELS).astype(int)

    def palette(self) -> tuple[tuple[str, str], ...]:
        """Returns ``(background, text colour)`` of each level, as ``#rrggbb``."""
        return _palette(self.colours)

    def paints(self, values: np.ndarray) -> list[tuple[str, str]]:
        """Returns ``(background, text colour)`` of each value of a vector."""
        return [self.palette()[level] for level in self.levels(values)]


def scale_of(values: np.ndarray, min_value: float | None = None, max_value: float | None = None) -> Scale:
    """Returns a scale of red and blue around zero if any value is negative, otherwise of blue from zero.

    Args:
        values: finite values.
        min_value, max_value: ends of the scale instead of zero and the largest value. Around zero both sides are as
            long as the larger of the two, so that white stays zero.
    """
    low = float(np.min(values, initial=0.0)) if min_value is None else float(min_value)
    high = float(np.max(values, initial=0.0)) if max_value is None else float(max_value)
    if not low < high and not (low == high and None in (min_value, max_value)):
        raise InputError(
            f"The colour scale runs from min_value={low:g} to max_value={high:g}: the second must be larger."
        )
    if low < 0:
        limit = max(-low, high)
        return Scale(-limit, limit, DIVERGING)
    return Scale(low, high if high > low else low + 1.0)


@functools.cache
def _palette(colours: str) -> tuple[tuple[str, str], ...]:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    backgrounds = colormaps[colours](np.arange(_LEVELS + 1) / _LEVELS)[:, :3]
    return tuple((to_hex(colour), _ink(colour)) for colour in backgrounds)


def _ink(background: np.ndarray) -> str:
    """Returns black or white, whichever contrasts more; the luminance is that of WCAG 2."""
    linear = np.where(background <= 0.04045, background / 12.92, ((background + 0.055) / 1.055) ** 2.4)
    luminance = float(linear @ np.array([0.2126, 0.7152, 0.0722]))
    return "#ffffff" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "#000000"
