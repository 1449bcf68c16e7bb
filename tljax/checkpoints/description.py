"""Reading a checkpoint's config.json: our config, and the table of the tensors that go with it."""

import dataclasses
import functools
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tljax.checkpoints import mapping
from tljax.checkpoints.families import family_of
from tljax.checkpoints.files import hub
from tljax.checkpoints.files.reader import CONFIG, Tensors
from tljax.checkpoints.files.sources import Sources
from tljax.checkpoints.formats import hosted, native, transformer_lens
from tljax.checkpoints.formats.quantized.reading import dequantized
from tljax.checkpoints.formats.quantized.settings import read_settings, without_settings
from tljax.checkpoints.layout import parameter_axes
from tljax.checkpoints.opening import Checkpoint, in_files
from tljax.checkpoints.rows import Row, TensorInfo, bind, is_bias
from tljax.checkpoints.stored_names import rename
from tljax.config import HookedTransformerConfig
from tljax.errors import CheckpointError, InputError, UnsupportedModelError, nearest
from tljax.modules.parameters import axis_sizes


@dataclasses.dataclass(frozen=True)
class Description:
    """A config, and how its parameters are stored.

    Attributes:
        cfg: our config.
        rows: the table: each stored tensor, its axes, the parameters it fills.
        prefix, ignored, computed, renamed: as in :class:`~tljax.checkpoints.family.Family`.
        checked: wraps the stored tensors: to check, as they are read, that they were saved with the config, or to
            dequantise them.
        hint: returns a sentence for the error that the stored tensors do not fit.
        tokenizer_repo: the repository with the tokenizer, if it is another one.
        quantized: the ``quant_method`` of the stored weights; ``None`` if they are floats.
    """

    cfg: HookedTransformerConfig
    rows: list[Row]
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    computed: Mapping[str, Callable[[], np.ndarray]] = dataclasses.field(default_factory=dict)
    renamed: tuple[tuple[str, str], ...] = ()
    checked: Callable[[Tensors], Tensors] = lambda tensors: tensors
    hint: Callable[[Mapping[str, TensorInfo]], str] = lambda stored: ""
    tokenizer_repo: str | None = None
    quantized: str | None = None


def describe(directory: Path, ignore: str | Sequence[str] = ()) -> Description:
    """Describes the checkpoint in a directory.

    Args:
        directory: the checkpoint's directory.
        ignore: attributes of config.json to ignore; see :func:`tljax.checkpoints.load_checkpoint`.
    """
    return describe_checkpoint(in_files(Sources(hub.Location(directory, directory.name))), ignore)


def describe_checkpoint(source: Checkpoint, ignore: str | Sequence[str] = ()) -> Description:
    """Describes a checkpoint in tljax's own, TransformerLens's or Hugging Face's format, recognised by its config.

    Args:
        source: the checkpoint.
        ignore: attributes of the config to ignore.

    Raises:
        CheckpointError: the config does not describe a model.
        UnsupportedModelError: the config describes a model that tljax does not implement.
        InputError: ``ignore`` names an attribute that is absent or cannot be ignored.
    """
    attributes, names = source.attributes, names_to_ignore(ignore)
    origin = os.path.join(source.origin, CONFIG) if source.config_name == CONFIG else f"{source.origin}.config"
    try:
        if names and (native.FORMAT in attributes or hosted.is_hosted(attributes)):
            raise InputError(f"ignore_config is about Hugging Face's config.json, which {origin} is not.")
        if native.FORMAT in attributes:
            cfg = native.read_config(attributes, origin)
            said, directory = native.read_quantized(attributes), Path(source.origin)
            paths = set(parameter_axes(cfg))

            def checked(tensors: Tensors) -> Tensors:
                whole = native.checked(tensors, directory, attributes)
                return whole if said is None else dequantized(whole, said, paths.__contains__, source.origin)

            return Description(cfg, native.rows(cfg), checked=checked, quantized=None if said is None else said.method)
        if hosted.is_hosted(attributes):
            cfg = hosted.read_config(attributes)
            table = hosted.rows(cfg, attributes, source.tensors().info)
            return of_transformer_lens(cfg, table, attributes.get("tokenizer_name"))
        family = family_of(attributes, origin)
        asked = _without(attributes, names, family.defaults, origin)
        said = read_settings(asked, origin)
        hf = family.config(without_settings(asked), origin)
        cfg = family.read_config(hf).replace(original_architecture=family.architecture, **source.stop_tokens())
        rows = list(family.rows(hf))
        hf.refuse_unread()
        computed = family.computed(cfg)
    except (CheckpointError, UnsupportedModelError, InputError):
        raise
    except (ValueError, TypeError, ArithmeticError, AttributeError, LookupError, RecursionError) as error:
        raise CheckpointError(f"{origin} does not describe a model: {error}") from error
    described = Description(cfg, rows, family.prefix, family.ignored, computed, family.renamed)
    if said is not None:
        _refuse_input_first(described, origin)
    checked = functools.partial(dequantized, said=said, is_known=_is_stored(described), origin=source.origin)
    return dataclasses.replace(described, checked=checked, quantized=None if said is None else said.method)


