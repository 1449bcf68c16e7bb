"""tljax's own files: all dtypes come back, other readers can read them, a failed write leaves what was there."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from tljax.errors import CacheError, CheckpointError
from tljax.safetensors_files import read_own, write_own

ARRAYS = {
    "mask": jnp.array([True, False, True]),
    "narrow": jnp.arange(5, dtype=jnp.bfloat16),
    "scalar": jnp.float32(3),
    "empty": jnp.zeros((0, 4)),
    "bytes": np.arange(3, dtype=np.int8),
    "keys": np.arange(3, dtype=np.uint32),
    "turned": np.arange(6, dtype=np.int32).reshape(2, 3).T,
}
HEADER = {"numbers": [1, 2.5, None], "named": {"a": True}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "new folder" / "own.safetensors"
    write_own(path, "tljax-test-1", ARRAYS, **HEADER)
    return path


def test_everything_comes_back(path: Path) -> None:
    arrays, header = read_own(path, "tljax-test-1", "a test")
    assert header == HEADER
    assert arrays.keys() == ARRAYS.keys()
    for name, expected in ARRAYS.items():
        assert arrays[name].dtype == expected.dtype
        np.testing.assert_array_equal(arrays[name], expected)


def test_other_readers_read_it(path: Path) -> None:
    from safetensors.torch import load_file

    for name, tensor in load_file(path).items():
        np.testing.assert_array_equal(tensor.double().numpy(), np.asarray(ARRAYS[name], np.float64))


def test_a_failed_write_leaves_what_was_there(path: Path) -> None:
    before, gone = path.read_bytes(), jnp.zeros(3, jnp.int8)
    gone.delete()
    with pytest.raises(TypeError, match="JSON"):
        write_own(path, "tljax-test-1", ARRAYS, header=object())
    with pytest.raises(RuntimeError, match="deleted"):  # halfway
        write_own(path, "tljax-test-1", ARRAYS | {"gone": gone})
    assert path.read_bytes() == before
    assert [other.name for other in path.parent.iterdir()] == [path.name]


def test_files_that_are_something_else(path: Path) -> None:
    with pytest.raises(CacheError, match="does not hold a cache"):
        read_own(path, "tljax-cache-1", "a cache", error=CacheError)
    with pytest.raises(CheckpointError, match="There is no file"):
        read_own(path.with_name("none"), "tljax-test-1", "a test")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"damaged or incomplete .*Write it again\.$"):
        read_own(path, "tljax-test-1", "a test", "Write it again.")
