"""Pages of features: their data by hand, and the pages in headless Chromium."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from made_dictionaries import standard

from tljax import HookedTransformer, viz
from tljax.dictionaries import Dictionary
from tljax.dictionaries.pages import (
    FeatureActivations,
    FeatureSummary,
    collect_activations,
    draw_features,
    feature_activations,
    feature_dashboard,
    feature_page,
    logit_effects,
    summarise_features,
)
from tljax.viz import Html

POINT = "blocks.3.hook_resid_post"
PROMPTS = [
    "When John and Mary went to the store, John gave a drink to",
    "Mary saw Tom",
    "</script><script>alert(1)</script> & \n\n Tom",
]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def sae(tiny: HookedTransformer) -> Dictionary:
    """Feature 0 reads the direction of " Mary"'s logit, features 1 to 23 random ones; 24 is never active."""
    g, d = np.random.default_rng(0), tiny.cfg.d_model
    mary = np.asarray(tiny.W_U)[:, tiny.to_single_token(" Mary")]
    rows = np.concatenate([mary[None], g.normal(size=(23, d)), np.ones((1, d))])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    bias = np.full(25, -1.0)
    bias[24] = -1e6
    return standard(rows.T, rows, bias, reads=POINT)


@pytest.fixture(scope="module")
def collected(tiny: HookedTransformer, sae: Dictionary) -> FeatureActivations:
    return collect_activations(tiny, sae, PROMPTS, batch_size=2, progress=False)


@pytest.fixture(scope="module")
def summary(tiny: HookedTransformer, sae: Dictionary, collected: FeatureActivations) -> FeatureSummary:
    (made,) = summarise_features(tiny, sae, collected, [0], k=2, n_intervals=3, batch_size=2, progress=False)
    return made


def dense(tiny: HookedTransformer, sae: Dictionary, prompt: str) -> np.ndarray:
    _, cache = tiny.run_with_cache(prompt, names_filter=POINT)
    return np.asarray(sae.encode(cache[POINT])[0])


def test_collected_activations_are_those_of_each_prompt(
    tiny: HookedTransformer, sae: Dictionary, collected: FeatureActivations
) -> None:
    whole = np.stack([collected.dense(feature) for feature in range(25)], -1)
    for row, prompt in enumerate(PROMPTS):
        own = dense(tiny, sae, prompt)
        np.testing.assert_allclose(whole[row, : len(own)], own, atol=1e-4)
        assert not whole[row, len(own) :].any()
    flat = whole[collected.mask]
    np.testing.assert_allclose(collected.density, (flat != 0).mean(0))
    np.testing.assert_allclose(collected.largest, flat.max(0))
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(collected.correlations([3, 0]), np.corrcoef(flat.T)[[3, 0]], atol=1e-6)
    some = collect_activations(tiny, sae, PROMPTS, features=[-1, 3], exclude_tokens="special", progress=False)
    assert set(some.feature.tolist()) == {3}
    assert some.n_tokens == collected.n_tokens - len(PROMPTS)


def test_a_summary_says_what_is_there(
    tiny: HookedTransformer, sae: Dictionary, collected: FeatureActivations, summary: FeatureSummary
) -> None:
    values = collected.dense(0)
    assert summary.density == (values > 0).sum() / collected.n_tokens
    assert (summary.largest, summary.activations.counts.sum()) == (values.max(), (values > 0).sum())
    largest, *intervals = summary.groups
    assert len(largest.examples) == 2
    assert len({one.prompt for one in largest.examples}) == 2
    first = largest.examples[0]
    assert (first.prompt, first.pos) == np.unravel_index(values.argmax(), values.shape)
    np.testing.assert_allclose(first.activations, values[first.prompt, first.start : first.start + len(first.tokens)])
    assert first.peak == values.max()
    assert sum(group.share for group in intervals) == pytest.approx(1)
    for group in intervals:
        assert all(group.low < one.peak <= group.high * (1 + 1e-6) for one in group.examples)
    assert summary.promoted[0][0] == " Mary"
    cosines = np.asarray(sae.W_dec) @ np.asarray(sae.W_dec)[0]
    assert [feature for feature, _ in summary.similar] == (np.argsort(-cosines[1:])[:10] + 1).tolist()


