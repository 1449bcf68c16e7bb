"""Putting a checkpoint in the place of another: whole, or refused by whoever reads it, never a mixture."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tljax.checkpoints.files.reader import CONFIG, INDEX, PICKLE, PICKLE_INDEX, SAVING, SINGLE
from tljax.checkpoints.stop_tokens import GENERATION_CONFIG
from tljax.errors import CheckpointError
from tljax.text.tokenizer_files import TOKENIZER_FILES

_ADAPTER = "adapter_config.json"
_OF_A_MODEL = (
    INDEX, GENERATION_CONFIG, *TOKENIZER_FILES, "chat_template.json", "additional_chat_templates",
)  # fmt: skip
"""What is read together with a config.json, besides the weights: another model's must not stay beside a new one."""


@contextlib.contextmanager
def replace_checkpoint(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a folder to write a checkpoint into, whose files then replace what ``directory`` holds.

    If writing fails, ``directory`` stays as it was. Once all is written, config.json goes first and comes last, so that
    a process killed in between leaves a directory that is refused for the lack of one. Of the old checkpoint its
    tokenizer, its index of shards and its generation_config.json go too; other files stay.

    Raises:
        CheckpointError: an adapter lies there, which would be taken for the new model's.
    """
    target = Path(directory)
    if (target / _ADAPTER).exists():
        raise CheckpointError(
            f"{target} holds an adapter ({_ADAPTER}), which belongs to another model than the one to be saved there, "
            "and readers would apply it. Save into another directory, or take the adapter away first."
        )
    target.mkdir(parents=True, exist_ok=True)
    for left in target.glob(f"{SAVING}*"):  # of a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    written = Path(tempfile.mkdtemp(dir=target, prefix=SAVING))
    try:
        yield written
        _commit(written, target)
    finally:
        shutil.rmtree(written, ignore_errors=True)


def _commit(written: Path, target: Path) -> None:
    is_over_another = any((target / name).exists() for name in (CONFIG, SINGLE, INDEX, PICKLE, PICKLE_INDEX))
    (target / CONFIG).unlink(missing_ok=True)
    new = sorted((entry.name for entry in written.iterdir()), key=lambda name: (name == CONFIG, name))
    for name in _OF_A_MODEL if is_over_another else ():
        if name not in new:
            _remove(target / name)
    for name in new:
        if (written / name).is_dir():
            _remove(target / name)
        os.replace(written / name, target / name)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
