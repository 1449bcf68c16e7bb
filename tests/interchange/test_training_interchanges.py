"""Interchanges trained at every site: known variables are found, and the arithmetic is that of hooks and autodiff."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from variants import build

from tljax import HookedTransformer, HookedTransformerConfig
from tljax.interchange import Interchange, InterchangePairs, fit_das, score_interchange, train_interchange
from tljax.interchange.fitting import Fit
from tljax.interchange.programs import Subspace, take
from tljax.interchange.settings import Settings
from tljax.interchange.sites import point_of
from tljax.interchange.training import _gradient
from tljax.text.positions import find

GOLDENS = Path(__file__).parents[2].parent / "shared" / "goldens" / "circuits" / "gpt2_a"
WIDTH, CLASSES = 16, (1, 2)


@pytest.fixture(scope="module")
def bits() -> tuple[HookedTransformer, np.ndarray]:
    """A linear model that answers a bit of the last token: the first bit by tokens 1 and 2, the second by 3 and 4.

    A token spells both bits, one of eight variants, and which bit is asked; each has directions of its own. Returns the
    model and the directions of the bits ``[2, d_model]``.
    """
    cfg = HookedTransformerConfig(
        d_model=WIDTH, n_layers=2, n_heads=2, n_ctx=6, d_vocab=64, act_fn="relu", normalization_type=None,
        init_weights=False,
    )  # fmt: skip
    model, rng = HookedTransformer(cfg), np.random.default_rng(0)
    axes = np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))[0].T
    token = np.arange(64)
    first, second = 2.0 * (token & 1) - 1, 2.0 * (token >> 1 & 1) - 1
    asked = 1.0 - 2 * (token >> 5)
    embedding = first[:, None] * axes[0] + 2 * second[:, None] * axes[1] + asked[:, None] * axes[8]
    embedding += rng.standard_normal((8, 6))[token >> 2 & 7] @ axes[2:8]
    unembedding = np.zeros((WIDTH, 64))
    for number, (bit, sign) in enumerate([(0, 1), (0, -1), (1, 1), (1, -1)]):
        unembedding[:, number + 1] = sign * 3 * axes[bit] + (6 if bit == 0 else -6) * axes[8]
    params = jax.tree.map(np.asarray, model.params)
    params["embed"]["W_E"], params["unembed"]["W_U"] = embedding.astype(np.float32), unembedding.astype(np.float32)
    return model.replace(params=params), axes[:2]


def pairs_of_bits(
    model: HookedTransformer, count: int = 192, seed: int = 0, answers: Any = CLASSES
) -> InterchangePairs:
    rng = np.random.default_rng(seed)
    base, source = rng.integers(0, 32, (2, count, 3))
    return InterchangePairs.of(model, base, source, 1 - (source[:, -1] & 1), task_logits=list(answers),
                               keys=[str(one) for one in source[:, -1]])  # fmt: skip


def test_a_known_direction_is_found(bits: Any) -> None:
    model, (direction, _) = bits
    train, test = pairs_of_bits(model).split(0.6)
    found = train_interchange(model, train, pos=[0, -1], seeds=[0, 1], test=test, batch_size=32, epochs=12)
    assert found.scores.axis_names == ("metric", "layer", "pos", "seed")
    scores = {name: np.asarray(found.scores[name].values) for name in found.scores.metric_names}
    assert (scores["IIA"][:, 1] == 1).all()
    assert (scores["full swap"][:, 1] == 1).all()
    assert np.abs(scores["IIA"][:, 0] - found.unpatched).max() == 0  # nothing reads position 0
    for name in ("placebo", "random model", "arbitrary labels"):
        assert scores[name][:, 1].mean() < 0.8, name
    assert scores["placebo"][:, 1].mean() == pytest.approx(0.5, abs=0.15)
    basis = found.basis(layer=1, pos=-1, seed=1)
    assert abs(direction @ basis[:, 0]) > 0.97
    flat = found.columns.reshape(-1, WIDTH, 1)
    np.testing.assert_allclose(np.swapaxes(flat, 1, 2) @ flat, 1, atol=1e-5)
    shown = repr(found)
    assert all(name in shown for name in (*scores, "unpatched", "chance"))
    assert found.plot() is not None


def test_training_at_once_is_training_one_by_one(bits: Any) -> None:
    model, _ = bits
    pairs = pairs_of_bits(model, 40)
    every: dict[str, Any] = {"epochs": 3, "batch_size": 16, "controls": ()}
    whole = train_interchange(model, pairs, pos=[1, 2], seeds=[3, 4], rank=[1, 2], **every)
    chunked = train_interchange(model, pairs, pos=[1, 2], seeds=[3, 4], rank=[1, 2], max_sites=3, **every)
    np.testing.assert_allclose(chunked.losses, whole.losses, atol=1e-5)
    tokens = np.asarray(pairs.base.tokens), np.asarray(pairs.source.tokens)
    for rank, micro in ((1, None), (2, 5)):
        one = fit_das(
            model, "blocks.1.hook_resid_post", *tokens, pairs.targets, list(CLASSES), rank=rank, base_positions=2,
            source_positions=2, seed=4, micro_batch_size=micro, **every,
        )  # fmt: skip
        at = {"layer": 1, "pos": 2, "rank": rank, "seed": 4}
        mine = whole.basis(**at)
        np.testing.assert_allclose(one.subspace @ one.subspace.T, mine @ mine.T, atol=1e-4)
        np.testing.assert_allclose(one.losses, whole.losses[:, 1, 1, rank - 1, 1], atol=1e-5)
        assert one.iia == pytest.approx(whole.at(**at)["IIA"], abs=1e-6)


def test_layers_positions_and_seeds_compile_nothing(bits: Any, compilations: Any) -> None:
    model, _ = bits
    pairs = pairs_of_bits(model, 24)
    options: dict[str, Any] = {"epochs": 2, "batch_size": 8, "controls": ("placebo", "labels")}
    train_interchange(model, pairs, "resid_pre", layers=[0, 1], pos=[0, 1], seeds=[0], **options)
    before = compilations.count
    train_interchange(model, pairs, "resid_pre", layers=[1], pos=[1, 2], seeds=[5], lr=3e-2, strength=0.5, **options)
    train_interchange(model, pairs, "resid_pre", layers=[0], pos=[2, 0], seeds=[6], **options)
    assert compilations.count == before


def test_boundless_shrinks_to_the_dimension(bits: Any) -> None:
    model, (direction, _) = bits
    found = train_interchange(
        model, pairs_of_bits(model), method="boundless", layers=[1], pos=-1, epochs=60, batch_size=48, controls=(),
        lr={"free": 1e-2, "boundary": 2e-2},
    )  # fmt: skip
    assert found.at()["IIA"] == 1
    assert found.n_open.item() <= 3
    basis = found.basis()
    assert np.linalg.norm(direction @ basis) > 0.9
    assert np.abs(basis.T @ basis - np.eye(basis.shape[1])).max() < 1e-5


def test_a_mask_opens_the_right_coordinates(bits: Any) -> None:
    """With the true axes as coordinates, the mask opens that of the bit and closes the ones that lead astray."""
    model, axes = bits
    columns = np.linalg.qr(np.concatenate([axes.T, np.eye(WIDTH)[:, : WIDTH - 2]], axis=1))[0]
    found = train_interchange(
        model, pairs_of_bits(model), method="dbm", featurizer=columns, layers=[1], pos=-1, epochs=60, lr=5e-2,
        batch_size=48, penalty=0.05, controls=(),
    )  # fmt: skip
    assert found.at()["IIA"] == 1
    assert np.abs(axes[0] @ found.basis()).max() > 0.99
    assert found.n_open.item() <= 3
    tied = train_interchange(
        model, pairs_of_bits(model), method="dbm", tie_masks=True, layers=[1], pos=-1, epochs=20, lr=5e-2, controls=(),
        batch_size=48,
    )  # fmt: skip
    assert tied.n_open.item() == WIDTH


def test_mdas_leaves_the_other_variable_alone(bits: Any) -> None:
    """Of 12 dimensions of 16, most spaces hold both bits; MDAS finds one that holds the first alone."""
    model, _ = bits
    rng = np.random.default_rng(3)
    base, source = rng.integers(0, 32, (2, 192, 3))
    cause = InterchangePairs.of(model, base, source, 1 - (source[:, -1] & 1), task_logits=[1, 2, 3, 4])
    asked = base + np.asarray([0, 0, 32])
    kept = InterchangePairs.of(model, asked, source, 3 - (base[:, -1] >> 1 & 1), task_logits=[1, 2, 3, 4])
    options: dict[str, Any] = {"iso": kept, "layers": [1], "pos": -1, "batch_size": 64, "rank": 12, "controls": ()}
    alone = train_interchange(model, cause, epochs=8, **options).at()
    both = train_interchange(model, cause, method="mdas", epochs=25, lr=3e-2, **options).at()
    assert list(both) == ["IIA", "full swap", "iso", "disentangle"]
    assert both["disentangle"] == pytest.approx((both["IIA"] + both["iso"]) / 2)
    assert min(alone["IIA"], both["IIA"], both["iso"]) > 0.95
    assert alone["iso"] < 0.85


@pytest.mark.parametrize("method", ["full", "mean_difference", "probe", "pca", "neuron", "random_neuron", "random"])
def test_untrained_subspaces(bits: Any, method: str) -> None:
    model, (direction, _) = bits
    rank = None if method == "full" else 2
    found = train_interchange(model, pairs_of_bits(model), method=method, rank=rank, layers=[1], pos=-1, controls=())
    assert len(found.losses) == 0
    iia, basis = found.at()["IIA"], found.basis()
    np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-5)
    if method in ("full", "mean_difference", "probe"):
        assert iia > 0.8
    if method in ("mean_difference", "probe"):
        assert basis.shape[1] == 1  # two classes differ in one direction
        assert abs(direction @ basis[:, 0]) > 0.85
    if method.startswith("random"):
        assert iia < 0.9


CASES = [
    ("gpt2", "z", "left"),
    ("llama", "resid_mid", "right"),
    ("sandwich", "mlp_out", "right"),
    ("neox", "k", "left"),
]


@pytest.mark.parametrize(("kind", "name", "side"), CASES)
def test_scores_and_gradients_are_those_of_hooks(kind: str, name: str, side: Any) -> None:
    """Prompts of several lengths, other lengths in the source, positions of their own: against a run with the hook."""
    model, rng = build(kind, n_layers=3), np.random.default_rng(0)
    lengths, theirs = (4, 6, 5, 6), (7, 5, 6, 8)
    base = model.to_batch([rng.integers(0, 13, n) for n in lengths], padding_side=side)
    source = model.to_batch([rng.integers(0, 13, n) for n in theirs], padding_side=side)
    here, there = np.asarray([1, 2, -1, 3]), np.asarray([0, 4, 2, -2])
    targets = np.asarray([0, 2, 1, 2])
    pairs = InterchangePairs.of(
        model, base, source, targets, task_logits=[3, 5, 8], pos={"own": here}, source_pos={"own": there}
    )
    point = point_of(model, name, [1])
    heads = None if point.n_heads is None else (1,)
    basis = np.linalg.qr(rng.standard_normal((point.width, 2)))[0].astype(np.float32)
    found = score_interchange(
        model, pairs, point.name(1), basis, pos="own", head=None if heads is None else 1, strength=0.7
    )

    cache = model.run_with_cache(source, names_filter=point.name(1))[1]
    rows = np.arange(4)
    vectors = cache[point.name(1)][rows, find(np.asarray(source.mask), there[:, None])[0][:, 0]][:, None]
    entries = find(np.asarray(base.mask), here[:, None])[0]
    mask = (np.arange(base.shape[1])[None] == entries).reshape(4, -1, *(1,) * (vectors.ndim - 2))
    at = {} if heads is None else {"head": 1}
    last = find(np.asarray(base.mask), np.full((4, 1), -1))[0][:, 0]

    def logits_of(columns: Any) -> jax.Array:
        hook = (point.name(1), Interchange(vectors, columns, 0.7, mask=mask, **at))
        return model.run_with_hooks(base, fwd_hooks=[hook])[rows, last][:, np.asarray([3, 5, 8])]

    right = logits_of(basis)
    np.testing.assert_allclose(found.logits, right, atol=2e-5)
    assert found.iia == pytest.approx(float((np.asarray(right).argmax(-1) == targets).mean()))

    def loss(free: Any) -> jax.Array:
        log_probs = jax.nn.log_softmax(logits_of(jnp.linalg.qr(free)[0]))
        return -log_probs[rows, targets].sum()

    settings = Settings(
        method="das", ranks=(2,), seeds=(0,), heads=heads, pos="own", source_pos=None, pairs_at_once=4, strength=0.7
    )
    fit = Fit(model, pairs, point, settings)
    (at_layer,) = fit.layers()
    learned, fixed = {"free": 0.5 * basis[None]}, Subspace(None, np.ones((1, 2), np.float32))
    part = take(fit.plan, at_layer, fit.sites, rows[None].astype(np.int32))
    _, gradient = _gradient(
        fit.plan, fit.method, model, fit.ends, 1, part, learned, fixed, np.float32(0), np.float32(0.7)
    )  # fmt: skip
    wanted = jax.grad(loss)(0.5 * jnp.asarray(basis))
    np.testing.assert_allclose(gradient["free"][0], wanted, atol=2e-4 * np.abs(wanted).max())


def test_sources_from_a_cache_and_a_function_of_logits() -> None:
    model, rng = build("gpt2", n_layers=3), np.random.default_rng(0)
    base, source = rng.integers(0, 13, (2, 6, 5))
    targets = rng.integers(0, 13, 6)
    cache = model.run_with_cache(source)[1]
    first = InterchangePairs.of(model, base, source, targets)
    second = InterchangePairs.of(model, base, cache, targets, task_logits=lambda logits: logits[:, -1])
    one, two = (score_interchange(model, pairs, "resid_post1") for pairs in (first, second))
    np.testing.assert_allclose(one.logits, two.logits, atol=1e-5)
    np.testing.assert_allclose(
        two.logits,
        model.run_with_hooks(
            base, fwd_hooks=[("resid_post1", Interchange(cache["resid_post", 1], np.eye(16), pos=-1))]
        )[:, -1],
        atol=1e-5,
    )
    found = train_interchange(model, second, layers=[1], pos=-1, epochs=1)
    assert "random_model not run: the sources are a cache" in repr(found)
    assert dataclasses.replace(second, targets=targets).n_classes is None


@pytest.mark.skipif(not GOLDENS.exists(), reason="the goldens of TransformerLens 4.3 are not in this checkout")
def test_goldens_of_transformerlens() -> None:
    """Its bases give its logits; and from several starts our final loss is not above its own."""
    import json

    model = HookedTransformer.from_pretrained_no_processing(GOLDENS / "model")
    data, golden = np.load(GOLDENS / "data.npz"), np.load(GOLDENS / "tl43.npz")
    described = json.loads((GOLDENS / "tl43.json").read_text())["das"]
    base = np.concatenate([data["clean"], data["corrupt"]])
    source = np.concatenate([data["corrupt"], data["clean"]])
    targets = golden["das.targets"]
    pairs = InterchangePairs.of(model, base, source, targets)
    for one in described:
        rank = one["rank"]
        logits = golden[f"das.rank{rank}.logits"]
        found = score_interchange(model, pairs, one["hook"], golden[f"das.rank{rank}.basis"], pos=one["position"])
        np.testing.assert_allclose(found.logits, logits, atol=1e-5 * np.abs(logits).max())
        ours = train_interchange(model, pairs, one["hook"], rank=rank, pos=8, seeds=range(8), batch_size=4,
                                 controls=())  # fmt: skip
        assert np.median(ours.losses[-1]) <= one["losses"][-1] * 1.1
        assert ours.losses[-1].min() < one["losses"][-1]
