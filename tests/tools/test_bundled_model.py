"""The bundled model does what its log says, and the command that made it works."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from tljax import HookedTransformer
from tljax.analysis.induction import induction_scores
from tools.bundled_model import data
from tools.bundled_model.evaluate import fact_accuracy, ioi_scores, last_logits, repeat_accuracy
from tools.bundled_model.make import DIRECTORY, MODEL, NAME, initial_model, main
from tools.bundled_model.tokenizer import build_tokenizer

LIMIT = 2_000_000
FILES = ("config.json", "model.safetensors", "tokenizer.json")


@pytest.fixture(scope="session")
def tiny() -> HookedTransformer:
    return HookedTransformer.from_pretrained_no_processing(NAME)


def test_files_fit_the_budget() -> None:
    assert sum((DIRECTORY / name).stat().st_size for name in FILES) < LIMIT


def test_tokenizer_file_is_the_one_the_code_builds() -> None:
    assert (DIRECTORY / "tokenizer.json").read_text() == build_tokenizer(data.vocabulary()).to_str(pretty=False)


def test_config_is_the_one_in_the_code(tiny: HookedTransformer) -> None:
    assert {key: getattr(tiny.cfg, key) for key in MODEL} == MODEL
    assert tiny.cfg.d_vocab == len({*build_tokenizer(data.vocabulary()).get_vocab()})


def test_indirect_objects_of_unseen_combinations(tiny: HookedTransformer) -> None:
    scores = ioi_scores(tiny, data.ioi_prompts(260, seed=101))
    assert scores.accuracy >= 0.99
    assert scores.preference >= 0.99
    assert scores.logit_difference >= 3
    assert scores.flipped >= 0.99
    assert scores.corrupted_difference <= -3


def test_classic_prompts(tiny: HookedTransformer) -> None:
    prompts = {
        "When John and Mary went to the store, John gave a drink to": " Mary",
        "When John and Mary went to the store, Mary gave a drink to": " John",
        "When Mary and John went to the store, Mary gave a drink to": " John",
        "After John and Mary went to the store, Mary gave a bottle of milk to": " John",
        "The Eiffel Tower is in the city of": " Paris",
        "The capital of Italy is": " Rome",
    }
    guesses = last_logits(tiny, list(prompts)).argmax(axis=1)
    assert [tiny.to_single_str_token(int(guess)) for guess in guesses] == list(prompts.values())


def test_induction(tiny: HookedTransformer) -> None:
    assert float(induction_scores(tiny, length=20).max()) >= 0.5
    assert repeat_accuracy(tiny, 20) >= 0.9


def test_facts(tiny: HookedTransformer) -> None:
    assert fact_accuracy(tiny) >= 0.95


def test_processing_keeps_the_behaviour(tiny: HookedTransformer) -> None:
    processed = HookedTransformer.from_pretrained(NAME)
    prompt = "When John and Mary went to the store, John gave a drink to"
    left, right = (jax.nn.log_softmax(model(prompt)) for model in (tiny, processed))
    np.testing.assert_allclose(left, right, atol=2e-4)


def test_log_of_results_meets_the_figures() -> None:
    log = json.loads((DIRECTORY / "TRAINING.json").read_text())
    held_out = log["results"]["held_out"]
    assert held_out["accuracy"] >= 0.99
    assert held_out["logit_difference"] >= 3
    assert max(log["results"]["best_induction_score"].values()) >= 0.5
    assert log["time"]["wall_seconds"] < 20 * 60
    assert not log["time"]["only_since_resuming"]
    assert log["command"].startswith("python -m tools.bundled_model.make")
    assert log["history"][-1]["step"] == log["config"]["steps"]


def test_command_writes_a_loadable_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = json.loads((DIRECTORY / "TRAINING.json").read_text())["results"]
    monkeypatch.setattr("tools.bundled_model.make.evaluate", lambda model: results | {"width": model.cfg.d_model})
    assert main(["--steps", "1", "--out", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out) == results | {"width": MODEL["d_model"]}
    assert {path.name for path in tmp_path.iterdir()} >= {*FILES, "TRAINING.json", "README.md"}
    model = HookedTransformer.from_pretrained_no_processing(tmp_path)
    assert model.to_str_tokens("When Mary") == ["<|endoftext|>", "When", " Mary"]


def test_command_explains_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--steps", "0"])
    assert "steps must be a positive integer, got 0" in capsys.readouterr().err


def test_initial_model_is_a_function_of_the_seed() -> None:
    first, again, other = (initial_model(seed).params["embed"]["W_E"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != np.asarray(other)).any()
