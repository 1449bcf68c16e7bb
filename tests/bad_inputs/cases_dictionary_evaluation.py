"""Evaluation and pages of dictionaries: no prompts, nothing that counts, dictionaries of elsewhere, no such feature."""

import functools
from typing import Any

import numpy as np
from table import Case, World

from tljax import HookedTransformer
from tljax.dictionaries import Dictionary, DictionaryConfig, Tap
from tljax.dictionaries.evaluation import (
    PooledFeatures,
    evaluate_dictionary,
    ground_truth_scores,
    pool_features,
    sparse_probing,
    spurious_correlation_removal,
    targeted_probe_perturbation,
)
from tljax.dictionaries.pages import collect_activations, feature_activations, feature_dashboard, feature_page
from tljax.errors import DictionaryError, InputError, UnknownHookError
from tljax.viz import feature_activations as picture

IDS = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
POINT = "blocks.0.hook_resid_post"


def sae(width: int = 8, reads: str | None = POINT, fill: float = 1.0, **fields: Any) -> Dictionary:
    cfg = DictionaryConfig(**({"d_in": width, "d_sae": 4, "tap": Tap(reads=reads)} | fields))
    shapes = {"W_enc": (width, 4), "b_enc": (4,), "W_dec": (4, width), "b_dec": (width,)}
    return Dictionary({name: np.full(shape, fill, np.float32) for name, shape in shapes.items()}, cfg)


def evaluate(w: World, dictionary: Any = None, prompts: Any = IDS, **options: Any) -> Any:
    return evaluate_dictionary(w.small, dictionary or sae(), prompts, bootstrap=0, progress=False, **options)


def page(w: World, feature: Any = 0, prompts: Any = IDS, **options: Any) -> Any:
    return feature_page(w.small, sae(), prompts, feature, progress=False, **options)


@functools.cache
def broken() -> HookedTransformer:
    """A model whose embedding of token 8 is NaN."""
    model = HookedTransformer(World.config())
    embed = np.array(model.params["embed"]["W_E"])
    embed[8] = np.nan
    return model.replace(params=model.params | {"embed": {"W_E": embed}})


def pooled(n: int = 8) -> PooledFeatures:
    g = np.random.default_rng(0)
    features = g.random((n, 4))
    return PooledFeatures(
        activations=g.random((n, 3)), features=features, written=features, directions=g.random((4, 3))
    )


