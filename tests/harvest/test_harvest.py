"""What a store holds: each row is what a run gives at that token; windows, statistics, files, dropped tokens."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from tljax import Add, HookedTransformer
from tljax.errors import HarvestError, InputError
from tljax.harvest import ActivationStore, harvest

TEXTS = ["When John and Mary went to the store, John gave a drink to Mary. " * (n % 3 + 1) for n in range(12)]
POINTS = ["blocks.1.attn.hook_z", "blocks.2.hook_resid_pre"]
SIZE = {"context_size": 16, "batch_size": 4}


@pytest.fixture(scope="module")
def store(tiny: HookedTransformer, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """A store of three shards and all statistics."""
    directory = tmp_path_factory.mktemp("store") / "new"
    return harvest(tiny, TEXTS, POINTS, directory, **SIZE, dtype="float32", shard_bytes=30_000, covariance=True)


def test_every_row_is_what_a_run_gives(tiny: HookedTransformer, store: ActivationStore) -> None:
    assert len(store.index.shards) > 2
    windows = np.asarray(store.context)
    _, cache = tiny.run_with_cache(windows, names_filter=POINTS, return_type=None)
    for name in POINTS:
        wanted = np.asarray(cache[name]).reshape(len(windows), 16, -1)
        rows = np.asarray(store[name])
        np.testing.assert_allclose(rows, wanted[store.windows[:], store.positions[:]], rtol=0, atol=2e-6)
    np.testing.assert_array_equal(store.tokens[:], windows[store.windows[:], store.positions[:]])
    assert store.shape(POINTS[0]) == (4, 16)
    assert store.widths == {POINTS[0]: 64, POINTS[1]: 64}


def test_packed_windows_are_documents_joined(tiny: HookedTransformer, store: ActivationStore) -> None:
    bos = tiny.tokenizer.bos_token_id
    windows = np.asarray(store.context)
    assert (windows[:, 0] == bos).all()
    stream = [token for window in windows for token in window[1:]]
    rows = [tiny.to_tokens(text, prepend_bos=False)[0].tolist() for text in TEXTS]
    joined = [token for number, row in enumerate(rows) for token in ([bos] if number else []) + row]
    without = [token for token in stream if token != bos]  # a separator at a window's start is left out
    assert without == [token for token in joined if token != bos][: len(without)]
    assert not (windows[:, 1] == bos).any()
    example = store.example(-1)
    assert example.tokens[example.pos] == store.tokens[-1]
    document = tiny.to_tokens(TEXTS[example.document], prepend_bos=False)[0].tolist()
    assert int(store.tokens[-1]) in document


def test_statistics_are_those_of_the_rows(store: ActivationStore) -> None:
    for name in POINTS:
        rows, found = np.asarray(store[name]).astype(np.float64), store.statistics(name)
        norms = np.linalg.norm(rows, axis=1)
        assert found.n_tokens == len(rows)
        np.testing.assert_allclose(found.mean, rows.mean(axis=0), atol=1e-6)
        np.testing.assert_allclose(found.variance, rows.var(axis=0), atol=1e-5)
        np.testing.assert_allclose(found.covariance, np.cov(rows.T, bias=True), atol=1e-5)
        assert found.mean_squared_norm == pytest.approx((norms**2).mean(), rel=1e-6)
        assert found.mean_norm == pytest.approx(norms.mean(), rel=1e-6)
        shares = np.array([0.0, 0.1, 0.5, 0.9, 1.0])
        exact = np.quantile(norms, shares, method="inverted_cdf")
        np.testing.assert_allclose(found.norm_quantiles(shares.tolist()), exact, rtol=0.006)


def test_a_mean_far_from_zero_costs_no_precision(tiny: HookedTransformer, tmp_path: Path) -> None:
    moved = tiny.add_hook("blocks.0.hook_resid_post", Add(jnp.full(64, 3000.0)))
    found = harvest(
        moved, TEXTS, "blocks.0.hook_resid_post", tmp_path / "far", **SIZE, dtype="float32", shard_bytes=9000
    )
    rows = np.asarray(found["blocks.0.hook_resid_post"]).astype(np.float64)
    assert rows.mean() > 2900
    np.testing.assert_allclose(found.statistics().variance, rows.var(axis=0), rtol=1e-3)


def test_documents_alone_are_padded_or_dropped(tiny: HookedTransformer, tmp_path: Path) -> None:
    point, texts = "blocks.0.hook_resid_post", [TEXTS[0], "When John", TEXTS[1]]
    padded = harvest(tiny, texts, point, tmp_path / "padded", **SIZE, packed=False, dtype="float32")
    assert len(padded) < np.asarray(padded.context).size  # padding is run and not stored
    for number, text in enumerate(texts):
        ids = tiny.to_tokens(text, prepend_bos=False)[0]
        own = padded.documents[:] == number
        kept = padded.tokens[:][own]
        np.testing.assert_array_equal(kept[kept != 0], ids)
    alone = tiny.run_with_cache("When John", names_filter=point)[1][point][0]
    np.testing.assert_allclose(padded[point][padded.documents[:] == 1], alone, atol=2e-6)
    dropped = harvest(tiny, texts, point, tmp_path / "dropped", **SIZE, packed=False, short="drop")
    assert (np.asarray(dropped.context) >= 0).all()
    assert len(dropped) < len(padded)


def test_rows_of_tokens_are_run_as_they_are(tiny: HookedTransformer, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(1, tiny.cfg.d_vocab, (5, 12))
    found = harvest(tiny, jnp.asarray(rows), "blocks.0.hook_resid_pre", tmp_path, batch_size=4, dtype="float32")
    np.testing.assert_array_equal(np.asarray(found.context), rows)
    embedded = tiny(rows, stop_at_layer=0)
    np.testing.assert_allclose(found["blocks.0.hook_resid_pre"][:].reshape(5, 12, -1), embedded, atol=1e-6)


def test_files_iterators_and_lists_of_ids_are_the_same_texts(tiny: HookedTransformer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(TEXTS))
    ids = [tiny.to_tokens(text, prepend_bos=False)[0].tolist() for text in TEXTS]
    lines = [json.dumps({"body": text}) for text in TEXTS[:6]] + ["", *(json.dumps({"body": row}) for row in ids[6:])]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))

    def of(prompts: Any, **options: Any) -> np.ndarray:
        name = f"store{len(list(tmp_path.iterdir()))}"
        return np.asarray(harvest(tiny, prompts, "hook_embed", tmp_path / name, **SIZE, **options).context)

    wanted = of(TEXTS)
    np.testing.assert_array_equal(of(iter(TEXTS)), wanted)
    np.testing.assert_array_equal(of(lambda: (text for text in TEXTS)), wanted)
    np.testing.assert_array_equal(of(ids), wanted)
    np.testing.assert_array_equal(of(tmp_path / "a.txt", text_separator="<|endoftext|>"), wanted)
    np.testing.assert_array_equal(of([str(tmp_path / "b.jsonl")], field="body"), wanted)


def test_tokens_are_left_out_on_request(tiny: HookedTransformer, store: ActivationStore, tmp_path: Path) -> None:
    special = harvest(tiny, TEXTS, POINTS[1], tmp_path / "special", **SIZE, dtype="float32", skip_special=True)
    kept = store.tokens[:] != tiny.tokenizer.bos_token_id
    np.testing.assert_allclose(np.asarray(special[POINTS[1]]), store[POINTS[1]][kept], atol=1e-6)
    assert special.index.counts["special"] == (~kept).sum()
    ratio = 1.2
    large = harvest(tiny, TEXTS, POINTS[1], tmp_path / "large", **SIZE, dtype="float32", max_norm_ratio=ratio)
    norms = np.linalg.norm(store[POINTS[1]][:], axis=1)
    batches = np.split(norms, range(64, len(norms), 64))
    wanted = np.concatenate([batch <= ratio * np.median(batch) for batch in batches])
    assert 0 < large.index.counts["large_norm"] == (~wanted).sum()
    np.testing.assert_array_equal(large.tokens[:], store.tokens[:][wanted])
    assert large.statistics().n_tokens == wanted.sum()


def test_a_limit_stops_after_the_batch_that_reaches_it(tiny: HookedTransformer, tmp_path: Path) -> None:
    def endless() -> Iterator[str]:
        while True:
            yield TEXTS[0]

    found = harvest(tiny, endless(), "blocks.0.hook_resid_post", tmp_path, **SIZE, limit=100)
    assert len(found) == 128
    assert found.index.complete


def test_every_dtype_is_a_rounding_of_float32(tiny: HookedTransformer, store: ActivationStore, tmp_path: Path) -> None:
    for dtype in ("bfloat16", "float16"):
        found = harvest(tiny, TEXTS, POINTS[1], tmp_path / dtype, **SIZE, dtype=dtype)
        assert found[POINTS[1]].dtype == np.dtype(dtype)
        wanted = np.asarray(store[POINTS[1]]).astype(dtype)
        np.testing.assert_array_equal(np.asarray(found[POINTS[1]]), wanted)
        read = found.reader(8, shuffle=False)(0)
        np.testing.assert_array_equal(read, wanted[:8].astype(np.float32))


def test_a_store_knows_its_model(tiny: HookedTransformer, store: ActivationStore) -> None:
    store.check(tiny)
    other = tiny.replace(params=tiny.params | {"embed": {"W_E": tiny.params["embed"]["W_E"] + 1}})
    with pytest.raises(HarvestError, match="another model: the weights are other numbers"):
        store.check(other)


def test_what_is_damaged_is_found(tiny: HookedTransformer, tmp_path: Path) -> None:
    harvest(tiny, TEXTS, POINTS[1], tmp_path, **SIZE)
    path = tmp_path / "shard-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-50] ^= 1
    path.write_bytes(data)
    with pytest.raises(HarvestError, match=r"checksum differs"):
        ActivationStore.open(tmp_path).verify()


def test_stored_arrays_index_as_arrays_do(store: ActivationStore) -> None:
    stored, whole = store[POINTS[0]], np.asarray(store[POINTS[0]])
    assert stored.shape == whole.shape
    mask = np.arange(len(whole)) % 3 == 0
    for index in (5, -1, slice(3, 150), slice(150, 3, -7), [4, -2, 4], mask, (slice(0, 90, 2), 3), (7, slice(2, 5))):
        np.testing.assert_array_equal(stored[index], whole[index])
    np.testing.assert_array_equal(stored[np.array([[1, 2], [3, 100]])], whole[np.array([[1, 2], [3, 100]])])
    with pytest.raises(IndexError, match="out of range"):
        stored[len(whole)]


def test_hooks_of_the_model_apply(tiny: HookedTransformer, store: ActivationStore, tmp_path: Path) -> None:
    moved = tiny.add_hook(POINTS[1], Add(jnp.ones(64)))
    found = harvest(moved, TEXTS, POINTS[1], tmp_path / "moved", **SIZE, dtype="float32")
    np.testing.assert_allclose(np.asarray(found[POINTS[1]]), np.asarray(store[POINTS[1]]) + 1, atol=3e-6)
    with pytest.raises(HarvestError, match="hooks="):
        harvest(tiny, TEXTS, POINTS[1], tmp_path / "moved", **SIZE, dtype="float32")


def test_rows_ready_to_run_take_no_text_options(tiny: HookedTransformer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"rows are run as they are: prepend_bos="):
        harvest(tiny, np.ones((2, 4), int), "hook_embed", tmp_path, prepend_bos=True)
