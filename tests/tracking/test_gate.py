"""What the gate decides, and how it explains that."""

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.tracking import gate

LIMITS = {
    "max_perplexity": 100.0,
    "max_copied_run": 40.0,
    "max_unk_share": 0.1,
    "min_improvement": 0.01,
}
GOOD = {"bits_per_byte": 1.5, "loss": 4.0, "perplexity": 54.6, "unk_share": 0.02}

bits = st.floats(0.01, 30)
any_float = st.floats()  # NaN and the infinities too


def test_the_figures_of_an_evaluation() -> None:
    evaluation: dict[str, Any] = {
        **GOOD,
        "known_loss": 3.9,
        "unigram": {"loss": 6.0, "bits_per_byte": 2.2},
        "samples": {"reviews": 200, "copied_run_p95": 9, "copied_run_max": 31},
        "held_out": {"reviews": 10, "digest": "d" * 64, "learned": "e" * 64},
    }
    assert gate.figures(evaluation) == {**GOOD, "copied_run_p95": 9}
    measured_on = gate.measured_on(evaluation, "words")
    assert measured_on == gate.measured_on(evaluation, "words") and len(str(measured_on)) == 12
    assert gate.measured_on(evaluation, "other words") != measured_on
    for key in ("digest", "learned"):
        other = {"held_out": {**evaluation["held_out"], key: "f" * 64}}
        assert gate.measured_on(other, "words") != measured_on


def test_the_figures_where_nothing_is_held_out() -> None:
    evaluation = {
        "samples": {"copied_run_p95": 9},
        "held_out": {"reviews": 0, "targets": 0, "bytes": 0, "digest": "e" * 64},
    }
    assert gate.figures(evaluation) == {"copied_run_p95": 9}
    assert gate.measured_on(evaluation, "words") is None


def test_a_good_model_breaks_no_limit() -> None:
    assert gate.broken({**GOOD, "copied_run_p95": 40.0}, LIMITS) == []
    assert gate.broken({"copied_run_p95": 12.0}, LIMITS) == []  # nothing held out


def test_a_broken_limit_is_named_with_the_value_and_what_is_allowed() -> None:
    found = gate.broken({**GOOD, "perplexity": 1240.127, "copied_run_p95": 41.0}, LIMITS)
    assert found == [
        {
            "figure": "perplexity",
            "value": 1240.127,
            "limit": "gate.max_perplexity",
            "allowed": 100.0,
        },
        {
            "figure": "copied_run_p95",
            "value": 41.0,
            "limit": "gate.max_copied_run",
            "allowed": 40.0,
        },
    ]
    assert gate.explain(found) == (
        "perplexity is 1240.13, above 100, which gate.max_perplexity allows; "
        "copied_run_p95 is 41, above 40, which gate.max_copied_run allows"
    )


def test_what_to_do_about_a_refusal_depends_on_the_vocabulary() -> None:
    found = gate.broken({**GOOD, "unk_share": 0.5, "copied_run_p95": 41.0}, LIMITS)
    for is_full, first in ((True, "raise vocabulary.max_tokens or"), (False, "add more texts")):
        way = gate.way_on(found, is_full=is_full)
        assert first in way and "gate.max_unk_share" in way and "gate.max_copied_run" in way
    assert "train.learning_rate" in gate.way_on(
        gate.broken({"loss": math.nan}, LIMITS), is_full=True
    )
    assert gate.notice({"verdict": "kept", "reason": "no better"}) == ""


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", sorted(GOOD))
def test_a_figure_that_is_not_finite_is_refused_even_with_the_limits_off(
    name: str, value: float
) -> None:
    found = gate.broken({**GOOD, name: value}, dict.fromkeys(LIMITS, 0.0))
    assert [entry["figure"] for entry in found] == [name]
    assert gate.explain(found) == f"{name} is {value}, allowed is a finite number"


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.sampled_from(sorted(gate.LIMITS)), any_float, st.floats(0, 1e12))
def test_a_limit_holds_for_any_value(limit: str, value: float, allowed: float) -> None:
    found = gate.broken({gate.LIMITS[limit]: value}, {**dict.fromkeys(LIMITS, 0.0), limit: allowed})
    assert bool(found) == (not math.isfinite(value) or (allowed > 0 and value > allowed))
    assert gate.explain(found).startswith(gate.LIMITS[limit] if found else "")


