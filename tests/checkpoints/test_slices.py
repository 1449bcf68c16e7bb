"""A slice of a parameter, read from the parts of the stored tensors that hold it, is that slice of the whole."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_models import VARIANTS, hf_config

from tljax.checkpoints.description import describe
from tljax.checkpoints.layout import parameter_axes
from tljax.checkpoints.rows import bind
from tljax.checkpoints.slices import PartReader
from tljax.modules.parameters import axis_sizes


class Stored:
    """Tensors that count the numbers read of them."""

    def __init__(self, tensors: dict[str, np.ndarray]) -> None:
        self.tensors, self.read, self.calls = tensors, 0, 0

    def reads_parts(self, key: str) -> bool:
        return True

    def read_part(self, key: str, index: tuple[slice, ...]) -> np.ndarray:
        part = np.asarray(self.tensors[key][index])
        self.read, self.calls = self.read + part.size, self.calls + 1
        return part


def indices(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """The last half and the second quarter along each axis, and both axes of a matrix cut."""
    whole = [slice(0, n) for n in shape]
    for place, n in enumerate(shape):
        for start, stop in {(n // 2, n), (n // 4, max(n // 2, n // 4 + 1))}:
            yield (*whole[:place], slice(start, stop), *whole[place + 1 :])
    yield tuple(slice(n // 2, n) for n in shape)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_slice_is_that_slice_of_the_whole(variant: str, tmp_path: Path) -> None:
    config: Any = hf_config(variant).to_dict()
    from transformers import AutoModelForCausalLM

    kind = AutoModelForCausalLM._model_mapping[type(hf_config(variant))]
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": [kind.__name__]}, default=str))
    described = describe(tmp_path)
    sizes, axes = axis_sizes(described.cfg), parameter_axes(described.cfg)
    generator, checked = np.random.default_rng(0), 0
    for entry in bind(described.rows, 1):
        if any(target not in axes for target in entry.targets):
            continue
        tensors = {key: generator.standard_normal(entry.shape(sizes)) for key in entry.keys(sizes)}
        ours = axes[entry.targets[0]]
        for part, whole in enumerate(entry.read(lambda key, there=tensors: there[key], ours, sizes)):
            for index in indices(whole.shape):
                stored = Stored(tensors)
                got = PartReader(entry, stored, ours, sizes).read(part, index)
                np.testing.assert_array_equal(got, whole[index], err_msg=f"{entry.key} {entry.row.axes} {index}")
                checked += 1
    assert checked > 50


def test_only_what_is_needed_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(hf_config("llama_mha").to_dict() | {"architectures": ["LlamaForCausalLM"]}, default=str)
    )
    described = describe(tmp_path)
    sizes, axes = axis_sizes(described.cfg), parameter_axes(described.cfg)
    (entry,) = [one for one in bind(described.rows, 1) if one.targets == ("blocks.0.attn.W_Q",)]
    stored = Stored({entry.key: np.ones(entry.shape(sizes))})
    reader = PartReader(entry, stored, axes[entry.targets[0]], sizes)
    for head in (0, 1):
        reader.read(0, (slice(0, 32), slice(head, head + 1), slice(0, 8)))
    assert (stored.calls, stored.read) == (2, 2 * 32 * 8)
