"""The mistakes that a newcomer makes first: each is one line that says what to do, exit status 2, and no traceback."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken
import torch
from hydra.core.global_hydra import GlobalHydra

import eval as evaluation
import sample
import train
from conf.schema import Config
from data.tokenizer import Tokenizer
from engine import checkpoint, cli
from model import GPT, ModelConfig

ROOT = Path(__file__).parent.parent
SIZES = [
    "model.n_layer=1",
    "model.n_embd=16",
    "model.block_size=16",
    "data=text",
    "data.path=text.txt",
    "data.tokenizer=bytes",
    "max_steps=1",
]
SIZES += ["eval_tokens=64", "batch_size=2", "run_dir=run", "device=cpu"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("a text that is long enough for a block or two. " * 20)
    Path("empty.txt").write_text("\n")
    Path("binary.txt").write_bytes(b"\0\1\2\3")
    Path("short.txt").write_text("short")
    Path("folder").mkdir()
    rows = [
        {"prompt": "a question", "completion": "an answer"},
        {"prompt": "a question", "completion": ""},
    ]
    Path("rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    Path("chats.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "a question"}]})
    )
    for name, vocab_size, block_size in (("wrong", 300, 16), ("narrow", 257, 8), ("good", 257, 16)):
        GPT(ModelConfig(1, 2, 16, block_size), vocab_size).save_pretrained(Path(name))
    Tokenizer({"kind": "bytes"}).save(Path("good"))
    Path("mistral").mkdir()
    Path("mistral/config.json").write_text('{"model_type": "mistral"}')

    def write(folder):
        GPT(ModelConfig(1, 2, 16, 16), 257).save_pretrained(folder)

    for step in (1, 2):
        checkpoint.save(Path("corrupt"), step, write, {"val_loss": 3.0 - step})
    with open("corrupt/checkpoints/step-00000002/model.safetensors", "ab") as stream:
        stream.write(b"x")
    return tmp_path


def call(monkeypatch, capsys, name, run, schema, words):
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main(name, run, schema)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert caught.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def last(word):
    return [*[size for size in SIZES if size.split("=")[0] != word.split("=")[0]], word]


TRAIN = {
    "bad path": (last("data.path=nowhere.txt"), r"data.path=nowhere.txt: no such file or folder"),
    "no path": (
        [word for word in SIZES if "path" not in word],
        r"data.path=null: data=text needs a file or folder",
    ),
    "empty folder": (last("data.path=folder"), r"data.path=folder: the folder holds no files"),
    "empty corpus": (last("data.path=empty.txt"), r"data.path=empty.txt: no text in 1 file"),
    "binary file": (last("data.path=binary.txt"), r"data.path=binary.txt: .*binary.*data=bin"),
    "text too short": (
        last("data.path=short.txt"),
        r"model.block_size=16: the training text has \d tokens.*give more text",
    ),
    "vocabulary below 256": (
        [*last("data.tokenizer=bpe"), "data.vocab_size=255"],
        r"data.vocab_size=255: bpe needs at least 257",
    ),
    "a path that is not read": (
        ["data.path=text.txt"],
        r"data.path=text.txt: only data=text or .*data=stdlib; set",
    ),
    "a key of written text": (
        [*SIZES, "data.max_tokens=9"],
        r"data.max_tokens=9: only data=written reads it, .*data=text; ",
    ),
    "no network": (last("data.tokenizer=gpt2"), r"data.tokenizer=gpt2: .*TIKTOKEN_CACHE_DIR"),
    "unknown tokenizer": (
        last("data.tokenizer=gpt-2"),
        r"data.tokenizer=gpt-2: one of .*did you mean gpt2\?",
    ),
    "k beyond the vocabulary": (
        [*SIZES, "access.k=258"],
        r"access.k=258: the vocabulary has 257 tokens; set access.k=257",
    ),
    "context too long": (
        [*SIZES, "teacher.path=narrow"],
        r"model.block_size=16: the teacher at narrow reads at most 8",
    ),
    "wrong teacher": (
        [*SIZES, "teacher.path=wrong"],
        r"teacher.path=wrong: its vocabulary is 300, the student's 257",
    ),
    "no such teacher": ([*SIZES, "teacher.path=nobody"], r"teacher.path=nobody: no such folder"),
    "corrupt teacher": (
        [*SIZES, "teacher.path=corrupt"],
        r"checkpoint step-00000002 is corrupt.*newest good one is .*step-00000001",
    ),
    "corrupt checkpoint": (
        [*SIZES, "loss=ce", "resume=corrupt/checkpoints/step-00000002"],
        r"resume=.*corrupt.*newest good one is .*step-00000001",
    ),
    "no teacher for the loss": (
        [*SIZES, "teacher=none"],
        r"teacher=none: loss=topk_kl needs a teacher",
    ),
    "unwritable directory": (
        [*last("run_dir=text.txt/run"), "loss=ce"],
        r"run_dir=text.txt/run: cannot write there",
    ),
    "mistyped key": (
        [*SIZES, "optim.lrate=1"],
        r"optim.lrate=1: no such key; did you mean optim.lr",
    ),
    "an option that is none": ([*SIZES, "loss=null"], r"loss=null: loss is one of ce, topk_kl"),
    "an experiment that is none": (
        [*SIZES, "experiment=None"],
        r"experiment=null: experiment is one of .*toy",
    ),
    "a sweep without -m": (
        [*SIZES, "optim.lr=0.1,0.2"],
        r"optim.lr=0.1,0.2: several values are a sweep; put -m before",
    ),
    "mistyped option": ([*SIZES, "loss=kl"], r"loss=kl: loss is one of ce, topk_kl"),
    "wrong kind": ([*SIZES, "max_steps=many"], r"max_steps=many: max_steps takes a whole number"),
    "added key": ([*SIZES, "+foo=1"], r"\+foo=1: keys are neither added nor removed"),
    "a model of another family": (
        [*SIZES, "teacher.path=mistral"],
        r"teacher.path=mistral: model_type=mistral is not supported; this version reads gpt2, llama, qwen2, qwen3",
    ),
    "nothing to start from": (
        [*SIZES, "loss=ce", "model.init=nobody"],
        r"model.init=nobody: no such folder",
    ),
    "start too short": (
        [*SIZES, "loss=ce", "model.init=narrow"],
        r"model.block_size=16: narrow reads at most 8 tokens",
    ),
    "a shape beside a start": (
        [*SIZES, "loss=ce", "model.init=good", "model.n_layer=2"],
        r"model.n_layer=2: model.init=good has model.n_layer=1; leave model.n_layer=2 out",
    ),
    "too few rows": (
        [*SIZES, "loss=ce", "model.vocab_size=256"],
        r"model.vocab_size=256: the tokenizer has 257 tokens",
    ),
    "a row without an answer": (
        [*last("data.path=rows.jsonl"), "loss=ce"],
        r"data.path=.*rows.jsonl:2: .*completion",
    ),
    "a chat without an answer": (
        [*last("data.path=chats.jsonl"), "loss=ce"],
        r"data.path=.*chats.jsonl:1: .*assistant",
    ),
    "no tokenizer there": (
        last("data.tokenizer=wrong"),
        r"data.tokenizer=wrong: neither .*tokenizer.json there; give another folder",
    ),
    "unknown optimizer": ([*SIZES, "optim=lion"], r"optim=lion: optim is one of adamw, muon"),
    "kv heads do not divide": (
        [*SIZES, "model.n_head=4", "model.n_kv_head=3"],
        r"model.n_kv_head=3: must divide model.n_head=4",
    ),
    "mistyped experiment": (
        [*SIZES, "experiment=distill_llama"],
        r"experiment=distill_llama: .*did you mean distil_llama",
    ),
    "heads do not divide": (
        [*SIZES, "model.n_head=3"],
        r"model.n_embd=16: must be a multiple of model.n_head=3",
    ),
    "batch does not divide": (
        [*SIZES, "micro_batch_size=3", "loss=ce"],
        r"batch_size=2: must be a multiple of micro_batch_size x ranks",
    ),
}


@pytest.mark.parametrize("case", TRAIN)
def test_training_mistakes(here, monkeypatch, capsys, case):
    words, rule = TRAIN[case]
    monkeypatch.setattr(
        tiktoken, "get_encoding", lambda name: (_ for _ in ()).throw(OSError("no network"))
    )
    assert re.search(rule, call(monkeypatch, capsys, "train", train.run, Config, words))
    assert not list(
        Path("runs").glob("teacher-*/checkpoints/*")
    )  # refused before anything was trained


def test_a_device_that_is_not_there(here, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "device=cuda: this machine has none" in call(
        monkeypatch, capsys, "train", train.run, Config, last("device=cuda")
    )


def test_run_dir_of_another_config(here, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", *SIZES, "loss=ce"])
    cli.main("train", train.run, Config)
    capsys.readouterr()
    line = call(
        monkeypatch, capsys, "train", train.run, Config, [*SIZES, "loss=ce", "optim.lr=0.5"]
    )
    assert re.search(
        r"run_dir=run: holds a run with optim.lr=[0-9.]+, this one has optim.lr=0.5; give another run_dir",
        line,
    )


@pytest.mark.parametrize(
    "module, name",
    [("run_dir", "config.yaml"), ("logger", "metrics.jsonl"), ("checkpoint", "summary.json")],
)
def test_a_full_disk_is_one_line(here, monkeypatch, capsys, module, name):
    def full(file, text):
        if file.name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        file.write_text(text)

    monkeypatch.setattr(f"engine.{module}.write_atomic", full)
    line = call(monkeypatch, capsys, "train", train.run, Config, [*SIZES, "loss=ce"])
    assert f"run_dir=run: cannot write {name} (No space left on device); make room" in line


def test_sampling_and_evaluation_mistakes(here, monkeypatch, capsys):
    GPT(ModelConfig(1, 2, 16, 16), 300).save_pretrained(Path("ids"))
    Tokenizer({"kind": "ids", "vocab_size": 300}).save(Path("ids"))
    text = ["path=good", "data=text", "data.path=text.txt", "device=cpu"]
    for words, rule in (
        (["path=nowhere"], "path=nowhere: no such folder"),
        (["path=folder"], "path=folder: neither a model"),
        (["path=good", "top_q=3"], r"top_q=3: no such key; did you mean top_[pk]\?"),
        (["path=ids", "prompt=a", "device=cpu"], "prompt='a': .*ids alone.*leave prompt out"),
        (
            ["path=good", f"prompt={'long, long ' * 20}", "device=cpu"],
            "prompt: .* the model reads at most 15",
        ),
    ):
        assert re.search(
            rule, call(monkeypatch, capsys, "sample", sample.run, sample.SampleConfig, words)
        )
    for words, rule in (
        (["path=good"], "no run.s config.yaml there; say which text"),
        (["path=good", "data=text", "data.path=x"], "data.path=x: no such file"),
        (
            [*text, "data.tokenizer=ids"],
            "data.tokenizer=ids: good reads text by its own tokenizer, bytes; leave",
        ),
        ([*text, "data.tokenizer=/nope"], "data.tokenizer=/nope: one of "),
        (
            [*text, "teacher.path=ids"],
            "teacher.path=ids: it reads tokens of ids .*; give a teacher of .* path=good",
        ),
        (
            ["path=good", "data.path=x"],
            "data.path=.*x.*: data is not chosen; set data= too, one of bin, .*text",
        ),
    ):
        assert re.search(
            rule, call(monkeypatch, capsys, "eval", evaluation.run, evaluation.EvalConfig, words)
        )


def test_report_mistakes(here):
    for words, rule in (
        (["nowhere"], "nowhere: no run there"),
        (["folder"], "folder: no run there"),
    ):
        result = subprocess.run(
            [sys.executable, str(ROOT / "report.py"), *words], capture_output=True, text=True
        )
        assert result.returncode == 2 and rule in result.stderr and "Traceback" not in result.stderr


def test_a_bug_keeps_its_traceback(here, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", *SIZES])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def bug(config):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        cli.main("train", bug, Config)


def test_the_real_script_says_it_too(here):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *last("data.path=nowhere.txt")],
        capture_output=True,
        text=True,
        env=env,
    )
    assert (
        result.returncode == 2
        and result.stderr.count("\n") == 1
        and "Traceback" not in result.stderr + result.stdout
    )
    assert json.dumps(result.stderr).startswith('"error: data.path=nowhere.txt')
