"""Finding a checkpoint's directory by name: bundled models, local directories, and the Hugging Face hub.

A local directory is used as it is, without network access. ``HF_TOKEN``, ``HF_ENDPOINT`` and
``HF_HUB_OFFLINE`` are read at each call.
"""

import dataclasses
import fnmatch
import glob
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tljax.checkpoints.files import names
from tljax.checkpoints.files.reader import CONFIG, HOSTED, INDEX, PICKLE, PICKLE_INDEX, SINGLE
from tljax.checkpoints.formats.adapter_config import ADAPTER, ADAPTER_CONFIG, ADAPTER_PICKLE
from tljax.checkpoints.stop_tokens import GENERATION_CONFIG
from tljax.errors import CheckpointError, InputError, nearest
from tljax.text.tokenizer_files import TOKENIZER_FILES

MODELS = Path(__file__).parents[2] / "models"
"""The directory of the models bundled with tljax."""

_ADAPTER = (ADAPTER_CONFIG, ADAPTER, *TOKENIZER_FILES)
_SAFETENSORS = (CONFIG, GENERATION_CONFIG, SINGLE, INDEX, "model-*.safetensors", *_ADAPTER)
_PICKLES = (PICKLE, PICKLE_INDEX, "pytorch_model-*.bin", HOSTED, ADAPTER_PICKLE)
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Location:
    """The location of a checkpoint.

    Attributes:
        directory: the directory with its files.
        model_name: short name for the config.
        repo: its hub id, when it came from the hub.
        weights: the file with its weights, where the directory holds several checkpoints.
    """

    directory: Path
    model_name: str
    repo: str | None = None
    weights: str | None = None


def locate(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    checkpoint_value: int | None = None,
    checkpoint_index: int | None = None,
    adapter: bool = False,
) -> Location:
    """Finds a checkpoint by name, downloading it if it is on the hub and not in the local cache.

    Args:
        name: a directory, a bundled model (``"tljax-tiny"``), an alias (``"gpt2-small"``), or a hub id.
        revision: branch, tag or commit on the hub.
        token: hub token; by default ``HF_TOKEN`` or the one ``hf auth login`` stored.
        cache_dir: where downloads are kept; by default huggingface_hub's cache.
        checkpoint_value: training step of a published checkpoint (Pythia, Stanford GPT-2).
        checkpoint_index: the same, as a position in the list of published checkpoints.
        adapter: whether to download the adapter, not the weights, from a repository on the hub.

    Raises:
        CheckpointError: no such directory, name, repository or revision; no access; an interrupted download.
        InputError: a training checkpoint that does not exist, or ``revision`` for a directory.
    """
    chosen = [argument for argument in (revision, checkpoint_value, checkpoint_index) if argument is not None]
    if len(chosen) > 1:
        raise InputError("Give one of revision, checkpoint_value and checkpoint_index: each selects a revision.")
    if directory := _local(name):
        if chosen:
            raise InputError(f"{name} is a directory, which has one revision only; got {chosen[0]!r}.")
        return Location(directory, directory.resolve().name)
    repo, weights = names.hub_id(os.fspath(name)), None
    short = repo.rpartition("/")[2]
    if checkpoint_value is not None or checkpoint_index is not None:
        if repo in names.CHECKPOINTS_AS_FILES:
            weights = _training_checkpoint(repo, token, checkpoint_value, checkpoint_index)
        else:
            revision = names.checkpoint_revision(repo, checkpoint_value, checkpoint_index)
    options = {"revision": revision, "token": token, "cache_dir": cache_dir}
    if weights is not None:
        first, pickles = (CONFIG, weights, *TOKENIZER_FILES), ()
    else:
        first, pickles = (_ADAPTER, (ADAPTER_PICKLE,)) if adapter else (_SAFETENSORS, _PICKLES)
    return Location(_fetch(repo, lambda: _download(repo, first, pickles, **options), revision), short, repo, weights)


def tokenizer_directory(repo: str, *, token: str | bool | None = None, cache_dir: str | Path | None = None) -> Path:
    """Downloads the tokenizer files of ``repo``, named by a checkpoint of another one; returns their directory.

    Raises:
        CheckpointError: the download fails; the message says to pass ``tokenizer=``.
    """
    try:
        return _fetch(repo, lambda: _snapshot(repo, TOKENIZER_FILES, token=token, cache_dir=cache_dir))
    except CheckpointError as error:
        raise CheckpointError(
            f"The checkpoint names the tokenizer of {repo}. {error} To do without it pass tokenizer=, such as "
            "transformers.AutoTokenizer.from_pretrained(directory)."
        ) from error


