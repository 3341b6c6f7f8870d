"""Ways to compare outputs, against what the modes of testlib say; tolerances against exact fractions."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.actors.verifier.code_compare import MODES, BadAnswer, compare


@pytest.mark.parametrize(
    ("mode", "output", "answer", "same"),
    [
        ("exact", "1 2\n", "1 2\n", True),
        ("exact", "1 2", "1 2\n", False),
        ("line", "a b \nc\n\n", "a b\nc", True),
        ("line", "a  b\n", "a b\n", False),
        ("line", "a\n\nb\n", "a\nb\n", False),
        ("line", "a\r\nb\r\n", "a\nb\n", True),
        ("words", "a  b\nc", "a b\nc\n", True),
        ("words", "a b c", "a b\nc", False),
        ("token", "a  b\nc", "a\nb c\n", True),
        ("token", "a b", "a b c", False),
        ("token", "a b c d", "a b c", False),
        ("token", "1.0", "1", False),
        ("token", "A", "a", False),
        ("integer", "007 +3", "7 3", True),
        ("integer", "7.0", "7", False),
        ("integer", str(2**63), "5", False),
        ("integer", "9" * 1000, "9", False),
        ("float", "0.33333333", "0.333333333", False),
        ("float", "nan", "1", False),
        ("float", "inf", "1", False),
        ("float", "1_0", "10", False),
        ("float", "0x10", "16", False),
        ("yes_no", "yEs\n", "YES", True),
        ("yes_no", "yes yes", "yes", False),
        ("yes_no", "no", "yes", False),
        ("yes_no", "maybe", "no", False),
        ("yes_no", "", "no", False),
    ],
)
def test_a_mode(mode, output, answer, same):
    assert (compare(output.encode(), answer.encode(), mode) == "") == same


def test_a_tolerance_is_absolute_or_relative_and_in_token_mode_for_fractions_only():
    assert compare(b"3.14000001", b"3.14", "float", tolerance=1e-6) == ""
    assert compare(b"3.15", b"3.14", "float", tolerance=1e-6)
    assert compare(b"3.1400e0 x", b"3.14 x", "token", tolerance=1e-6) == ""
    assert compare(b"2.0e2", b"200", "token", tolerance=1e-6)  # Kattis: an integer in the answer stays one
    assert compare(b"3.14 y", b"3.14 x", "token", tolerance=1e-6)
    assert compare(b"1e400", b"1.5", "float", tolerance=0.5)


def test_case_can_be_ignored():
    assert compare(b"ABC", b"abc", "token", ignore_case=True) == ""


@pytest.mark.parametrize(("mode", "answer"), [("integer", "x"), ("float", "one"), ("yes_no", "perhaps")])
def test_an_answer_that_the_mode_cannot_read_is_an_error_of_the_tests(mode, answer):
    with pytest.raises(BadAnswer):
        compare(b"1", answer.encode(), mode)


@given(st.floats(-1e12, 1e12), st.floats(-1e-3, 1e-3), st.sampled_from([1e-4, 1e-6, 1e-9]))
def test_float_agrees_with_exact_arithmetic(right, error, tolerance):
    found = right * (1 + error)
    distance = abs(Fraction(found) - Fraction(right))
    bound = Fraction(tolerance) * max(Fraction(1), abs(Fraction(right)))
    if abs(distance - bound) > bound / 10**6:  # Not where rounding of the bound itself decides.
        assert (compare(repr(found).encode(), repr(right).encode(), "float", tolerance=tolerance) == "") == (
            distance <= bound
        )


@given(st.lists(st.text("abc01.", min_size=1, max_size=4), max_size=6), st.sampled_from([" ", "\n", "\t", "  \n"]))
def test_tokens_agree_with_split(words, gap):
    text, other = gap.join(words), " ".join(words)
    assert compare(text.encode(), other.encode(), "token") == ""
    assert compare(text.encode(), (other + " z").encode(), "token")


@given(st.binary(max_size=60), st.sampled_from(MODES))
def test_no_output_raises(output, mode):
    answer = {"yes_no": b"yes"}.get(mode, b"12")
    assert isinstance(compare(output, answer, mode, tolerance=0.1), str)
    assert compare(answer, answer, mode) == ""
