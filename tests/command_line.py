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


def error_line(monkeypatch, capsys, name, run, schema, words):
    """The one line on stderr with which the script refuses WORDS; its exit status is 2."""
    with pytest.raises(SystemExit) as caught:
        start(monkeypatch, name, run, schema, words)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert caught.value.code == 2
    assert len(lines) == 1
    assert lines[0].startswith("error")
    return lines[0]
