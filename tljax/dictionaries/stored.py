"""How a dictionary comes from files and goes to files."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import jax
import numpy as np

from tljax.checks import typed
from tljax.dictionaries.checking import check_dictionary
from tljax.dictionaries.fitting import fit_to
from tljax.dictionaries.folding import fold_activation_norm
from tljax.dictionaries.formats.read import Read
from tljax.dictionaries.formats.saelens_writing import write_saelens
from tljax.dictionaries.formats.table import read_kind
from tljax.dictionaries.loading import Source, find, read, warn_unscaled
from tljax.dictionaries.maths.config import DictionaryConfig
from tljax.errors import DictionaryError

if TYPE_CHECKING:
    from tljax.dictionaries.dictionary import Dictionary
    from tljax.model.hooked_transformer import HookedTransformer


class StoredDictionary:
    """The methods of :class:`~tljax.dictionaries.Dictionary` that read and write files."""

    params: Mapping[str, jax.Array]
    cfg: DictionaryConfig
    sparsity: jax.Array | None

    @classmethod
    @typed
    def from_pretrained(
        cls,
        release: str | os.PathLike[str],
        sae_id: str | None = None,
        *,
        format: str | None = None,
        model: "HookedTransformer | None" = None,
        prompt: Any = None,
        norm_scaling_factor: float | None = None,
        dtype: Any = None,
        device: Any = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
    ) -> "Dictionary":
        """Loads a published dictionary, in whatever format its files are.

        Args:
            release: a directory, which never touches the network; a release by SAELens's name
                (``"gpt2-small-res-jb"``); or a hub id (``"owner/name"``).
            sae_id: which dictionary of the release (``"blocks.8.hook_resid_pre"``), or the folder or file within the
                directory or repository.
            format: the format, if the files could mean several: see :func:`tljax.dictionaries.formats`.
            model: the model that it is for: the dictionary is converted to it, or refused, by
                :func:`~tljax.dictionaries.fit_to`.
            prompt: with ``model``, texts or tokens on which the dictionary must explain its site: see
                :func:`~tljax.dictionaries.check_dictionary`.
            norm_scaling_factor: the number by which activations were multiplied in training, where neither the files
                nor the release say it (``normalize_activations="expected_average_only_in"``).
            dtype: of the parameters; by default the one that the files name.
            device: a JAX device or sharding to put them on.
            revision: branch, tag or commit on the hub.
            token: hub token; by default ``HF_TOKEN`` or the one ``hf auth login`` stored.
            cache_dir: where downloads are kept; by default huggingface_hub's cache.

        Raises:
            DictionaryError: there is no such dictionary, its files are of no known format or damaged, it does not fit
                the model, or it does not explain the prompt.
            CheckpointError: a download fails, or a file cannot be read.
        """
        if prompt is not None and model is None:
            raise DictionaryError("prompt= is what a model is run on to check the dictionary: pass model= too.")
        source = find(release, sae_id, format=format, revision=revision, token=token, cache_dir=cache_dir)
        dictionary = _scaled(cls._of(read(source, dtype=dtype)), norm_scaling_factor, source)
        dictionary = dictionary if device is None else jax.device_put(dictionary, device)
        if model is None:
            return dictionary
        dictionary = fit_to(dictionary, model)
        if prompt is not None:
            check_dictionary(dictionary, model, prompt)
        return dictionary

    @classmethod
    @typed
    def load(
        cls,
        directory: str | os.PathLike[str],
        *,
        format: str | None = None,
        dtype: Any = None,
        training: bool = False,
    ) -> "Dictionary":
        """Loads a dictionary from a directory or file, in whatever format it is.

        Args:
            directory: where it is.
            format: the format, if the files could mean several.
            dtype: of the parameters; by default the one that the files name.
            training: whether a BatchTopK or Matryoshka training checkpoint of SAELens's is read as what trains: it
                selects features over the batch. By default it is read as what SAELens saves for inference, a
                ``jumprelu`` dictionary with decoder norms folded.

        Raises:
            DictionaryError: there is no such directory, or it holds no dictionary of a known format.
            CheckpointError: a file cannot be read.
        """
        return cls._of(read(find(Path(directory), format=format), dtype=dtype, training=training))

    @typed
    def save(self, directory: str | os.PathLike[str]) -> None:
        """Saves the dictionary as SAELens 6 does: ``cfg.json``, ``sae_weights.safetensors``, ``sparsity.safetensors``.

        The files appear together or not at all. :meth:`load` gives the same dictionary, bit for bit.

        Raises:
            DictionaryError: SAELens has no such dictionary.
        """
        arrays = {name: np.asarray(jax.device_get(array)) for name, array in self.params.items()}
        sparsity = None if self.sparsity is None else np.asarray(jax.device_get(self.sparsity))
        write_saelens(Path(directory), arrays, self.cfg, sparsity)

    @classmethod
    def _of(cls, found: Read) -> "Dictionary":
        return cls(found.params, found.cfg, found.sparsity)  # type: ignore[call-arg]


class StoredSet:
    """The methods that read files of crosscoders and of cross-layer transcoders."""

    _holds: ClassVar[str]
    """What the files must make, as :attr:`tljax.dictionaries.formats.read.Format.holds` says it."""

    @classmethod
    @typed
    def from_pretrained(
        cls,
        release: str | os.PathLike[str],
        sae_id: str | None = None,
        *,
        format: str | None = None,
        dtype: Any = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
    ) -> Self:
        """Reads a published one, in any known format.

        Args:
            release: a directory, which never touches the network, or a hub id.
            sae_id: the folder or file within it.
            format, dtype, revision, token, cache_dir: as in :meth:`tljax.dictionaries.Dictionary.from_pretrained`.

        Raises:
            DictionaryError: there is none, or its files are damaged or hold something else.
            CheckpointError: a download fails.
        """
        source = find(release, sae_id, format=format, revision=revision, token=token, cache_dir=cache_dir)
        return cls._of(read(source, holds=cls._holds, dtype=dtype))

    @classmethod
    def load(cls, directory: str | os.PathLike[str], **facts: Any) -> Self:
        """Reads one from a directory, in any known format (:mod:`tljax.dictionaries.formats`).

        Args:
            directory: the directory, or the file of one where a directory holds several.
            **facts: what the files do not say, as in :class:`tljax.dictionaries.formats.read.Format`.

        Raises:
            DictionaryError: the files are damaged, or hold something else.
        """
        return cls._of(read_kind(Path(directory), cls._holds, **facts))

    @classmethod
    def _of(cls, found: Read) -> Self:
        return cls(found.params, found.cfg)  # type: ignore[call-arg]


def _scaled(dictionary: "Dictionary", scale: float | None, source: Source) -> "Dictionary":
    """Returns the dictionary for raw activations, where the scale that it was trained under is known."""
    mode = dictionary.cfg.normalize_activations
    if mode == "expected_average_only_in":
        known = source.facts.get("norm_scaling_factor") if scale is None else scale
        if known is not None:
            return fold_activation_norm(dictionary, known)
        if source.repo is not None:
            warn_unscaled(source.repo)
    elif scale is not None:
        raise DictionaryError(
            f'norm_scaling_factor={scale} has no use here: it goes with normalize_activations="expected_average_only_in'
            f'", and this dictionary has "{mode}".'
        )
    return dictionary
