"""What README and docs show is what the scripts take, and what they measure is what was measured.

The slow tests run every command of a page in order, in a checkout of its own, at a small size.
"""

import ast
import csv
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import numpy as np
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
from tests import keys
from tests.test_data_hf_tokenizer import CHATML, byte_level
from tests.test_real_models import save_model

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = ("README.md", "CONTRIBUTING.md", "docs/targets.md", "docs/kernels.md", "docs/runs.md")
TARGETS = (ROOT / "docs/targets.md").read_text()
FIRST = "pip install -c constraints.txt -e . && python train.py"
SECOND = "pip install -c constraints.txt -e '.[test]' && pytest"
# What takes overrides: how its command begins, and its configuration.
SCRIPTS = {
    "train": (("train.py",), Config),
    "sample": (("sample.py",), sample.SampleConfig),
    "eval": (("eval.py",), evaluation.EvalConfig),
    "capture": (("-m", "teachers.capture"), CaptureConfig),
}


PEERS = {
    "cross-entropy": "Trainer",
    "online": "TRL GKD",
    "offline": "DistillKit",
    "teacher": "transformers",
}
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def commands_of(text):
    """The commands of a page's shell blocks, or of a docstring, in their order."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.S)
    lines = "\n".join(blocks).splitlines() or re.findall(r"^(?:python|torchrun) .*", text, re.M)
    commands = []
    for line in lines:
        command, _, _ = line.partition("#")
        commands += [part.strip() for part in command.split("&&")]
    return [command for command in dict.fromkeys(commands) if command]


def list_commands():
    """Every command of the pages and of the scripts' docstrings."""
    texts = [(ROOT / page).read_text() for page in PAGES]
    texts += [module.__doc__ for module in (train, sample, evaluation, report, capture)]
    return sorted({command for text in texts for command in commands_of(text)})


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
        others = r"pip|pytest|ruff|wandb|bash|python (report.py|-m (kernels|tests|teachers.cache))"
        assert re.match(others, command)
        return
    name, words = script
    schema = SCRIPTS[name][1]
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    is_sweep = "-m" in words
    overrides = [cli.in_hydra_grammar(word, is_sweep) for word in words if word[0] != "-"]
    monkeypatch.setattr(schema, "resolve", lambda *_: None, raising=False)  # no models here
    cli.check_jobs(name, overrides, is_sweep)


# What makes a command small, and the larger experiments too. Keys of the command itself stay.
SMALL = {
    "train": "max_steps=2 teacher.max_steps=2 eval_tokens=256 batch_size=4 micro_batch_size=2"
    " model.block_size=32 teacher.model.n_layer=1 data.documents=8 data.max_tokens=16",
    "sample": "max_new_tokens=4",
    "eval": "tokens=256 block_size=32",
    "capture": "eval_tokens=256 block_size=32",
}
ONLY_OF = {"data.documents": "data=written", "data.max_tokens": "data=written"}
SMALLER = {
    "experiment=gpt2_124m": "model.n_layer=1 model.n_head=1 model.n_embd=64 data.tokenizer=ids"
    " data.vocab_size=50257",
    "experiment=shakespeare_char": "model.n_layer=1",
    "model.n_layer=6": "data.vocab_size=400",
}


def runnable(command):
    """Whether a test can run it: CI installs and tests by itself, and W&B needs its server."""
    return command.startswith(("python", "torchrun")) and "kernels.bench" not in command


def make_small(command):
    """The command with overrides that shrink it to seconds."""
    script = split_command(command)
    if script is None:
        return command
    name, words = script
    given = {word.split("=")[0] for word in words}
    extra = SMALL[name].split()
    for text, overrides in SMALLER.items():
        if text in command:
            extra += overrides.split()
    small = [command]
    for override in extra:
        key = override.split("=")[0]
        if key not in given and ONLY_OF.get(key, "") in command:
            small.append(override)
    return " ".join(small)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder with everything of the checkout, and what the pages' commands read."""
    folder = tmp_path_factory.mktemp("checkout")
    for path in ROOT.iterdir():
        if path.name not in ("runs", ".git"):
            (folder / path.name).symlink_to(path)

    story = "The fox and the dog were friends, and nobody knew why it was so. "
    (folder / "my_texts").mkdir()
    for number in range(40):
        (folder / f"my_texts/{number}.txt").write_text(f"Story {number}. " + 20 * story)
    (folder / "input.txt").write_text(200 * story)
    for name in ("chats.jsonl", "other.jsonl"):
        lines = []
        for number in range(200):
            question = {"role": "user", "content": f"two and {number}?"}
            answer = {"role": "assistant", "content": f"it is {2 + number}"}
            lines.append(json.dumps({"messages": [question, answer]}) + "\n")
        (folder / name).write_text("".join(lines))
    (folder / "other.txt").write_text(50 * story)
    for name, width, rows in (("Qwen3-4B", 32, 368), ("Qwen3-0.6B", 16, 352)):
        byte_level(folder / name, SPECIAL_TOKENS, "<|im_end|>", template=CHATML)
        save_model("qwen3", folder / name, rows, width, 1)  # padded, as Qwen's are
    (folder / "openwebtext").mkdir()
    for split in ("train", "val"):
        np.arange(4000, dtype=np.uint16).tofile(folder / f"openwebtext/{split}.bin")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/targets.md", "docs/runs.md"])
