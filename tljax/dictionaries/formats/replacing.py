"""Replacing a dictionary's files such that readers never see a mixture of the old and the new one."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

_SAVING = ".saving-"


@contextlib.contextmanager
def replace_files(directory: str | os.PathLike[str], marker: str, stale: Sequence[str] = ()) -> Iterator[Path]:
    """Yields a folder to write into, then moves its files into ``directory``.

    If writing fails, ``directory`` stays as it was. Afterwards the old ``marker`` is removed first, and the new one is
    moved in last: a process killed in between leaves a directory that no reader takes for a dictionary.

    Args:
        directory: where the files are to be; made if it does not exist.
        marker: the file without which no reader reads the directory.
        stale: files of an old dictionary that are removed if the new one has none.
    """
    target = Path(directory)
    existed = target.is_dir()
    target.mkdir(parents=True, exist_ok=True)
    for left in target.glob(f"{_SAVING}*"):  # left by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    written = Path(tempfile.mkdtemp(dir=target, prefix=_SAVING))
    try:
        yield written
        (target / marker).unlink(missing_ok=True)
        new = sorted((entry.name for entry in written.iterdir()), key=lambda name: (name == marker, name))
        for name in {*stale} - {*new}:
            (target / name).unlink(missing_ok=True)
        for name in new:
            os.replace(written / name, target / name)
    finally:
        shutil.rmtree(written, ignore_errors=True)
        if not existed and not any(target.iterdir()):
            target.rmdir()
