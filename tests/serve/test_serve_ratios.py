"""Model names to ratios: every spelling of a ratio is one name, everything else is refused with the valid form."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psacpo.errors import InputError
from psacpo.merge import policy_name
from psacpo.serve.ratios import FORM, Dial, Refusal, by_ratio, engine_rank, grid_steps, parse_policy


@pytest.mark.parametrize(
    ("text", "ratio"),
    [
        ("0.37", 0.37),
        (".37", 0.37),
        ("0.370", 0.37),
        ("0", 0.0),
        ("-0", 0.0),
        ("1", 1.0),
        ("1.", 1.0),
        ("+.5", 0.5),
        ("1e-05", 1e-05),
        ("3E-1", 0.3),
        ("0.30000000000000004", 0.30000000000000004),
    ],
)
def test_spellings_of_a_ratio(text: str, ratio: float) -> None:
    assert parse_policy(f"policy@{text}") == ratio
    assert str(parse_policy(f"policy@{text}")) != "-0.0"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nan",
        "NaN",
        "inf",
        "-inf",
        "0.3.1",
        "0,3",
        "0x1",
        "1_0",
        " 0.3",
        "0.3 ",
        "0.3\n",
        "٠.٣",
        "0.3@0.4",
        "1e",
        ".",
        "one",
        "0.3" + "0" * 80,
        "1e9999",
        "--0.3",
    ],
)
def test_malformed_ratios_are_told_the_form(text: str) -> None:
    with pytest.raises(Refusal) as caught:
        parse_policy(f"policy@{text}")
    assert caught.value.status == 400
    assert FORM in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["1.5", "-0.1", "1.0000001", "2e3", "-1e-300"])
def test_ratios_outside_the_interval(text: str) -> None:
    with pytest.raises(Refusal, match="out of range; allowed: policy@RATIO with a ratio from 0 to 1") as caught:
        parse_policy(f"policy@{text}")
    assert caught.value.status == 400


@given(st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_a_policy_name_reads_back_as_its_ratio(ratio: float) -> None:
    assert parse_policy(policy_name(ratio)) == ratio
    assert Dial().choose(policy_name(ratio)) == policy_name(abs(ratio))


def test_names_that_are_served() -> None:
    dial = Dial(bases=("base", "org/model"))
    assert dial.choose("base") is None
    assert dial.choose("org/model") is None
    assert dial.choose(None) is None
    assert dial.choose("") is None
    assert dial.choose("policy@.3") == "policy@0.30"
    assert dial.fixed == (0.0, 1.0)
    for name in ("gpt-4", "policy", "policy-0.3", "Policy@0.3", "base ", "/etc/passwd"):
        with pytest.raises(Refusal, match="allowed: base, org/model, or policy@RATIO") as caught:
            dial.choose(name)
        assert caught.value.status == 404


def test_an_error_repeats_no_control_characters_and_no_novel() -> None:
    with pytest.raises(Refusal) as caught:
        Dial().choose("\x1b[2Jx" + "y" * 10_000)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_pins_serve_nothing_else() -> None:
    dial = Dial(pins=(0.3, 0.6))
    assert dial.choose("policy@0.300") == "policy@0.30"
    assert dial.fixed == (0.3, 0.6)
    for name in ("policy@0.31", "policy@0", "policy@1", "base", "nope"):
        with pytest.raises(Refusal, match=r"allowed: policy@0.30, policy@0.60$") as caught:
            dial.choose(name)
        assert caught.value.status == 404
    with pytest.raises(Refusal, match="no model named"):
        dial.choose(None)
    assert Dial(pins=(0.3,)).choose(None) == "policy@0.30"


def test_snapping_takes_the_nearest_of_the_grid() -> None:
    dial = Dial(steps=20)
    for asked, served in ((0.37, "0.35"), (0.38, "0.40"), (0.024, "0.00"), (0.999, "1.00"), (0.35, "0.35")):
        assert dial.choose(f"policy@{asked}") == f"policy@{served}"


@given(st.integers(1, 400), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_a_grid_bounds_the_names(steps: int, ratio: float) -> None:
    snapped = Dial(steps=steps).snapped(ratio)
    assert snapped in {k / steps for k in range(steps + 1)}
    assert abs(snapped - ratio) <= 0.5 / steps + 1e-12


def test_grids_end_at_one() -> None:
    assert grid_steps(0.05) == 20
    assert grid_steps(1 / 3) == 3
    assert grid_steps(1) == 1
    for snap in (0.3, 0.0, -0.1, 1.5, float("nan"), float("inf"), 1e-9):
        with pytest.raises(ValueError, match="allowed: 1/n such as 0.05"):
            grid_steps(snap)


def test_engine_rank_is_the_smallest_that_holds() -> None:
    assert [engine_rank(rank) for rank in (1, 2, 8, 9, 32, 33, 257, 320, 321, 512)] == [
        1, 8, 8, 16, 32, 64, 320, 320, 512, 512,
    ]  # fmt: skip
    with pytest.raises(InputError, match="rank 513 together, more than vLLM takes.*up to 512"):
        engine_rank(513)


def test_policies_are_listed_in_the_order_of_their_ratios() -> None:
    assert by_ratio(["policy@1.00", "policy@0.5", "x", "policy@0.123", "policy@7"]) == [
        "policy@0.123", "policy@0.5", "policy@1.00",
    ]  # fmt: skip