@pytest.mark.parametrize(
    ("mine", "champion", "theirs", "verdict", "reason"),
    [
        (1.52, None, None, "promoted", "bits per byte 1.5200; there was no champion"),
        (
            1.52,
            "3",
            1.55,
            "promoted",
            "bits per byte 1.5200 against the champion's 1.5500 (version 3): better by 0.0300, "
            "needed 0.01",
        ),
        (
            1.545,
            "3",
            1.55,
            "kept",
            "bits per byte 1.5450 against the champion's 1.5500 (version 3): better by 0.0050, "
            "needed 0.01",
        ),
        (
            1.6,
            "3",
            1.55,
            "kept",
            "bits per byte 1.6000 against the champion's 1.5500 (version 3): worse by 0.0500",
        ),
        (
            1.5,
            "3",
            1.5,
            "kept",
            "bits per byte 1.5000 against the champion's 1.5000 (version 3): no better",
        ),
        (
            None,
            "3",
            None,
            "not compared",
            "nothing is held out (sequences.validation_fraction is 0)",
        ),
        (1.5, "3", None, "not compared", "version 3 could not be measured"),
        (math.nan, None, None, "kept", "bits per byte is nan, not a finite number"),
    ],
)
def test_the_decision_and_its_reason(
    mine: float | None, champion: str | None, theirs: float | None, verdict: str, reason: str
) -> None:
    assert gate.decide(mine, champion, theirs, 0.01) == (verdict, reason)


@settings(deadline=None, max_examples=300, derandomize=True)
@given(any_float, any_float, st.floats(0, 8))
def test_a_worse_model_is_never_promoted(mine: float, theirs: float, needed: float) -> None:
    verdict, _ = gate.decide(mine, "1", theirs, needed)
    if verdict == "promoted":
        assert math.isfinite(mine)
        assert math.isnan(theirs) or (theirs > mine and theirs - mine >= needed)
    else:
        assert verdict == "kept"


@settings(deadline=None, max_examples=200, derandomize=True)
@given(bits, bits, st.floats(0, 8))
def test_at_most_one_of_two_beats_the_other(one: float, other: float, needed: float) -> None:
    won = [
        gate.decide(mine, "1", theirs, needed)[0] == "promoted"
        for mine, theirs in ((one, other), (other, one))
    ]
    assert not all(won)
    assert any(won) == (one != other and abs(one - other) >= needed)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.none() | any_float, st.floats(0, 8))
def test_the_first_champion_needs_a_number(mine: float | None, needed: float) -> None:
    verdict, _ = gate.decide(mine, None, None, needed)
    assert (verdict == "promoted") == (mine is not None and math.isfinite(mine))


@settings(deadline=None, max_examples=100, derandomize=True)
@given(any_float, bits, st.floats(0, 8))
def test_a_model_that_was_not_compared_is_not_promoted(
    mine: float, theirs: float, needed: float
) -> None:
    assert gate.decide(None, "1", theirs, needed)[0] == "not compared"
    assert gate.decide(mine, "1", None, needed)[0] != "promoted"


def test_experiments_in_copies_are_left_to_a_person(monkeypatch: pytest.MonkeyPatch) -> None:
    copy, project = Path("/home/anna/gpt/.dvc/tmp/exps/tmpa1b2c3"), Path("/home/anna/gpt")
    monkeypatch.delenv("DVC_EXP_NAME", raising=False)
    assert gate.promotes("workspace", project)  # dvc repro
    assert gate.promotes("workspace", copy)  # whoever works there by hand
    monkeypatch.setenv("DVC_EXP_NAME", "puffy-dawn")
    assert gate.promotes("workspace", project)  # dvc exp run, and so `make retrain`
    assert not gate.promotes("workspace", copy)  # --temp and --queue
    assert not gate.promotes("workspace", copy / "a project in a repository")
    assert gate.promotes("always", copy)