def test_ablation_is_the_loss_without_the_feature(
    tiny: HookedTransformer, sae: Dictionary, summary: FeatureSummary
) -> None:
    example = summary.groups[0].examples[0]
    prompt = PROMPTS[example.prompt]

    def remove(x: Any, hook: Any) -> Any:
        return x - sae.encode(x)[..., :1] * sae.W_dec[0][None, None]

    without = tiny.run_with_hooks(prompt, "loss", fwd_hooks=[(POINT, remove)], loss_per_token=True)
    change = np.asarray(without - tiny(prompt, return_type="loss", loss_per_token=True))[0]
    assert example.loss_changes is not None
    known = np.isfinite(example.loss_changes)
    np.testing.assert_allclose(
        example.loss_changes[known], change[example.start :][: len(example.tokens)][: known.sum()], atol=1e-4
    )
    assert np.abs(change).max() > 1e-3


def test_effects_on_logits_are_the_models_own(tiny: HookedTransformer, sae: Dictionary) -> None:
    """Along one direction the logits move by the effects, but for the final norm's scale."""
    effects = logit_effects(tiny, sae, np.asarray([0, 5]))
    assert effects is not None
    _, cache = tiny.run_with_cache("Mary saw Tom")
    scale = np.asarray(cache["ln_final.hook_scale"])[0, -1]
    stack = sae.W_dec[jnp.asarray([0, 5])][:, None]
    moved = [np.asarray(cache.logit_attrs(stack, token, pos_slice=-1)).ravel() for token in (7, 100)]
    np.testing.assert_allclose((effects[:, 7] - effects[:, 100]) / scale, moved[0] - moved[1], atol=1e-4)
    heads = standard(np.zeros((64, 2)), np.eye(2, 64), reads="blocks.1.attn.hook_z", merged_heads=True)
    by_heads = logit_effects(tiny, heads, np.asarray([0]))
    assert by_heads is not None
    W_O = np.asarray(tiny.blocks[1].attn.W_O)[0, 0]
    expected = (W_O - W_O.mean()) @ np.asarray(tiny.W_U)
    np.testing.assert_allclose(by_heads[0], expected - expected.mean(), atol=1e-5)
    keys = standard(np.zeros((16, 2)), np.eye(2, 16), reads="blocks.1.attn.hook_k", head=0)
    assert logit_effects(tiny, keys, np.asarray([0])) is None


def data_of(page: Html) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json">(.*?)</script>', page.html, re.DOTALL)
    return json.loads(text)


def test_a_page_holds_the_summary_and_escapes_tokens(
    tiny: HookedTransformer, sae: Dictionary, collected: FeatureActivations, summary: FeatureSummary
) -> None:
    page = draw_features(tiny, sae, collected, [summary], title="<i>")
    assert "alert(1)</script>" not in page.html
    assert "http" not in page.html.replace("http://www.w3.org/2000/svg", "")
    (card,) = data_of(page)["features"]
    assert card["largest"] == float(f"{summary.largest:.4g}")
    assert card["promoted"][0][0] == "·Mary"
    assert data_of(page)["dead"] == (collected.density == 0).sum()
    same = feature_page(tiny, sae, collected, 0, k=2, n_intervals=3, batch_size=2, title="<i>", progress=False)
    assert data_of(same) == data_of(page)


def dom_of(page: Html, path: Path, script: str = "") -> str:
    """The page's DOM in Chromium after its script and ``script`` ran; a script's error stands in the title."""
    page.save(path)
    watch = "<script>window.onerror = (message) => { document.title = 'ERROR ' + message; };</script>"
    text = path.read_text().replace("<body", f"{watch}<body").replace("</body>", f"<script>{script}</script></body>")
    path.write_text(text)
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", path.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    title = re.findall(r"<title>(.*?)</title>", dom)[0]
    assert not title.startswith(("ERROR", "alert")), title
    return re.sub(r"<script.*?</script>|<style.*?</style>", "", dom, flags=re.DOTALL)


