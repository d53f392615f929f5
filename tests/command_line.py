"""Scripts as a user starts them, in this process."""

import sys

import pytest
from hydra.core.global_hydra import GlobalHydra

from engine import cli


def start(monkeypatch, name, run, schema, words):
    """`python NAME.py WORDS`, with `run` in the place of the script's own."""
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
    cli.main(name, run, schema)


def error_line(monkeypatch, capsys, *script):
    """The one line on stderr with which the script refuses its words; its exit status is 2."""
    with pytest.raises(SystemExit) as caught:
        start(monkeypatch, *script)
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2
    assert line.startswith("error")
    return line
