"""Merging LoRA adapters, as PEFT saves them, into the base's tensors while these are read.

An adapter's tensors are named after modules of the Hugging Face model, so the table of the base's family says where
each belongs, under whichever name the base stores it. The merged model computes what PEFT's model with the unmerged
adapter does: if embeddings are tied, an adapter on one of the two does not change the other.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from tljax.checkpoints.files.reader import PickleFiles, SafetensorsFiles, Tensors
from tljax.checkpoints.formats.adapter_config import ADAPTER, ADAPTER_CONFIG, ADAPTER_PICKLE, AdapterConfig
from tljax.checkpoints.formats.quantized.codes import Codes, codes_of, has_codes
from tljax.checkpoints.mapping import FLOATS, SHOWN, StoredTensor
from tljax.checkpoints.rows import TensorInfo
from tljax.checkpoints.slices import Index, PartTensors, reads_parts
from tljax.checkpoints.stored_names import rename
from tljax.errors import CheckpointError

_WRAPPERS = re.compile(r"^base_model\.model\.|^module\.|(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module)\.")
_PART = re.compile(
    r"(?P<module>.+?)\.(?:"
    r"lora_(?P<factor>[AB])(?:\.default)?\.weight|lora_embedding_(?P<of_embedding>[AB])(?:\.default)?|"
    r"(?P<bias>lora_B(?:\.default)?\.bias)|"
    r"(?P<magnitude>lora_magnitude_vector(?:\.default)?(?:\.weight)?)|"
    r"(?P<tokens>(?:token_adapter\.)?trainable_tokens_delta(?:\.default)?))"
)
_WHOLE = re.compile(r"(?P<module>.+?)(?:\.base_layer|\.modules_to_save(?:\.default)?)?\.(?P<leaf>[^.]+)")
_WRAPPED, _COPY = ".base_layer", ".original_module."
"""Parts of names: of a module inside a wrapper; of the base's own weights, which old versions of PEFT also saved."""


@dataclasses.dataclass
class _Change:
    """An adapter's change of one tensor of the base, as keys of the adapter's tensors.

    Attributes:
        place: the base's tensor.
        module: its module, as the adapter names it.
        whole: the tensor that replaces it.
        parts: ``"A"``, ``"B"`` and ``"magnitude"`` for a matrix; ``"bias"``, which is added.
        tokens: the tensor that replaces some of its rows.
    """

    place: StoredTensor
    module: str
    whole: str | None = None
    parts: dict[str, str] = dataclasses.field(default_factory=dict)
    tokens: str | None = None

    def used(self) -> list[str]:
        """Returns the keys of all tensors in this change."""
        return [key for key in (self.whole, *self.parts.values(), self.tokens) if key]


