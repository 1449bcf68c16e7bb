"""Codes are what the dictionary encodes, and say where a feature is active without the model; estimates are right."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from tljax import HookedTransformer
from tljax.dictionaries import Dictionary, DictionaryConfig, Tap
from tljax.errors import DictionaryError, HarvestError
from tljax.harvest import CodeStore, estimate_harvest, harvest, harvest_codes

ROWS = np.random.default_rng(2).integers(1, 900, (10, 16)).astype(np.int32)
POINT, K = "blocks.1.attn.hook_z", 12


def random_dictionary(seed: int = 0, **fields: object) -> Dictionary:
    draw = np.random.default_rng(seed).normal
    params = {
        "W_enc": draw(size=(64, 96)),
        "b_enc": draw(size=96) - 16,
        "W_dec": draw(size=(96, 64)),
        "b_dec": draw(size=64),
    }
    cfg = DictionaryConfig(d_in=64, d_sae=96, tap=Tap(reads=POINT, merged_heads=True), **fields)  # type: ignore[arg-type]
    return Dictionary({name: jnp.asarray(value, jnp.float32) for name, value in params.items()}, cfg)


@pytest.fixture(scope="module")
def codes(tiny: HookedTransformer, tmp_path_factory: pytest.TempPathFactory) -> CodeStore:
    """Codes of 160 tokens in three shards."""
    directory = tmp_path_factory.mktemp("codes")
    return harvest_codes(tiny, random_dictionary(), ROWS, directory, k=K, batch_size=4, shard_bytes=1)


@pytest.fixture(scope="module")
def exact(tiny: HookedTransformer) -> np.ndarray:
    """All features of all tokens, ``[token, feature]``."""
    _, cache = tiny.run_with_cache(ROWS, names_filter=POINT, return_type=None)
    return np.asarray(random_dictionary().encode(cache[POINT])).reshape(160, 96)


def test_codes_are_the_strongest_features(codes: CodeStore, exact: np.ndarray) -> None:
    assert len(codes.index.shards) == 3
    assert codes.features.dtype == np.uint16
    np.testing.assert_array_equal(codes.tokens[:], ROWS.reshape(-1))
    values = np.asarray(codes.values).astype(np.float32)
    np.testing.assert_allclose(values, -np.sort(-exact, axis=1)[:, :K], rtol=0.01, atol=1e-5)
    read = np.take_along_axis(exact, np.asarray(codes.features).astype(int), axis=1)
    np.testing.assert_allclose(values, read, rtol=0.01, atol=1e-5)


def test_counts_are_of_all_features(codes: CodeStore, exact: np.ndarray) -> None:
    np.testing.assert_allclose(codes.density, (exact > 0).mean(axis=0), atol=1e-9)
    np.testing.assert_allclose(codes.mean, exact.mean(axis=0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(codes.largest, exact.max(axis=0), rtol=1e-4, atol=1e-5)
    assert codes.share_cut == pytest.approx(((exact > 0).sum(axis=1) > K).mean())
    assert 0 < codes.share_cut < 1


def test_where_a_feature_is_active(codes: CodeStore, exact: np.ndarray) -> None:
    kept = np.argsort(-exact, axis=1)[:, :K]
    found = codes.of([3, 40, -1])
    assert set(found) == {3, 40, 95}
    for feature, (rows, values) in found.items():
        wanted = np.flatnonzero((kept == feature).any(axis=1) & (exact[:, feature] > 0))
        np.testing.assert_array_equal(rows, wanted)
        np.testing.assert_allclose(values, exact[wanted, feature], rtol=0.01)
    np.testing.assert_array_equal(codes.of(40).rows, found[40].rows)
    busiest = int(codes.density.argmax())
    row = int(codes.of(busiest).rows[0])
    assert codes.example(row).tokens[codes.example(row).pos] == ROWS.reshape(-1)[row]


def test_codes_of_another_dictionary_are_refused(tiny: HookedTransformer, codes: CodeStore) -> None:
    codes.check_dictionary(random_dictionary())
    with pytest.raises(HarvestError, match="codes of another dictionary: weights="):
        codes.check_dictionary(random_dictionary(1))
    with pytest.raises(HarvestError, match="dictionary: weights="):
        harvest_codes(tiny, random_dictionary(1), ROWS, codes.directory, k=K, batch_size=4, shard_bytes=1)
    with pytest.raises(
        DictionaryError, match=r"does not fit hook_embed|does not fit blocks.0.mlp.hook_post \(256 wide\)"
    ):
        harvest_codes(tiny, random_dictionary(), ROWS, codes.directory / "x", point="blocks.0.mlp.hook_post")


def test_an_estimate_is_what_it_takes(tiny: HookedTransformer, tmp_path: Path) -> None:
    points = ["blocks.0.hook_resid_post", POINT]
    estimate = estimate_harvest(tiny, ROWS.size, points, directory=tmp_path / "new", batch_size=2, context_size=16)
    store = harvest(tiny, ROWS, points, tmp_path / "new", batch_size=2)
    beside = 100_000  # sums of a shard, and the index
    assert 0 <= sum(path.stat().st_size for path in store.directory.iterdir()) - estimate.bytes < 2 * beside
    assert estimate.bytes == ROWS.size * (2 * 2 * 64 + 20)
    assert estimate.tokens_per_second is not None
    assert estimate.seconds == pytest.approx(ROWS.size / estimate.tokens_per_second)
    assert estimate.fits
    assert "160 tokens: 0.00 GB in 1 shards" in str(estimate)
    assert estimate_harvest(tiny, 10**12, points, timed=False).fits is False


def test_features_of_a_spliced_model_are_points(tiny: HookedTransformer, exact: np.ndarray, tmp_path: Path) -> None:
    spliced = tiny.with_dictionaries({POINT: random_dictionary()})
    name = f"{POINT}.hook_sae_acts_post"
    store = harvest(spliced, ROWS, [POINT, name], tmp_path, batch_size=4, dtype="float32")
    np.testing.assert_allclose(store[name][:], exact, rtol=1e-4, atol=1e-4)
    store.check(spliced)
    assert len(harvest(spliced, ROWS, [POINT, name], tmp_path, batch_size=4, dtype="float32")) == len(store)
    with pytest.raises(HarvestError, match="splices="):
        store.check(tiny)
