"""What every room uses: errors of one line that name the value, the rule and the key."""

import math

import pytest

from engine import UserError, check_choice, check_range, first_line


@pytest.mark.parametrize(
    "bounds, inside, outside, message",
    [
        ({"low": 1}, 1, 0, "at least 1"),
        ({"high": 1}, 1, 2, "at most 1"),
        ({"above": 0}, 1, 0, "above 0"),
        ({"below": 1}, 0, 1, "below 1"),
        ({"high": 1}, None, math.nan, "at most 1"),
    ],
)
def test_ranges(bounds, inside, outside, message):
    check_range("optim.lr", inside, **bounds)
    with pytest.raises(UserError, match=f"optim.lr={outside}: optim.lr must be {message}"):
        check_range("optim.lr", outside, **bounds)


def test_choices():
    check_choice("loss.tail", None, ("ghost", "truncate"))
    with pytest.raises(UserError, match=r"loss.tail=gost: .*did you mean ghost\?"):
        check_choice("loss.tail", "gost", ("ghost", "truncate"))


def test_first_line():
    assert first_line(OSError("boom\nmore")) == "boom"
    assert first_line(KeyError()) == "KeyError"
