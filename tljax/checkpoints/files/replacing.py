"""Replacing a checkpoint on disk such that readers never load a mixture of the old and the new one."""

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
"""Files read together with a config.json, besides the weights: an old model's must not stay beside a new one."""


@contextlib.contextmanager
def replace_checkpoint(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a folder to write a checkpoint into, then replaces the checkpoint in ``directory`` with its files.

    If writing fails, ``directory`` stays as it was. Afterwards the old config.json is removed first and the new one is
    moved in last: a process killed in between leaves a directory without config.json, which readers refuse. The old
    tokenizer, index of shards and generation_config.json are removed, too; other files stay.

    Raises:
        CheckpointError: the directory holds an adapter, which readers would apply to the new model.
    """
    target = Path(directory)
    if (target / _ADAPTER).exists():
        raise CheckpointError(
            f"{target} holds an adapter ({_ADAPTER}), which belongs to another model than the one to be saved there, "
            "and readers would apply it. Save into another directory, or take the adapter away first."
        )
    target.mkdir(parents=True, exist_ok=True)
    for left in target.glob(f"{SAVING}*"):  # left by a process that was killed
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
