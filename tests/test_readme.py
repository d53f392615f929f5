"""What the README shows is what the scripts take, and what it measures is what the code gives."""

import ast
import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore

import eval as evaluation
import report
import sample
import train
from conf.schema import Config
from engine import cli
from teachers import capture, toy
from teachers.cache import CacheSpec
from teachers.capture import CaptureConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
FIRST = "pip install -c constraints.txt -e . && python train.py"
SECOND = "pip install -c constraints.txt -e '.[test]' && pytest"
# What takes overrides: how its command begins, and its configuration.
SCRIPTS = {
    "train": (("train.py",), Config),
    "sample": (("sample.py",), sample.SampleConfig),
    "eval": (("eval.py",), evaluation.EvalConfig),
    "capture": (("-m", "teachers.capture"), CaptureConfig),
}


def list_commands():
    """Every command of the README's shell blocks and of the scripts' docstrings."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.S)
    lines = "\n".join(blocks).splitlines()
    for module in (train, sample, evaluation, report, capture):
        lines += re.findall(r"^(?:python|torchrun) .*", module.__doc__, re.M)
    commands = set()
    for line in lines:
        command, _, _ = line.partition("#")
        commands |= {part.strip() for part in command.split("&&")}
    return sorted(commands - {""})


def split_command(command):
    """(name of the script, its words); None for a command that takes no overrides."""
    words = shlex.split(command)
    for name, (start, _) in SCRIPTS.items():
        for place in range(len(words)):
            end = place + len(start)
            if tuple(words[place:end]) == start:
                return name, words[end:]
    return None


@pytest.mark.parametrize("command", list_commands())
def test_every_command_composes(command, monkeypatch):
    script = split_command(command)
    if script is None:
        others = r"pip|pytest|wandb|bash|python (report.py|-m (kernels.bench|tests|teachers.cache))"
        assert re.match(others, command)
        return
    name, words = script
    schema = SCRIPTS[name][1]
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    is_sweep = "-m" in words
    overrides = [cli.in_hydra_grammar(word, is_sweep) for word in words if word[0] != "-"]
    monkeypatch.setattr(schema, "resolve", lambda *_: None, raising=False)  # no models here
    cli.check_jobs(name, overrides, is_sweep)


def test_the_two_commands_are_the_ones_that_ci_runs():
    script = (ROOT / ".ci/run").read_text()
    for command in (FIRST, SECOND):
        assert command in README and command in script
    assert "pytest -q -m slow" in script


def test_every_picture_is_there():
    for name in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / name).is_file(), name


def test_every_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    assert pins["torch"] == "2.13.0" and pins["triton"] == "3.7.1"  # the two that go together
    pinned = {name.lower().replace("_", "-") for name in pins}
    extra = project["optional-dependencies"]["data"]
    for dependency in [*project["dependencies"], *extra]:
        assert re.match(r"[a-z0-9-]+", dependency).group() in pinned


@pytest.mark.slow
def test_the_wheel_holds_the_kernels_alone(tmp_path):
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q"]
    subprocess.run([*pip, "-w", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = (ROOT / "kernels").glob("*.py")
    assert names == {f"nanodistill/kernels/{path.name}" for path in sources}
    code = "from nanodistill.kernels import linear_topk_kl; print(linear_topk_kl.__module__)"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(wheel)},
        cwd=tmp_path,
    )
    assert result.stdout.strip() == "nanodistill.kernels.losses", result.stderr


def readme_table():
    """access -> the cells of its first row in the README's table of accesses."""
    table = {}
    for line in README.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 6 and cells[0].startswith("`"):
            table.setdefault(cells[0].strip("`"), cells)
    return table


def test_the_access_table_is_what_the_toy_measures(capsys):
    """The README's figures, the closed forms and the sampled table agree."""
    t = toy.zipf()
    head = float(t[: toy.K].sum())
    tail = 1 - head
    square = float(t.square().sum())
    tail_square = square - float(t[: toy.K].square().sum())
    variances = {
        "greedy": 0.0,
        "text": 1 - square,
        "sampled": (1 - square) / toy.N,
        "topk": 0.0,
        "residual_to_label": tail**2 * (1 - square),
        "unbiased": tail - tail_square,
        "stratified": (tail**2 - tail_square) / toy.N,
        "full": 0.0,
    }
    # How much too high a perfect student's p_1 is.
    factors = {
        ("topk", "truncate"): 1 / head,
        ("residual_to_label", ""): 1 + tail,
        ("unbiased", ""): 1.0,
        ("text", ""): 1.0,
    }
    shown = readme_table()
    for access, loss_tail, p_1, *_, variance, _, _ in toy.rows(t):
        assert variance == pytest.approx(variances[access], rel=0.02, abs=1e-9), access
        assert float(shown[access][4]) == round(variances[access], 3), access
        if (access, loss_tail) in factors:
            expected = float(t[0]) * factors[access, loss_tail]
            assert p_1 == pytest.approx(expected, rel=0.05), access
    truth = f"p_1 = {t[0]:.4f}, p_2 = {t[1]:.4f} and {tail:.4f}"
    assert truth.replace("0.", ".") in README
    biased = f"{t[0] * (1 + tail):.4f}, {t[1] * (1 + tail):.4f} | {tail**2:.4f}"
    assert biased.replace("0.", ".") in README
    toy.show()
    assert "A teacher with t_i ~ 1/i" in capsys.readouterr().out


BYTES = {"greedy": 2, "text": 2, "sampled": 24, "topk": 194, "residual_to_label": 194}
BYTES |= {"unbiased": 196, "stratified": 218}


@pytest.mark.parametrize("access", BYTES)
def test_the_readmes_bytes_a_token_are_a_rows(access):
    spec = CacheSpec(access, 50304, 1, {"train": 1}, "", "", "", k=64, n=12)
    assert spec.row.itemsize == BYTES[access] == int(readme_table()[access][5])


def test_no_function_is_longer_than_a_screen():
    """Triton's apart, whose arguments are many."""
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    for name in tracked.stdout.split():
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            is_kernel = "jit" in [
                getattr(each, "id", "") for each in getattr(node, "decorator_list", [])
            ]
            if isinstance(node, ast.FunctionDef) and not is_kernel:
                assert node.end_lineno - node.lineno < 70, f"{name}: {node.name}"
