"""What train.py calls and a first reader can skip: checkpoint files, loggers, ranks, optimizers."""


class UserError(ValueError):
    """A mistake its user can mend: one line with the value, the rule and the key to change."""
