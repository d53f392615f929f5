"""What the README shows is what the scripts take, and what it measures is what results/ holds."""

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
PARTS = ("conf", "data", "engine", "kernels", "model")
SCHEMAS = {
    "train": Config,
    "sample": sample.SampleConfig,
    "eval": evaluation.EvalConfig,
    "capture": CaptureConfig,
}


def commands(text):
    """Every line of a shell block, continued lines joined, comments cut."""
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", text, re.S)
    joined = "\n".join(blocks).replace("\\\n", " ")
    return [
        part.strip()
        for line in joined.splitlines()
        for part in line.split("#")[0].split("&&")
        if part.strip()
    ]


def docstring_commands():
    found = []
    for module in (train, sample, evaluation, report, capture):
        found += [
            line.split("#")[0].strip()
            for line in module.__doc__.splitlines()
            if re.match(r"(python|torchrun) ", line)
        ]
    return found


@pytest.mark.parametrize("command", sorted(set(commands(README) + docstring_commands())))
def test_every_command_composes(command, monkeypatch):
    words = shlex.split(command)
    if "&&" in words:
        for part in " ".join(words).split(" && "):
            test_every_command_composes(part, monkeypatch)
        return
    if "teachers.capture" in words:
        words[words.index("teachers.capture") - 1 : words.index("teachers.capture") + 1] = [
            "capture.py"
        ]
    script = next((word for word in words if word.endswith(".py")), None)
    if words[0] in ("pip", "pytest", "cd", "git", "ruff", "export", "wandb") or words[1:3] in (
        ["-m", "kernels.bench"],
        ["-m", "tests.bench_train"],
        ["-m", "teachers.cache"],
    ):
        return
    assert script and ((ROOT / script).is_file() or script == "capture.py"), command
    name, arguments = script.removesuffix(".py"), words[words.index(script) + 1 :]
    if name == "report":
        assert arguments
        return
    ConfigStore.instance().store(name=f"{name}_schema", node=SCHEMAS[name])
    sweep = "-m" in arguments
    overrides = [cli.in_hydra_grammar(word, sweep) for word in arguments if word[0] != "-"]
    monkeypatch.setattr(SCHEMAS[name], "resolve", lambda *_: None, raising=False)  # no models here
    cli.check_jobs(name, overrides, sweep)


def test_the_two_commands_are_the_ones_that_ci_runs():
    first, second = (
        "pip install -c constraints.txt -e . && python train.py",
        "pip install -c constraints.txt -e '.[test]' && pytest",
    )
    assert first in README and second in README
    script = (ROOT / ".ci/run").read_text()
    assert second in script and "pytest -q -m slow" in script and first in script


def test_every_picture_is_there():
    for name in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / name).is_file(), name


def test_pins_are_the_ones_that_fit_together():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    assert pins["torch"] == "2.13.0" and pins["triton"] == "3.7.1"
    names = {re.match(r"[a-z0-9-]+", each).group() for each in project["dependencies"]}
    assert names == {
        "torch",
        "triton",
        "numpy",
        "tiktoken",
        "wandb",
        "hydra-core",
        "rustbpe",
        "rich",
        "matplotlib",
        "safetensors",
    }
    assert names <= {name.lower().replace("_", "-") for name in pins}


@pytest.mark.slow
def test_the_wheel_holds_the_kernels_alone(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(tmp_path), str(ROOT)],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == {f"nanodistill/kernels/{file.name}" for file in (ROOT / "kernels").glob("*.py")}
    code = "from nanodistill.kernels import linear_topk_kl, linear_topk; print(linear_topk_kl.__module__)"
    env = {"PYTHONPATH": str(wheel)}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path
    )
    assert found.stdout.strip() == "nanodistill.kernels.losses", found.stderr


def test_the_access_table_is_what_the_toy_prints(capsys):
    """README's figures, the closed forms and the sampled table agree; the table itself is printed."""
    t = toy.zipf()
    M, tail = float(t[: toy.K].sum()), float(t[toy.K :].sum())
    rows = toy.rows(t)
    p_1 = {(access, tail): row[0] for access, tail, *row in rows}
    square, inside = float(t.square().sum()), float(t[: toy.K].square().sum())
    variances = {
        "text": 1 - square,
        "sampled": (1 - square) / toy.N,
        "greedy": 0.0,
        "full": 0.0,
        "topk": 0.0,
    }
    variances |= {"unbiased": tail - (square - inside), "residual_to_label": tail**2 * (1 - square)}
    variances["stratified"] = (tail**2 - (square - inside)) / toy.N
    for access, *_, variance, _, _ in rows:
        assert variance == pytest.approx(variances[access], rel=0.02, abs=1e-9), access
    heads = {
        ("topk", "truncate"): 1 / M,
        ("residual_to_label", ""): 1 + tail,
        ("unbiased", ""): 1.0,
        ("text", ""): 1.0,
    }
    for key, factor in heads.items():
        assert p_1[key] == pytest.approx(float(t[0]) * factor, rel=0.05), key
    lines = {
        tuple(cell.strip() for cell in line.split("|")[1:-1])
        for line in README.splitlines()
        if line.startswith("| `")
    }
    shown = {cells[0].strip("`"): cells for cells in lines if len(cells) == 6}
    for access, variance in variances.items():
        assert float(shown[access][4]) == round(variance, 3), (access, variance)
    assert (
        "p_1 = .0827, p_2 = .0414 and .7024" in README
        and f"{t[0]:.4f} {t[1]:.4f} {tail:.4f}" == "0.0827 0.0414 0.7024"
    )
    assert (
        ".1408, .0704 | .4934" in README
        and f"{t[0] * (1 + tail):.4f} {t[1] * (1 + tail):.4f} {tail**2:.4f}"
        == "0.1408 0.0704 0.4934"
    )
    sizes = {"text": 2, "sampled": 24, "topk": 162, "unbiased": 164, "stratified": 186}
    for access, size in sizes.items():
        facts = CacheSpec(access, 50304, 1, {"train": 1}, "", "", "", 64, 12)
        assert facts.row.itemsize == size == int(shown[access][5] or size)
    toy.show()
    assert "A teacher with t_i ~ 1/i" in capsys.readouterr().out


def test_size_budgets():
    """train.py about 350 lines and never over 400, no function over 70 but Triton's, whose arguments are many."""
    import ast

    assert (ROOT / "train.py").read_text().count("\n") <= 400
    for file in [
        *ROOT.glob("*.py"),
        *(file for folder in PARTS for file in (ROOT / folder).glob("*.py")),
    ]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                most = (
                    120
                    if "jit" in [getattr(mark, "id", None) for mark in node.decorator_list]
                    else 70
                )
                assert node.end_lineno - node.lineno < most, f"{file.name}: {node.name}"
