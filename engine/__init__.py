"""What train.py calls and a first reader can skip: checkpoint files, loggers, ranks, optimizers."""

import math
from difflib import get_close_matches

INTEGER_LIMIT = 2**63  # of torch's and numpy's integers


class UserError(ValueError):
    """An error the user can fix: one line with the value, the rule and the key to change."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class name if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def nearest(word: str, words) -> str:
    """The hint `; did you mean X?` if a word of `words` is close to `word`, else an empty string.

    Of a dict the keys are compared, and X is the value.
    """
    matches = get_close_matches(word, list(words), n=1)
    if not matches:
        return ""
    suggestion = words[matches[0]] if isinstance(words, dict) else matches[0]
    return f"; did you mean {suggestion}?"


def check_choice(key: str, value, choices) -> None:
    """UserError unless `value` is one of `choices`, or unset (None)."""
    if value is None or value in choices:
        return
    hint = nearest(str(value), choices)
    raise UserError(f"{key}={value}: {key} is one of {', '.join(choices)}{hint}")


def check_range(key: str, value, low=None, high=None, above=None, below=None) -> None:
    """UserError unless low <= value <= high and above < value < below.

    An unset (None) value or bound passes, NaN passes no bound. Infinity needs an upper bound that
    allows it, and an integer fits 64 bits.
    """
    if value is None:
        return
    broken = None
    if low is not None and not value >= low:
        broken = f"at least {low}"
    elif above is not None and not value > above:
        broken = f"above {above}"
    elif high is not None and not value <= high:
        broken = f"at most {high}"
    elif below is not None and not value < below:
        broken = f"below {below}"
    elif isinstance(value, int) and value >= INTEGER_LIMIT:
        broken = "below 2^63"
    elif high is None and math.isinf(value):
        broken = "finite"
    if broken is not None:
        raise UserError(f"{key}={value}: {key} must be {broken}")


def check_ranges(config, names: str, prefix: str = "", **bounds) -> None:
    """`check_range` of several fields of a dataclass: their names, separated by spaces.

    `prefix` is the config's place among the user's keys: `optim.` for optim.lr.
    """
    for name in names.split():
        check_range(prefix + name, getattr(config, name), **bounds)
