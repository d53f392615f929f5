"""What train.py calls and a first reader can skip: checkpoint files, loggers, ranks, optimizers."""

from difflib import get_close_matches


class UserError(ValueError):
    """A mistake its user can mend: one line with the value, the rule and the key to change."""


def nearest(word: str, words) -> str:
    """The hint `; did you mean X?` where one of `words` comes close to `word`, else nothing."""
    found = get_close_matches(word, list(words), n=1)
    return f"; did you mean {found[0]}?" if found else ""


def check_choice(key: str, value, choices) -> None:
    """UserError unless `value` is one of `choices`."""
    if value not in choices:
        hint = nearest(str(value), choices)
        raise UserError(f"{key}={value}: {key} is one of {', '.join(choices)}{hint}")


def check_range(key: str, value, low=None, high=None, above=None, below=None) -> None:
    """UserError unless low <= value <= high, value > above and value < below; a bound left out is not checked."""
    bounds = [
        (low is not None and not value >= low, f"at least {low}"),
        (above is not None and not value > above, f"above {above}"),
        (high is not None and not value <= high, f"at most {high}"),
        (below is not None and not value < below, f"below {below}"),
    ]
    for broken, rule in bounds:
        if broken:
            raise UserError(f"{key}={value}: {key} must be {rule}")
