"""The tensors of a checkpoint with quantised weights, read as the float weights that they stand for."""

import re
from collections.abc import Callable, Mapping
from typing import cast

import numpy as np

from tljax.checkpoints.files.reader import Tensors
from tljax.checkpoints.formats.quantized.codes import Codes
from tljax.checkpoints.formats.quantized.layout import Layout, Packed, Quantization
from tljax.checkpoints.formats.quantized.settings import FORMATS
from tljax.checkpoints.rows import TensorInfo
from tljax.checkpoints.slices import Index, PartTensors, reads_parts
from tljax.errors import CheckpointError, UnsupportedModelError

_SHOWN = 6
_BIAS = ".bias"


class Dequantized:
    """The tensors of a checkpoint, each quantised weight as one tensor of floats under its own name.

    Everything is checked against the headers first; a weight is dequantised when it is read.
    """

    def __init__(self, tensors: Tensors, said: Quantization, origin: str) -> None:
        self._tensors = tensors
        self._packed: dict[str, tuple[Layout, Packed]] = {}
        info, used, problems = dict[str, TensorInfo](), set[str](), list[str]()
        for key in tensors.info:
            for layout in said.layouts:
                if (base := layout.base(key, tensors.info)) is None:
                    continue
                try:
                    keys, name = layout.keys(base, tensors.info), base + layout.weight
                    packed = Packed(name, keys, tensors)
                    info[name] = TensorInfo(layout.dtype, layout.shape(packed))
                    _refuse_skipped(name, said)
                except CheckpointError as error:
                    problems.append(str(error))
                    break
                self._packed[name] = layout, packed
                used |= set(keys.values())
                break
        if problems:
            more = f" (and {len(problems) - _SHOWN} more)" if len(problems) > _SHOWN else ""
            raise CheckpointError(
                f"{origin} does not hold weights as its quant_method {said.method!r} says: "
                f"{'; '.join(problems[:_SHOWN])}{more}. Nothing was loaded. The checkpoint is damaged, or packed in "
                "another way than quantization_config says: correct that, fetch the file again, or load the "
                "full-precision original."
            )
        plain = {key: kind for key, kind in tensors.info.items() if key not in used and not key.endswith(said.unused)}
        twice = sorted(plain.keys() & info.keys())
        if twice:
            raise CheckpointError(f"{origin} stores {twice[0]} twice, quantised and as floats. Remove one of them.")
        _refuse_others(plain, said.method, origin)
        self.info = plain | info

    def read(self, key: str) -> np.ndarray:
        """Returns tensor ``key`` in its stored dtype, or dequantised."""
        if key not in self._packed:
            return self._tensors.read(key)
        layout, packed = self._packed[key]
        return layout.read(packed)

    def reads_parts(self, key: str) -> bool:
        """Whether a part of tensor ``key`` can be read alone: not of one that is packed, which is unpacked whole."""
        return key not in self._packed and reads_parts(self._tensors, [key])

    def read_part(self, key: str, index: Index) -> np.ndarray:
        """Returns ``tensor[index]`` in its stored dtype."""
        return cast(PartTensors, self._tensors).read_part(key, index)

    def has_codes(self, key: str) -> bool:
        """Whether tensor ``key`` is quantised, in a form that a model can keep."""
        return key in self._packed and self._packed[key][0].codes is not None

    def codes(self, key: str) -> Codes:
        """Returns a quantised weight as its codes."""
        layout, packed = self._packed[key]
        assert layout.codes is not None
        return layout.codes(packed)

    def modules(self) -> list[str]:
        """Returns the names of the modules whose weights are quantised."""
        return [name.removesuffix(".weight") for name in self._packed]

    def drop(self, key: str) -> None:
        """Leaves a tensor out."""
        del self.info[key]


def dequantized(tensors: Tensors, said: Quantization | None, is_known: Callable[[str], bool], origin: str) -> Tensors:
    """Returns ``tensors`` with float weights in place of quantised ones.

    A bias of zeros that a quantiser gave to a module that has none is left out.

    Args:
        tensors: the stored tensors.
        said: what config.json says of them; ``None``: nothing.
        is_known: whether a stored name is in the table of the model's family.
        origin: the checkpoint's name in errors.

    Raises:
        CheckpointError: tensors are missing, or have another dtype or shape than their format's; lists them.
        UnsupportedModelError: the tensors look quantised in another way than config.json says.
    """
    if said is None:
        _refuse_others(tensors.info, None, origin)
        return tensors
    floats = Dequantized(tensors, said, origin)
    for name in floats.modules():
        bias = name + _BIAS
        if bias in floats.info and not is_known(bias) and not floats.read(bias).any():
            floats.drop(bias)
    return floats


def _refuse_skipped(name: str, said: Quantization) -> None:
    """Raises an error if a quantised weight belongs to a module that config.json says is not quantised."""
    module = name.removesuffix(".weight")
    for skipped in said.skipped:
        if skipped.startswith("re:"):
            found = re.match(skipped.removeprefix("re:"), module)
        else:
            found = re.search(rf"(?:^|\.){re.escape(skipped).replace(re.escape('*'), '[^.]*')}(?:\.|$)", module)
        if found:
            raise CheckpointError(f"{name} is quantised, but {skipped!r} is among the modules that are not")


def _refuse_others(tensors: Mapping[str, TensorInfo], method: str | None, origin: str) -> None:
    """Raises an error if a tensor has a name that only another format has."""
    for key, kind in tensors.items():
        looks = [name for name, form in FORMATS.items() if form.mark and key.endswith(form.mark)]
        if not looks or (looks == ["mxfp4"] and kind.dtype != "U8"):
            continue
        says = "has no quantization_config" if method is None else f"says quant_method {method!r}"
        raise UnsupportedModelError(
            f"{origin} stores {key}, as {' and '.join(looks)} do, but its config.json {says}. Older quantisers wrote "
            'quantize_config.json or quant_config.json instead: put its contents, with "quant_method": '
            f'"{looks[0]}", into config.json as quantization_config; or load the full-precision original.'
        )