class Adapted:
    """The tensors of a base with an adapter merged into them, one at a time as they are read.

    Attributes:
        info: headers of the merged tensors.
        n_tokens: the size of the vocabulary, if the adapter replaces whole embeddings.
    """

    def __init__(
        self, base: Tensors, adapter: Tensors, config: AdapterConfig, changes: Mapping[str, _Change], embedding: str
    ) -> None:
        self._base, self._adapter, self._config, self._embedding = base, adapter, config, embedding
        self._changes = changes
        vocabularies = [change.whole for change in changes.values() if change.whole and change.place.of_vocabulary]
        rows = {adapter.info[key].shape[0] for key in vocabularies}
        self.n_tokens = rows.pop() if len(rows) == 1 else None
        self._source = {key: change.place.tied_to for key, change in changes.items() if key not in base.info}
        self.info = dict(base.info)
        for key, change in changes.items():
            stored = adapter.info[change.whole] if change.whole else base.info[self._source.get(key) or key]
            wide = "F64" in (stored.dtype, *(adapter.info[part].dtype for part in change.used()))
            self.info[key] = TensorInfo("F64" if wide else "F32", stored.shape)

    def read(self, key: str) -> np.ndarray:
        """Returns tensor ``key`` in its stored dtype; in float32 (float64 if a part is) if the adapter changes it."""
        if (change := self._changes.get(key)) is None:
            return self._base.read(key)
        dtype = np.float64 if self.info[key].dtype == "F64" else np.float32
        stored = self._adapter.read(change.whole) if change.whole else self._base.read(self._source.get(key) or key)
        parts = {name: self._adapter.read(part).astype(dtype) for name, part in change.parts.items()}
        merged = stored.astype(dtype)
        if "A" in parts:
            merged = self._with_product(merged, parts, change)
        if "bias" in parts:
            merged += self._config.scale(change.module) * parts["bias"]
        if change.tokens:
            merged[list(token_ids(self._config, change.module, self._embedding))] = self._adapter.read(change.tokens)
        return merged

    def reads_parts(self, key: str) -> bool:
        """Whether a part of tensor ``key`` can be read alone: not if the adapter changes it."""
        return key not in self._changes and reads_parts(self._base, [key])

    def read_part(self, key: str, index: Index) -> np.ndarray:
        """Returns ``tensor[index]`` in its stored dtype."""
        return cast(PartTensors, self._base).read_part(key, index)

    def has_codes(self, key: str) -> bool:
        """Whether tensor ``key`` can be read as codes: not if the adapter changes it."""
        return key not in self._changes and has_codes(self._base, [key])

    def codes(self, key: str) -> Codes:
        """Returns a quantised weight as its codes."""
        return codes_of(self._base, key)

    def _with_product(self, matrix: np.ndarray, parts: Mapping[str, np.ndarray], change: _Change) -> np.ndarray:
        """Adds the product of the factors to ``matrix``, then gives each row its length (DoRA); rows are outputs."""
        rows = np.swapaxes(matrix, -1, -2) if change.place.input_first else matrix
        scale = matrix.dtype.type(self._config.scale(change.module))
        if matrix.ndim == 3:  # one per expert: A's first axis is [expert, rank], B's last one [rank, expert]
            inward = parts["A"].reshape(len(matrix), -1, parts["A"].shape[1])
            outward = parts["B"].reshape(len(parts["B"]), -1, len(matrix))
            for expert in range(len(matrix)):
                rows[expert] += scale * (outward[..., expert] @ inward[expert])
            return matrix
        product = parts["B"] @ parts["A"]
        product *= scale
        rows += product
        if "magnitude" in parts:
            lengths = np.linalg.norm(rows, axis=1)
            if not lengths.all():
                raise CheckpointError(
                    f"{self._config.origin}: output {int(lengths.argmin())} of {change.module} is zero in base and "
                    "adapter together, so that DoRA cannot give it a length. Is this the adapter's base?"
                )
            rows *= (parts["magnitude"] / lengths)[:, None]
        return matrix


def open_adapter(directory: Path) -> Tensors:
    """Opens an adapter's tensors after reading only their headers; a pickle needs torch.

    Raises:
        CheckpointError: there are none, or their file is damaged.
        UnsupportedModelError: only a pickle, and torch is not installed.
    """
    if (directory / ADAPTER).exists():
        return SafetensorsFiles([directory / ADAPTER])
    if (directory / ADAPTER_PICKLE).exists():
        return PickleFiles([directory / ADAPTER_PICKLE])
    raise CheckpointError(
        f"{directory} has {ADAPTER_CONFIG} but neither {ADAPTER} nor {ADAPTER_PICKLE}; it holds "
        f"{sorted(entry.name for entry in directory.iterdir())[:SHOWN]}. The adapter's download or save is incomplete; "
        "adapter=False loads without it."
    )


def merged(
    base: Tensors,
    adapter: Tensors,
    config: AdapterConfig,
    places: Mapping[str, StoredTensor],
    renamed: Sequence[tuple[str, str]] = (),
) -> Adapted:
    """Returns the tensors of ``base`` with ``adapter`` merged into them.

    Args:
        base: the base's tensors.
        adapter: the adapter's.
        config: the adapter's config.
        places: where the base stores each tensor, by name, from :func:`tljax.checkpoints.mapping.stored_tensors`.
        renamed: pairs of a pattern for the start of a name in the base's files, and the start in ``places``.

    Raises:
        CheckpointError: a tensor of the adapter belongs nowhere in the base, lacks its partner, or has another shape or
            rank than the base and the adapter's config say; lists all of them.
    """
    plan = _Plan(adapter, config, places, renamed)
    plan.check(base)
    return Adapted(base, adapter, config, plan.with_tied(base), plan.embedding)


def token_ids(config: AdapterConfig, module: str, embedding: str) -> tuple[int, ...]:
    """Returns the rows of ``module`` that the adapter replaces; those given without a module are the embedding's."""
    named = (ids for name, ids in config.tokens.items() if name and f".{module}".endswith(f".{name}"))
    return next(named, config.tokens.get(None, ()) if module == embedding else ())