def download(
    repo: str,
    patterns: Callable[[Sequence[str]], Sequence[str]],
    *,
    what: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """Downloads files of a repository that are not in the cache; returns the directory that mirrors the repository.

    Args:
        repo: hub id.
        patterns: returns which files, as glob patterns, given all files; ``*`` does not match a ``/``.
        what: the folder or file that is wanted, for the error if no file matches.
        revision, token, cache_dir: as for :func:`locate`.

    Raises:
        CheckpointError: no such repository, revision or files; no access; an interrupted download.
    """
    return _fetch(repo, lambda: _matching(repo, patterns, what, revision, token, cache_dir), revision)


def _matching(
    repo: str,
    patterns: Callable[[Sequence[str]], Sequence[str]],
    what: str | None,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | Path | None,
) -> Path:
    import huggingface_hub

    options = {"revision": revision, "token": token, "cache_dir": cache_dir}
    if _is_offline():
        return _snapshot(repo, patterns(()), **options)
    api = huggingface_hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
    files = api.list_repo_files(repo, revision=revision, token=token)
    chosen = patterns(files)
    wanted = [file for file in files if any(_matches(file, pattern) for pattern in chosen)]
    if not wanted:
        folders = sorted({file.rpartition("/")[0] for file in files} - {""})
        held = ", ".join((folders or sorted(files))[:12])
        raise CheckpointError(
            f"{repo} has no {what or 'such files'}: none of its {len(files)} files is one of {', '.join(chosen[:6])}."
            f"{nearest(what or '', folders + files)} It holds {held or 'nothing'}."
        )
    return _snapshot(repo, [glob.escape(file) for file in wanted], **options)


def _matches(file: str, pattern: str) -> bool:
    parts, wanted = file.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def _is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _training_checkpoint(repo: str, token: str | bool | None, value: int | None, index: int | None) -> str:
    """Returns the file of a training checkpoint in a repository that keeps them all in one revision."""
    import huggingface_hub

    api = huggingface_hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
    files = _fetch(repo, lambda: api.list_repo_files(repo, token=token))
    matches = [re.fullmatch(r"checkpoints/.*_(\d+)\.pth", file) for file in files]
    found = {int(match[1]): match[0] for match in matches if match}
    return found[names.choose_checkpoint(repo, sorted(found), value, index)]


def _local(name: str | os.PathLike[str]) -> Path | None:
    """Returns the local directory that ``name`` means, or ``None`` if it means none."""
    text, path = os.fspath(name), Path(name).expanduser()
    bare = os.sep not in text and "/" not in text
    described = (path / CONFIG).is_file() or (path / ADAPTER_CONFIG).is_file()
    if path.is_dir() and (not bare or described):  # a stray directory must not hide an alias
        return path
    if bare and (MODELS / text.lower() / CONFIG).is_file():
        return MODELS / text.lower()
    if isinstance(name, os.PathLike) or path.is_absolute() or text.startswith((".", "~")):
        raise CheckpointError(f"{text} is not a directory. A checkpoint is a directory with {CONFIG} and {SINGLE}.")
    return None


def _snapshot(repo: str, patterns: Sequence[str], **options: Any) -> Path:
    """Downloads the files of a repository that match ``patterns`` and are not in the cache."""
    import huggingface_hub

    return Path(
        huggingface_hub.snapshot_download(
            repo,
            allow_patterns=list(patterns),
            endpoint=os.environ.get("HF_ENDPOINT") or None,
            local_files_only=_is_offline(),
            **options,
        )
    )


def _download(repo: str, first: tuple[str, ...], pickles: tuple[str, ...], **options: Any) -> Path:
    """Downloads files that match ``first`` and, if no weights are among them, files that match ``pickles``."""
    directory = _snapshot(repo, first, **options)
    if pickles and not any((directory / file).exists() for file in (SINGLE, INDEX, ADAPTER)):
        directory = _snapshot(repo, first + pickles, **options)
    return directory


def _fetch(repo: str, download: Callable[[], T], revision: str | None = None) -> T:
    """Returns the result of ``download``, turning its errors into a CheckpointError that says what to do."""
    from huggingface_hub import errors

    at = f"{repo} at revision {revision!r}" if revision else repo
    try:
        return download()
    except CheckpointError:
        raise
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{at} is gated: accept its licence on its hub page, then set HF_TOKEN to that account's token."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{repo} has no revision {revision!r}.") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{at} is not on the hub, or it is private: check the spelling, or set HF_TOKEN to a token that "
            "may read it."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{at} is not (completely) in the local cache and the hub cannot be reached "
            f"({_first_line(error)}). Connect and try again, unset HF_HUB_OFFLINE, or pass a directory."
        ) from error
    except Exception as error:  # the errors of huggingface_hub's HTTP clients share no base class
        raise CheckpointError(
            f"Downloading {at} failed: {type(error).__name__}: {_first_line(error)}. "
            "Files already complete are kept: try again to continue."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