@browser
def test_the_dashboard_searches_sorts_and_follows_links(
    tiny: HookedTransformer, sae: Dictionary, collected: FeatureActivations, tmp_path: Path
) -> None:
    page = feature_dashboard(
        tiny, sae, collected, [0, 3, 5, 24], k=2, n_intervals=2, batch_size=2, measure_ablation=False, progress=False
    )
    act = """
    const part = (name) => document.querySelector(`[data-part="${name}"]`);
    const listed = () => [...part("list").children].map((one) => one.dataset.feature).join(",");
    const said = [listed()];
    part("sort").value = "feature"; part("sort").dispatchEvent(new Event("change")); said.push(listed());
    part("search").value = "·mary"; part("search").dispatchEvent(new Event("input")); said.push(listed());
    part("search").value = "24"; part("search").dispatchEvent(new Event("input")); said.push(listed());
    part("list").children[0].click(); said.push(part("name").textContent, part("groups").textContent);
    part("search").value = ""; part("search").dispatchEvent(new Event("input"));
    part("list").children[1].click(); said.push(part("name").textContent);
    const link = [...part("tables").querySelectorAll("button")][0]; said.push(link.textContent); link.click();
    said.push(part("name").textContent.replace("feature ", ""));
    part("groups").querySelector(".text span").dispatchEvent(new Event("mouseenter"));
    said.push(part("readout").textContent);
    const note = document.createElement("pre"); note.id = "said"; note.textContent = JSON.stringify(said);
    document.body.append(note);
    """
    dom = dom_of(page, tmp_path / "many.html", act)
    (text,) = re.findall(r'<pre id="said">(.*?)</pre>', dom, re.DOTALL)
    said = json.loads(text.replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&"))
    by_size = sorted([0, 3, 5, 24], key=lambda feature: -collected.largest[feature])
    assert said[0] == ",".join(map(str, by_size))
    assert said[1] == "0,3,5,24"
    assert "0" in said[2].split(",")
    assert said[3:6] == ["24", "feature 24", "It is not active on these prompts."]
    assert said[6] == "feature 3"
    assert said[7] == said[8]
    assert re.match(r"\d+ \S+.*: ", said[9])


@browser
def test_a_page_shows_its_figures(
    tiny: HookedTransformer, sae: Dictionary, collected: FeatureActivations, summary: FeatureSummary, tmp_path: Path
) -> None:
    dom = dom_of(draw_features(tiny, sae, collected, [summary]), tmp_path / "one.html")
    assert ">feature 0<" in dom
    assert dom.count("<figure>") == 3
    assert dom.count('class="example"') == sum(len(group.examples) for group in summary.groups)
    assert 'data-part="search"' not in dom
    assert re.search(r"prompt \d+, token \d+: [\d.]+ \(loss [+-][\d.e-]+\)", dom)


@browser
def test_features_of_a_prompt_in_a_browser(tiny: HookedTransformer, sae: Dictionary, tmp_path: Path) -> None:
    page = feature_activations(tiny, sae, PROMPTS[2], k=3)
    act = """
    const button = document.querySelector('[data-part="top"] button');
    document.title = button.textContent; button.click();
    """
    dom = dom_of(page, tmp_path / "prompt.html", act)
    own = dense(tiny, sae, PROMPTS[2])
    best = int(np.unravel_index(own.argmax(), own.shape)[1])
    assert f"<title>feature {best}</title>" in dom
    assert "the strongest 3 listed" in dom
    data = data_of(page)
    assert data["counts"] == (own > 0).sum(1).tolist()


def test_a_picture_of_given_values() -> None:
    values = np.asarray([[0.0, 2.0, 1.0], [3.0, 0.0, 0.5]])
    data = data_of(viz.feature_activations([" a", " b"], values, names=["x", "y", "z"], k=1))
    assert [(one["name"], one["largest"]) for one in data["features"]] == [("x", 3.0), ("y", 2.0)]
    assert data["active"] == [[[1, 2.0]], [[0, 3.0]]]
    assert data["counts"] == [2, 2]
