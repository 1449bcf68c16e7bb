"""A progress bar for long work."""

import warnings
from types import TracebackType

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # a notebook without ipywidgets gets a plain bar, which needs no warning
    from tqdm.auto import tqdm


class Progress:
    """Progress bar.

    Args:
        total: how many units of work there are; ``None`` if that is not known.
        shown: ``True`` at once, ``False`` never, ``None`` after three seconds.
        what: the bar's title.
        unit: what is counted.
    """

    def __init__(self, total: int | None, shown: bool | None, what: str = "sweep", unit: str = "run") -> None:
        delay = 0 if shown else 3
        self._bar = tqdm(total=total, desc=what, unit=unit, delay=delay, disable=shown is False, leave=bool(shown))
        self._done = 0.0

    def advance(self, work: float) -> None:
        """Adds ``work`` units, or a fraction of one, to the work done."""
        self._done += work
        if (whole := int(self._done + 1e-6) - self._bar.n) > 0:
            self._bar.update(whole)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.close()