def _is_stored(described: Description) -> Callable[[str], bool]:
    """Returns a predicate: whether a stored name is in the table. The names are listed when it is first called."""
    table = described.rows, described.cfg, described.prefix, described.ignored
    names = functools.cache(lambda: mapping.is_stored_name(*table))
    return lambda name: names()(rename(name, described.renamed))


def _refuse_input_first(described: Description, origin: str) -> None:
    """Raises an error for a quantised model whose matrices are stored with the inputs first, as GPT-2's are.

    Quantisers turn such a matrix before they pack it, and a square one that is read the wrong way round has the right
    shape.
    """
    axes, sizes = parameter_axes(described.cfg), axis_sizes(described.cfg)
    for entry in bind((row for row in described.rows if "{l}" in row.key), 1):
        matrix = len(entry.shape(sizes)) == 2 and not is_bias(entry.targets[0])
        if matrix and entry.input_first(axes[entry.targets[0]]):
            raise UnsupportedModelError(
                f"{origin} describes quantised weights of {described.cfg.original_architecture}, which stores matrices "
                f"such as {entry.key} with their inputs first. tljax does not read them: load the full-precision "
                "original."
            )


def of_transformer_lens(
    cfg: HookedTransformerConfig, rows: list[Row], tokenizer_repo: str | None = None
) -> Description:
    """Describes a state dict of TransformerLens."""
    return Description(
        cfg,
        rows,
        ignored=transformer_lens.ignored(cfg),
        hint=functools.partial(transformer_lens.hint, cfg, rows),
        tokenizer_repo=tokenizer_repo,
    )


def names_to_ignore(ignore: Any) -> tuple[str, ...]:
    """Returns the names in ``ignore_config``.

    Raises:
        InputError: ``ignore`` is not a list of names.
    """
    names = (ignore,) if isinstance(ignore, str) else ignore
    if not isinstance(names, Collection) or not all(isinstance(name, str) for name in names):
        raise InputError(f"ignore_config={ignore!r}: expected a list of names, such as ['attribute'].")
    return tuple(names)


def _without(
    attributes: Mapping[str, Any], names: Sequence[str], needed: Collection[str], origin: str
) -> dict[str, Any]:
    """Returns ``attributes`` without ``names``; ``"a.b"`` is ``b`` in the object ``a``.

    Args:
        attributes: the attributes in config.json.
        names: the attributes to leave out.
        needed: attributes that cannot be left out, in addition to those that identify the model.
        origin: the config's name in errors.

    Raises:
        InputError: a name is absent or needed.
    """
    left = dict(attributes)
    for name in names:
        if name.rpartition(".")[2] in needed or name in ("architectures", "model_type", "text_config"):
            raise InputError(f"ignore_config names {name!r}, which says what model this is: it cannot be ignored.")
        outer, _, inner = name.partition(".")
        if name in left:
            del left[name]
        elif inner and isinstance(left.get(outer), Mapping) and inner in left[outer]:
            left[outer] = {key: value for key, value in left[outer].items() if key != inner}
        else:
            raise InputError(f"ignore_config names {name!r}, which {origin} does not have.{nearest(name, left)}")
    return left
