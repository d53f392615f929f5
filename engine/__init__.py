"""What train.py calls and a first reader can skip: checkpoint files, loggers, ranks, optimizers."""

from difflib import get_close_matches
from operator import ge, gt, le, lt


class UserError(ValueError):
    """A mistake its user can mend: one line with the value, the rule and the key to change."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def nearest(word: str, words) -> str:
    """The hint `; did you mean X?` where one of `words` (of a dict: of its keys, X is the value) comes close to `word`."""
    found = get_close_matches(word, list(words), n=1)
    return (
        f"; did you mean {words[found[0]] if isinstance(words, dict) else found[0]}?"
        if found
        else ""
    )


def check_choice(key: str, value, choices) -> None:
    """UserError unless `value` is one of `choices`, or unset (None)."""
    if value is not None and value not in choices:
        raise UserError(
            f"{key}={value}: {key} is one of {', '.join(choices)}{nearest(str(value), choices)}"
        )


def check_range(key: str, value, low=None, high=None, above=None, below=None) -> None:
    """UserError unless low <= value <= high, value > above and value < below; an unset (None) value or bound passes."""
    for rule, bound, holds in (
        ("at least", low, ge),
        ("above", above, gt),
        ("at most", high, le),
        ("below", below, lt),
    ):
        if value is not None and bound is not None and not holds(value, bound):
            raise UserError(f"{key}={value}: {key} must be {rule} {bound}")


def check_ranges(config, names: str, prefix: str = "", **bounds) -> None:
    """`check_range` of a dataclass's fields, `names` in one string; `prefix` stands before them in their users' keys."""
    for name in names.split():
        check_range(prefix + name, getattr(config, name), **bounds)
