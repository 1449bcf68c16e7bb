"""Batches: every token once an epoch, a function of the seed and the step alone, from disk and from a buffer."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tljax import HookedTransformer
from tljax.errors import HarvestError
from tljax.harvest import ActivationBuffer, ActivationStore, harvest
from tljax.harvest.permutation import permute

ROWS = np.random.default_rng(1).integers(1, 900, (50, 16)).astype(np.int32)
POINT = "blocks.0.hook_resid_post"


@pytest.fixture(scope="module")
def store(tiny: HookedTransformer, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """800 tokens at two points, in several shards."""
    points = [POINT, "blocks.0.attn.hook_z"]
    return harvest(tiny, ROWS, points, tmp_path_factory.mktemp("store"), batch_size=4, shard_bytes=40_000)


@pytest.mark.parametrize("size", [1, 2, 3, 10, 97, 1000, 4096, 10_007])
def test_a_permutation_is_one(size: int) -> None:
    found = permute(np.arange(size), size, 3, 1)
    np.testing.assert_array_equal(np.sort(found), np.arange(size))
    np.testing.assert_array_equal(permute(np.arange(size)[::2], size, 3, 1), found[::2])
    if size > 100:
        assert (found != permute(np.arange(size), size, 3, 2)).mean() > 0.9
        assert (found != permute(np.arange(size), size, 4, 1)).mean() > 0.9


def test_permutations_look_random() -> None:
    """Places, steps between neighbours, and where one index goes over seeds, are spread as chance would have it."""
    size = 100_003
    found = permute(np.arange(size), size, 0, 0)
    assert abs(np.corrcoef(np.arange(size), found)[0, 1]) < 0.02
    counts = np.histogram(np.diff(found) % size, 50, (0, size))[0]
    assert ((counts - size / 50) ** 2 / (size / 50)).sum() < 95  # chi squared, 49 degrees: 0.01 %
    goes = np.array([int(permute(np.array([7]), size, seed, 0)[0]) for seed in range(2000)])
    counts = np.histogram(goes, 20, (0, size))[0]
    assert ((counts - 100) ** 2 / 100).sum() < 48  # 19 degrees
    assert permute(np.arange(3), 10**12, 0).max() > 10**10


@pytest.mark.parametrize("block_tokens", [None, 256, 512])
def test_every_token_once_an_epoch(store: ActivationStore, block_tokens: int | None) -> None:
    reader = store.reader(30, seed=2, block_tokens=block_tokens)
    rows = np.concatenate([reader.rows(step) for step in range(3 * 27)])
    epochs = [rows[n * 800 : (n + 1) * 800] for n in range(3)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(800))
    assert (epochs[0] != epochs[1]).mean() > 0.9
    assert (reader.rows(0) != store.reader(30, seed=3, block_tokens=block_tokens).rows(0)).mean() > 0.9


def test_a_batch_depends_on_seed_and_step_alone(store: ActivationStore) -> None:
    reader, again = store.reader(64, seed=5), ActivationStore.open(store.directory).reader(64, seed=5)
    for step in (20, 3, 0):
        rows, batch = reader.rows(step), again.batch(step)
        assert list(batch) == list(store.points)
        for name, values in batch.items():
            assert values.dtype == np.float32
            np.testing.assert_array_equal(values, np.asarray(store[name]).astype(np.float32)[rows])
    one = store.reader(64, seed=5, points=POINT)
    np.testing.assert_array_equal(one(3), reader.batch(3)[POINT])
    np.testing.assert_array_equal(store.reader(8, shuffle=False).rows(1), np.arange(8, 16))
    assert len(one) == 13


def test_blocks_read_stretches(store: ActivationStore) -> None:
    reader = store.reader(256, block_tokens=256)
    rows = np.sort(reader.rows(0))
    assert (np.diff(rows) == 1).sum() >= 254  # one stretch, which may pass the end


def buffer(model: HookedTransformer, prompts: Any = ROWS, **options: Any) -> ActivationBuffer:
    given = {"batch_size": 10, "buffer_tokens": 200, "seed": 3, "windows_at_once": 4}
    return ActivationBuffer(model, prompts, POINT, **given | options)


def test_a_buffer_gives_every_token_once(tiny: HookedTransformer, store: ActivationStore) -> None:
    mixed = buffer(tiny)
    batches = [mixed(step) for step in range(160)]  # two epochs
    wanted = Counter(row.tobytes() for row in np.asarray(store[POINT]).astype(np.float32))
    assert len(wanted) > 700
    got = Counter(row.tobytes() for batch in batches[:90] for row in batch)
    assert all(got[row] >= number for row, number in wanted.items())  # a block, 10 steps, may lag behind
    got = Counter(row.tobytes() for batch in batches for row in batch)
    assert all(number <= 3 * wanted[row] for row, number in got.items())
    assert set(got) == set(wanted)


def test_a_buffer_mixes_windows(tiny: HookedTransformer, store: ActivationStore) -> None:
    number = {row.tobytes(): n for n, row in enumerate(np.asarray(store[POINT]).astype(np.float32))}
    mixed = buffer(tiny)
    places = np.array([[number[row.tobytes()] // 16 for row in mixed(step)] for step in range(40)])
    assert np.mean([len(set(batch)) for batch in places]) > 6  # of 10 tokens
    for block in range(1, 4):
        own = places[10 * block : 10 * (block + 1)]
        assert own.max() - own.min() > 8  # windows of more than half a buffer


def test_a_buffer_that_is_made_again_gives_the_same(tiny: HookedTransformer) -> None:
    first = buffer(tiny)
    batches = [first(step) for step in range(100)]
    later = buffer(tiny)
    for step in (57, 99, 3, 4, 80):
        np.testing.assert_array_equal(later(step), batches[step])
    state = json.loads(json.dumps(first.state()))
    restored = buffer(tiny)
    restored.restore(state)
    np.testing.assert_array_equal(restored(99), batches[99])
    np.testing.assert_array_equal(restored.batch(0)[POINT], batches[0])
    with pytest.raises(HarvestError, match=r"another buffer: seed=3 and 4"):
        buffer(tiny, seed=4).restore(state)
    begun = buffer(tiny)
    buffer(tiny, ROWS[::-1]).restore(begun.state())  # nothing was read
    begun(0)
    for one in (state, begun.state()):
        with pytest.raises(HarvestError, match=r"other prompts"):
            buffer(tiny, ROWS[::-1]).restore(one)


def test_a_buffer_runs_each_window_once(tiny: HookedTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    from tljax.harvest import collecting

    real, ran = collecting.run_to_points, []
    monkeypatch.setattr(collecting, "run_to_points", lambda *given: ran.append(given[2].first) or real(*given))
    mixed = buffer(tiny)
    for step in range(60):
        mixed(step)
    assert ran == sorted(ran)
    assert len(ran) == len(set(ran))
    ran.clear()
    buffer(tiny)(60)
    assert len(ran) <= 5  # one buffer, 200 tokens in batches of 64, and what overlaps


def test_a_buffer_leaves_out_special_tokens(tiny: HookedTransformer, store: ActivationStore) -> None:
    skipped = np.unique(ROWS[:, 3])
    mixed = buffer(tiny, skip_special=skipped)
    rows = {row.tobytes() for row in np.asarray(store[POINT]).astype(np.float32)[~np.isin(store.tokens[:], skipped)]}
    assert all(row.tobytes() in rows for step in range(40) for row in mixed(step))


def test_generators_go_one_way(tiny: HookedTransformer) -> None:
    texts = ["When John and Mary went to the store, John gave a drink to Mary."] * 20
    mixed = buffer(tiny, (text for text in texts), context_size=16)
    mixed(0)
    mixed(11)
    with pytest.raises(HarvestError, match="cannot go back"):
        mixed(0)
    with pytest.raises(HarvestError, match=r"ended after \d+ tokens, and an iterator cannot start again"):
        mixed(500)
    mixed = buffer(tiny, lambda: (text for text in texts), context_size=16)
    first = mixed(0)
    mixed(100)
    np.testing.assert_array_equal(mixed(0), first)


def test_files_of_a_store_are_plain_safetensors(store: ActivationStore, tmp_path: Path) -> None:
    from safetensors import safe_open

    shard = store.index.shards[0]
    with safe_open(store.directory / shard.file, framework="numpy") as file:
        assert set(store.points) < set(file.keys())
        np.testing.assert_array_equal(file.get_tensor(POINT), store[POINT][: shard.tokens])