class _Plan:
    """The assignment of an adapter's tensors to the base's, with a record of what does not fit."""

    def __init__(
        self,
        adapter: Tensors,
        config: AdapterConfig,
        places: Mapping[str, StoredTensor],
        renamed: Sequence[tuple[str, str]],
    ) -> None:
        self._adapter, self._config, self._places, self._renamed = adapter, config, places, renamed
        self.changes: dict[str, _Change] = {}
        self._homeless: list[str] = []
        self._wrong: list[str] = []
        self.embedding = ""
        self._targeted: dict[str, list[str]] = {}  # module → its parameters that are adapted on their own
        for name in places if config.target_parameters else ():
            if config.targets(name):
                module, _, leaf = name.rpartition(".")
                self._targeted.setdefault(module, []).append(leaf)
        for key in adapter.info:
            if _COPY not in key:
                self._sort(key)

    def _sort(self, key: str) -> None:
        name = _unwrapped(key)
        if part := _PART.fullmatch(name):
            module, kind = part["module"], part["factor"] or part["of_embedding"] or str(part.lastgroup)
            change = self._change(*self._parameter(module, "bias" if kind == "bias" else "weight"))
            if change is None:
                self._homeless.append(key)
            elif kind == "tokens":
                change.tokens = key
                self.embedding = self.embedding or module
            elif change.parts.setdefault(kind, key) != key:
                self._wrong.append(f"{key} and {change.parts[kind]} are the same part of {module}")
            return
        whole = _WHOLE.fullmatch(name)
        change = self._change(whole["module"], whole["leaf"]) if whole else None
        if change is None:
            self._homeless.append(key)
        elif change.whole is None:
            change.whole = key
        elif not np.array_equal(self._adapter.read(key), self._adapter.read(change.whole), equal_nan=True):
            self._wrong.append(f"{key} and {change.whole} both replace {change.place.key}, and differ")

    def _parameter(self, module: str, leaf: str) -> tuple[str, str]:
        """Returns the module and the parameter that factors named after ``module`` belong to.

        If several parameters of one module are adapted, PEFT wraps it once for each; the last one is outermost.
        """
        bare = module
        while bare.endswith(_WRAPPED):
            bare = bare.removesuffix(_WRAPPED)
        inside = (len(module) - len(bare)) // len(_WRAPPED)
        leaves = self._targeted.get(bare, [])
        return (bare, leaves[-1 - inside]) if inside < len(leaves) else (module, leaf)

    def _change(self, module: str, leaf: str) -> _Change | None:
        name = f"{module}.{leaf}"
        if (place := self._places.get(name) or self._places.get(rename(name, self._renamed))) is None:
            return None
        return self.changes.setdefault(place.key, _Change(place, name if self._config.targets(name) else module))

    def check(self, base: Tensors) -> None:
        """Raises CheckpointError, listing all faults, if the adapter does not fit the base."""
        for change in self.changes.values():
            self._check_parts(change)
            self._check_shapes(change, base)
        info = self._adapter.info
        odd = [f"{key} ({info[key].dtype})" for key in info if info[key].dtype not in FLOATS]
        problems = {
            "without a place in the base": [f"{key} {list(info[key].shape)}" for key in self._homeless],
            "not stored as numbers that tljax reads": odd,
            "wrong": self._wrong,
            "of its modules without a tensor": self._absent(),
        }
        origin = self._config.origin
        if not info:
            raise CheckpointError(f"{origin}: the adapter holds no tensors. Its save or its download is incomplete.")
        lines = [f"  {len(all_)} {kind}: {_first(all_)}" for kind, all_ in problems.items() if all_]
        if lines:
            named = f" It says that its base is {self._config.base!r}." if self._config.base else ""
            raise CheckpointError(
                f"{origin}: the adapter does not fit this base:\n" + "\n".join(lines) + f"\nNothing was loaded.{named} "
                "Give that base, or an adapter of this one; adapter=False loads without any."
            )

    def _absent(self) -> list[str]:
        """Returns adapted modules of the config that the base has, but for which the adapter has no tensor."""
        changed = {
            name for change in self.changes.values() for name in (change.module, change.module.rpartition(".")[0])
        }
        names = [f".{name.rpartition('.')[0]}" for name in self._places]
        expected = [name for name in self._config.modules if not any(f".{own}".endswith(f".{name}") for own in changed)]
        absent = [name for name in expected if any(own.endswith(f".{name}") for own in names)]
        tokens = any(change.tokens for change in self.changes.values())
        return absent + (["trainable_token_indices"] if self._config.tokens and not tokens else [])

    def _check_parts(self, change: _Change) -> None:
        config, parts = self._config, set(change.parts)
        if parts & {"A", "B", "magnitude"}:
            expected = {"A", "B", "magnitude"} if config.use_dora else {"A", "B"}
            if parts != expected:
                self._wrong.append(f"{change.module} has {_named(parts)}, expected {_named(expected)}")
        if "bias" in parts and not config.lora_bias:
            self._wrong.append(f"{change.module} has a bias of lora_B, though lora_bias is off")
        if not change.tokens:
            return
        others = [other for other in self.changes.values() if other.place.tied_to == change.place.key]
        if change.whole or change.parts or not all(other.tokens for other in others):
            self._wrong.append(f"{change.module} has new rows of tokens, and it or what is tied to it is adapted, too")

    def _check_shapes(self, change: _Change, base: Tensors) -> None:
        info, place, module = self._adapter.info, change.place, change.module
        stored = base.info[place.key if place.key in base.info else place.tied_to or ""]
        shape = info[change.whole].shape if change.whole else stored.shape
        if shape[1 if place.of_vocabulary else 0 :] != stored.shape[1 if place.of_vocabulary else 0 :]:
            self._wrong.append(f"{change.whole} is {list(shape)}, but {place.key} is {list(stored.shape)}")
        expected: dict[str, tuple[int, ...]] = {}
        if "A" in change.parts or "B" in change.parts:
            if len(shape) not in (2, 3):
                self._wrong.append(f"{module} is adapted as a matrix, but {place.key} is {list(shape)}")
                return
            outputs, inputs = shape[-1:-3:-1] if place.input_first else shape[-2:]
            rank = self._config.rank(module) * (shape[0] if len(shape) == 3 else 1)
            expected = {"A": (rank, inputs), "B": (outputs, rank), "magnitude": (outputs,)}
        if "bias" in change.parts:
            expected["bias"] = shape
        for part, key in change.parts.items():
            if part in expected and info[key].shape != expected[part]:
                self._wrong.append(f"{key} is {list(info[key].shape)}, expected {list(expected[part])}")
        if change.tokens:
            ids = token_ids(self._config, module, self.embedding)
            if info[change.tokens].shape != (len(ids), *shape[1:]):
                self._wrong.append(
                    f"{change.tokens} is {list(info[change.tokens].shape)}, expected {[len(ids), *shape[1:]]} for the "
                    f"{len(ids)} trainable_token_indices of {module}"
                )
            if high := [each for each in ids if each >= shape[0]]:
                self._wrong.append(f"trainable_token_indices has {high[0]}, but {place.key} has {shape[0]} rows")

    def with_tied(self, base: Tensors) -> dict[str, _Change]:
        """Returns the changes, extended to tied tensors: new token rows go to both, other changes to one alone."""
        changes = dict(self.changes)
        for change in self.changes.values():  # only the tensor tied to it is stored
            if change.tokens and change.place.key not in base.info:
                source = next(place for place in self._places.values() if place.key == change.place.tied_to)
                changes.setdefault(source.key, dataclasses.replace(change, place=source))
        for place in self._places.values():
            source = self.changes.get(place.tied_to or "")
            if source is None or place.key in changes:
                continue
            if source.tokens:  # PEFT gives the new rows to the tied tensor, too
                if place.key in base.info:
                    changes[place.key] = dataclasses.replace(source, place=place)
            elif place.key not in base.info:
                changes[place.key] = _Change(place, place.key)
        return changes


def _unwrapped(key: str) -> str:
    """Returns a tensor's name without the prefixes of PEFT, compilation and parallel training."""
    while (shorter := _WRAPPERS.sub("", key)) != key:
        key = shorter
    return key


def _named(parts: Sequence[str] | set[str]) -> str:
    names = {"A": "lora_A", "B": "lora_B", "magnitude": "lora_magnitude_vector", "bias": "lora_B.bias"}
    return " and ".join(names[part] for part in sorted(parts)) or "nothing"


def _first(names: Sequence[Any]) -> str:
    rest = [f"… and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return "; ".join([*map(str, names[:SHOWN]), *rest])