CASES: tuple[Case, ...] = (
    Case("no prompts", lambda w: evaluate(w, prompts=[]), InputError, "no prompts", "at least one"),
    Case("every token excluded", lambda w: evaluate(w, exclude_tokens=range(12)), InputError, "All 9 tokens", "fewer"),
    Case("an excluded id outside the vocabulary", lambda w: evaluate(w, exclude_tokens=[12]), InputError, "0 to 11"),
    Case("special tokens of no tokenizer", lambda w: evaluate(w, exclude_tokens="special"), InputError, "give ids"),
    Case("a misspelt exclusion", lambda w: evaluate(w, exclude_tokens="specials"), InputError, "special"),
    Case("a dictionary of another width", lambda w: evaluate(w, sae(16)), DictionaryError, "reads 16 numbers", "[8]"),
    Case(
        "heads read as one without saying so",
        lambda w: evaluate(w, sae(reads="blocks.0.attn.hook_z")), DictionaryError, "merged_heads=True", "[2, 4]",
    ),
    Case("a point of another model", lambda w: evaluate(w, sae(reads="blocks.7.hook_z")), UnknownHookError, "blocks.7"),
    Case("a dictionary that belongs nowhere", lambda w: evaluate(w, sae(reads=None)), DictionaryError, "Tap(reads="),
    Case("NaN weights", lambda w: evaluate(w, sae(fill=np.nan)), DictionaryError, "not finite", "W_enc"),
    Case("a model in place of a dictionary", lambda w: evaluate(w, w.small), DictionaryError, "give a Dictionary"),
    Case(
        "a training dictionary that selects over the batch",
        lambda w: evaluate(w, sae(architecture="batchtopk", k=2)), DictionaryError, "batch_size", "jumprelu",
    ),
    Case(
        "activations that are NaN",
        lambda w: evaluate_dictionary(broken(), sae(), IDS, bootstrap=0, progress=False), InputError, "prompt 2",
    ),
    Case("no batch", lambda w: evaluate(w, batch_size=0), InputError, "batch_size=0", "at least 1"),
    Case("certain intervals", lambda w: evaluate(w, confidence=1.0), InputError, "confidence=1.0"),
    Case(
        "one prompt has no interval, not one of width zero",
        lambda w: evaluate_dictionary(w.small, sae(), IDS[:1], progress=False).to_dict()["low"] is None, equals=True,
    ),
    Case(
        "padding counts nothing",
        lambda w: evaluate(w, prompts=[[1, 2, 3], [4, 5]], batch_size=2).figures.mse * 5,
        equals=lambda w: sum(evaluate(w, prompts=[row]).figures.mse * len(row) for row in ([1, 2, 3], [4, 5])),
        tolerance=1e-4,
    ),
    Case("no rows of ids", lambda w: evaluate(w, prompts=np.zeros((0, 3), int)), InputError, "at least one"),
    Case(
        "a first batch without a token that counts",
        lambda w: evaluate(w, exclude_tokens=[1, 2, 3], batch_size=1).figures.mse,
        equals=lambda w: evaluate(w, prompts=IDS[1:]).figures.mse,
    ),
    Case("a feature that does not exist", lambda w: page(w, 4), InputError, "features=4", "4 features, 0 to 3"),
    Case("the last feature by a negative number", lambda w: page(w, -1, k=1).html.count("</script>") > 0, equals=True),
    Case("no examples wanted", lambda w: page(w, k=0), InputError, "k=0", "at least 1"),
    Case("a misspelt option", lambda w: page(w, n_interval=3), InputError, "n_intervals"),
    Case(
        "a dashboard of no features",
        lambda w: feature_dashboard(w.small, sae(), IDS, [], progress=False), InputError, "at least one feature",
    ),
    Case(
        "collected activations of another dictionary",
        lambda w: feature_page(
            w.small, sae(), collect_activations(w.small, wider(), IDS, progress=False), 0
        ),
        InputError, "5 features", "has 4",
    ),
    Case("two prompts in one", lambda w: feature_activations(w.small, sae(), IDS[:2]), InputError, "prompts[0]"),
    Case("too few names", lambda w: feature_activations(w.small, sae(), IDS[0], names=["a"]), InputError, "4 features"),
    Case("values of other tokens", lambda w: picture(["a", "b"], np.ones((3, 2))), InputError, "2 tokens", "(3, 2)"),
    Case(
        "a position that a prompt lacks",
        lambda w: pool_features(w.small, sae(), [[1, 2, 3], [4]], pos=1, progress=False), InputError, "prompt 1",
    ),
    Case(
        "a prompt of excluded tokens alone",
        lambda w: pool_features(w.small, sae(), IDS, exclude_tokens=[4, 5, 6], progress=False), InputError, "Prompt 1",
    ),
    Case("one label alone", lambda w: sparse_probing(pooled(), [1] * 8, k=(1,)), InputError, "label 1", "two labels"),
    Case("labels of others", lambda w: sparse_probing(pooled(), [0, 1], k=(1,)), InputError, "(2,)", "8 prompts"),
    Case("a label seen once", lambda w: sparse_probing(pooled(), [0] * 7 + [1], k=(1,)), InputError, "two are needed"),
    Case(
        "more features than there are",
        lambda w: targeted_probe_perturbation(pooled(), [0, 1] * 4, k=(5,)), InputError, "k=5", "1 to 4",
    ),
    Case(
        "labels that always agree",
        lambda w: spurious_correlation_removal(pooled(), [0, 1] * 4, [0, 1] * 4, k=(1,)),
        InputError, "all four combinations",
    ),
    Case("known features of another width", lambda w: ground_truth_scores(sae(), np.eye(3)), DictionaryError, "8]"),
    Case(
        "codes without what was encoded",
        lambda w: ground_truth_scores(sae(), np.eye(8), codes=np.eye(8)), InputError, "go together",
    ),
)  # fmt: skip


def wider() -> Dictionary:
    cfg = DictionaryConfig(d_in=8, d_sae=5, tap=Tap(reads=POINT))
    shapes = {"W_enc": (8, 5), "b_enc": (5,), "W_dec": (5, 8), "b_dec": (8,)}
    return Dictionary({name: np.ones(shape, np.float32) for name, shape in shapes.items()}, cfg)
