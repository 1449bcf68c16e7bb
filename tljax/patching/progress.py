"""The progress bar of a long sweep."""

from types import TracebackType

from tqdm.auto import tqdm


class Progress:
    """Shows how much of a sweep is done.

    Args:
        runs: how many patched runs there are.
        shown: ``True`` at once, ``False`` never, ``None`` after three seconds.
    """

    def __init__(self, runs: int, shown: bool | None) -> None:
        self._bar = tqdm(
            total=runs, desc="sweep", unit="run", delay=0 if shown else 3, disable=shown is False, leave=bool(shown)
        )
        self._done = 0.0

    def advance(self, runs: float) -> None:
        """Counts work done, in runs (parts of one too)."""
        self._done += runs
        if (whole := int(self._done + 1e-6) - self._bar.n) > 0:
            self._bar.update(whole)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.close()
