"""``python -m tljax`` end to end on the bundled model, and the mistakes people make with it."""

import json
from pathlib import Path

import pytest

from tljax import HookedTransformer, demo
from tljax.__main__ import main


@pytest.fixture(scope="module")
def findings(tiny: HookedTransformer) -> demo.Findings:
    return demo.investigate(tiny, demo.CLEAN, demo.CORRUPTED, demo.ANSWER, demo.WRONG)


def test_findings_make_sense(findings: demo.Findings) -> None:
    assert findings.clean_difference > 3
    assert findings.corrupted_difference < -3
    assert findings.clean_top[0][0] == " Mary"
    n_layers, n_pos = findings.residual.shape
    assert n_pos == len(findings.clean_tokens)
    giver = findings.clean_tokens.index(" John", 5)
    assert findings.residual[0, giver] == pytest.approx(1, abs=1e-3)  # the only token that differs
    assert abs(findings.residual[0]).sum() == pytest.approx(1, abs=1e-2)
    assert findings.heads.shape[0] == n_layers
    assert findings.induction[0][2] > 0.5


def test_report_names_the_hot_spots(findings: demo.Findings) -> None:
    text = "\n".join(demo.report(findings))
    assert "position 10 (' John')" in text
    assert "Induction heads" in text
    layer, head, *_ = findings.attention[0]
    assert f"L{layer}H{head} carries" in text


def test_command_prints_and_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path)]) == 0
    assert "logit(' Mary') - logit(' John')" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"residual_patching.png", "head_patching.png"}


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", "--out", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["answer"] == " Mary"
    assert len(found["residual"][0]) == len(found["clean_tokens"])
    assert len(found["pictures"]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--answer", " Mary Ann"], "tokens, not one"),
        (
            ["--corrupted", "When John and Mary went to the store, the lady gave a drink to"],
            "must have the same number",
        ),
        (["--corrupted", demo.CLEAN], "nothing to trace"),
        (["--model", "gpt2-smal"], "gpt2-small"),
        (["--out", "/dev/null/pictures"], "cannot write"),
    ],
)
def test_mistakes_get_a_sentence(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    assert "same number of tokens" in shown
    assert "--model gpt2-small" in shown
