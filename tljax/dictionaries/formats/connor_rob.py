"""Attention autoencoders by Kissane and Krzyzanowski: ``NAME.pt`` with ``NAME_cfg.json`` (GPT-2 small, ``hook_z``)."""

from pathlib import Path
from typing import Any

from tljax.dictionaries.formats.points import tap_of
from tljax.dictionaries.formats.read import Format, Read
from tljax.dictionaries.formats.tensors import (
    expect_sizes,
    has_keys,
    metadata_of,
    open_pickle,
    read_config,
    read_rows,
)
from tljax.dictionaries.maths.config import DictionaryConfig
from tljax.errors import DictionaryError

ROWS = {
    "W_enc": [("W_enc", "d_in d_sae")],
    "W_dec": [("W_dec", "d_sae d_out")],
    "b_enc": [("b_enc", "d_sae")],
    "b_dec": [("b_dec", "d_out")],
}


def read(path: Path, **facts: Any) -> Read:
    """Reads ``NAME.pt``, or the directory that holds it and its config.

    Raises:
        DictionaryError: a file is missing or damaged, or config and arrays disagree.
        UnsupportedModelError: torch is not installed.
    """
    file = path if path.is_file() else pickle_with_config(path, "act_size")
    if file is None:
        raise DictionaryError(f"{path} holds no NAME.pt with a NAME_cfg.json that says act_size, or several.")
    config = read_config(config_of(file), facts)
    stored, _ = open_pickle(file)
    params = read_rows(stored, ROWS)
    stored.finish()
    d_in, d_sae = params["W_enc"].shape
    expect_sizes(file, act_size=(config.get("act_size"), d_in), dict_size=(config.get("dict_size"), d_sae))
    tap = tap_of(
        config.get("act_name"), facts=facts, model_name=config.get("model_name", "gpt2-small"), processing=None
    )
    cfg = DictionaryConfig(d_in=d_in, d_sae=d_sae, tap=tap, metadata=metadata_of(config))
    return Read(params, cfg)


def config_of(file: Path) -> Path:
    """Returns the path of the config that belongs to ``NAME.pt``: ``NAME_cfg.json``."""
    return file.with_name(f"{file.stem}_cfg.json")


def pickle_with_config(directory: Path, key: str, lacks: str = "") -> Path | None:
    """Returns the one ``NAME.pt`` whose ``NAME_cfg.json`` has an entry ``key`` and none named ``lacks``."""
    if not directory.is_dir():
        return None
    files = [file for file in sorted(directory.glob("*.pt")) if is_with_config(file, key, lacks)]
    return files[0] if len(files) == 1 else None


def is_with_config(file: Path, key: str, lacks: str = "") -> bool:
    """Whether a file is such a ``NAME.pt``; never fails."""
    config = config_of(file)
    return file.suffix == ".pt" and has_keys(config, key) and not (lacks and has_keys(config, lacks))


def beside(sae_id: str | None) -> tuple[str, ...]:
    """Returns the files of a repository that ``NAME.pt`` needs."""
    return (sae_id, f"{sae_id.removesuffix('.pt')}_cfg.json") if sae_id else ("*.pt", "*_cfg.json")


FORMAT = Format(
    name="connor_rob",
    looks_for="NAME.pt and NAME_cfg.json with act_size",
    detects=lambda path: (
        is_with_config(path, "act_size") if path.is_file() else bool(pickle_with_config(path, "act_size"))
    ),
    reads=read,
    files=beside,
)