def test_every_command_of_a_page_runs_in_order(page, checkout):
    python = Path(sys.executable).parent
    environment = os.environ | {"WANDB_MODE": "offline", "PATH": f"{python}:{os.environ['PATH']}"}
    for command in commands_of((ROOT / page).read_text()):
        if not runnable(command):
            continue
        small = make_small(command)
        result = subprocess.run(
            small, shell=True, cwd=checkout, env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, f"{small}\n{result.stdout[-1000:]}\n{result.stderr[-1000:]}"


@pytest.mark.slow
def test_the_python_of_the_kernels_page_runs(tmp_path):
    page = (ROOT / "docs/kernels.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def read_results(name):
    with open(ROOT / "results" / name, newline="") as stream:
        return list(csv.DictReader(stream))


def without_zero(number, digits, sign=""):
    """A figure as the pages write it: .659 for 0.659."""
    text = f"{float(number):{sign}.{digits}f}"
    return re.sub(r"^([+-]?)0\.", r"\1.", text)


def test_the_readmes_table_is_worth_csv():
    """Each arm's row: loss, difference, loss at the end."""
    rows = [line for line in README.splitlines() if re.match(r"\| `(taught|plain)", line)]
    arms = read_results("worth.csv")
    assert len(rows) == len(arms) == 4
    for row, arm in zip(rows, arms, strict=True):
        figures = [f"{float(arm['loss']):.3f} ± {without_zero(arm['loss_half'], 3)}"]
        if arm["difference"] != "nan":
            difference = without_zero(arm["difference"], 3, "+")
            figures.append(f"{difference} ± {without_zero(arm['difference_half'], 3)}")
        figures.append(f"{float(arm['final']):.3f}")
        cells = [cell.strip(" *") for cell in row.split("|")[2:-1]]
        assert [cell for cell in cells if cell] == figures


def test_the_readmes_gpu_figures_are_kernels_h100_csv():
    rows = read_results("kernels_h100.csv")
    for case in ("linear_topk_kl", "plain compiled"):
        row = next(row for row in rows if row["case"] == case and row["N"] == "16384")
        gib = float(row["peak_mib"]) / 1024
        figures = f"{float(row['ms']):.1f} ms and {gib:.3g} GiB"
        assert figures in README, figures


def test_the_readmes_table_of_peers_is_peers_cpu_csv():
    """Our figures, the peer's, and the peer's over ours, each a median over the rounds."""
    rows = read_results("peers_cpu.csv")
    for arm, peer in PEERS.items():
        cells = []
        for tool in ("ours", peer):
            (row,) = [row for row in rows if (row["arm"], row["tool"]) == (arm, tool)]
            cells.append(f"{float(row['seconds']):.2f} s, {float(row['peak_mib']):,.0f} MiB")
        cells.append(f"{float(row['seconds_ratio']):.2f}, {float(row['peak_mib_ratio']):.2f}")
        assert f"| {' | '.join(cells)} |" in README, cells


def test_the_page_of_keys_is_the_schema():
    """`python -m tests.keys > docs/keys.md` writes it."""
    assert (ROOT / "docs/keys.md").read_text() == keys.page()


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 130


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


def access_table():
    """access -> the cells of its first row in docs/targets.md's table of what each is worth."""
    table = {}
    for line in TARGETS.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 6 and cells[0].startswith("`"):
            table.setdefault(cells[0].strip("`"), cells)
    return table


def test_the_access_table_is_what_the_toy_measures(capsys):
    """The page's figures, the closed forms and the sampled table agree."""
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
    shown = access_table()
    for access, loss_tail, p_1, *_, variance, _, _ in toy.rows(t):
        assert variance == pytest.approx(variances[access], rel=0.02, abs=1e-9), access
        assert float(shown[access][4]) == round(variances[access], 3), access
        if (access, loss_tail) in factors:
            expected = float(t[0]) * factors[access, loss_tail]
            assert p_1 == pytest.approx(expected, rel=0.05), access
    truth = f"p_1 = {t[0]:.4f}, p_2 = {t[1]:.4f} and {tail:.4f}"
    assert truth.replace("0.", ".") in TARGETS
    biased = f"{t[0] * (1 + tail):.4f}, {t[1] * (1 + tail):.4f} | {tail**2:.4f}"
    assert biased.replace("0.", ".") in TARGETS
    toy.show()
    assert "A teacher with t_i ~ 1/i" in capsys.readouterr().out


BYTES = {"greedy": 2, "text": 2, "sampled": 24, "topk": 194, "residual_to_label": 194}
BYTES |= {"unbiased": 196, "stratified": 218}


@pytest.mark.parametrize("access", BYTES)
def test_the_pages_bytes_a_token_are_a_rows(access):
    spec = CacheSpec(access, 50304, 1, {"train": 1}, "", "", "", k=64, n=12)
    assert spec.row.itemsize == BYTES[access] == int(access_table()[access][5])


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
