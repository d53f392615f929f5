"""The mistakes that a newcomer makes first, through the real scripts: each is one line and exit
status 2.

Those that the command line alone finds are in test_engine_cli.py.
"""

import errno
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken
import torch

import eval as evaluation
import sample
import train
from conf.schema import Config
from data.tokenizer import make_tokenizer
from engine import checkpoint
from model import GPT, ModelConfig
from tests.command_line import error_line, start

ROOT = Path(__file__).parent.parent
WORDS = [
    "model.n_layer=1",
    "model.n_embd=16",
    "model.block_size=16",
    "data=text",
    "data.path=text.txt",
    "data.tokenizer=bytes",
    "max_steps=1",
    "eval_tokens=64",
    "batch_size=2",
    "run_dir=run",
    "device=cpu",
]
SCRIPTS = {
    "train": (train.run, Config),
    "sample": (sample.run, sample.SampleConfig),
    "eval": (evaluation.run, evaluation.EvalConfig),
}


def save_model(folder, vocab_size=257, block_size=16):
    GPT(ModelConfig(1, 2, 16, block_size), vocab_size).save_pretrained(Path(folder))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with good and bad texts and models; tiktoken finds no network."""
    monkeypatch.chdir(tmp_path)
    row = {"prompt": "a question", "completion": "an answer"}
    chat = {"messages": [{"role": "user", "content": "a question"}]}
    files = {
        "text.txt": "a text that is long enough for a block or two. " * 20,
        "empty.txt": "\n",
        "binary.txt": "\0\1\2\3",
        "short.txt": "short",
        "rows.jsonl": f"{json.dumps(row)}\n{json.dumps(row | {'completion': ''})}",
        "chats.jsonl": json.dumps(chat),
    }
    for name, text in files.items():
        Path(name).write_text(text)
    Path("folder").mkdir()

    save_model("good")
    make_tokenizer("bytes").save(Path("good"))
    save_model("ids", vocab_size=300)
    make_tokenizer("ids", 300).save(Path("ids"))
    save_model("wrong", vocab_size=2000)
    save_model("narrow", block_size=8)
    Path("mistral").mkdir()
    Path("mistral/config.json").write_text('{"model_type": "mistral"}')
    for step in (1, 2):
        checkpoint.save(Path("corrupt"), step, save_model, {"val_loss": 3.0 - step})
    with open("corrupt/checkpoints/step-00000002/model.safetensors", "ab") as stream:
        stream.write(b"x")

    def no_network(name):
        raise OSError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", no_network)


@pytest.fixture
def refusal(here, monkeypatch, capsys):
    """refusal(script, WORD, ...): the line with which it refuses; nothing was trained."""

    def refused(script, *words):
        line = error_line(monkeypatch, capsys, script, *SCRIPTS[script], words)
        assert not list(Path("runs").glob("*/checkpoints/*"))
        return line

    return refused


# What is typed after WORDS (a later word wins), and the rule that the line says.
TRAIN = {
    "data.path=nowhere.txt": "No such file or directory: 'nowhere.txt'",
    "data.path=null": r"data.path=null: data=text needs data.path",
    "data.path=folder": r"data.path=folder: 0 texts",
    "data.path=empty.txt": r"data.path=empty.txt: 0 texts",
    "data.path=binary.txt": r"data.path=binary.txt: .*not UTF-8.*data=bin",
    "data.path=short.txt": r"model.block_size=16: \d train tokens do not fill .*more text",
    "data.path=rows.jsonl loss=ce": r"data.path=.*rows.jsonl:2: .*completion",
    "data.path=chats.jsonl loss=ce": r"data.path=.*chats.jsonl:1: .*assistant",
    "data=stdlib": r"data.path=text.txt: data=stdlib does not .*set data=text",
    "data.max_tokens=9": r"data.max_tokens=9: data=text does not .*written",
    "data.tokenizer=bpe data.vocab_size=255": r"data.vocab_size=255: .* at least 257",
    "data.tokenizer=gpt2": r"data.tokenizer=gpt2: .*TIKTOKEN_CACHE_DIR",
    "data.tokenizer=gpt-2": r"data.tokenizer=gpt-2: .*one of .*did you mean gpt2\?",
    "data.tokenizer=wrong": r"wrong: no tokenizer.json .*data.tokenizer",
    "access.k=258": r"access.k=258: access.k must be at most 257",
    "teacher=cache": r"teacher.path=null: teacher=cache needs",
    "teacher.path=nobody": r"teacher.path=nobody: neither a model's folder",
    "teacher.path=narrow": r"teacher.path=narrow: it reads at most 8 tokens; set .*block_size",
    "teacher.path=wrong": r"teacher.path=wrong: its vocabulary .2000 .*set data.tokenizer to",
    "teacher.path=corrupt": r"step-00000002 is corrupt.*newest good one is .*step-00000001",
    "teacher.path=mistral": r"teacher.path=mistral: model_type=mistral is not supported; .*gpt2",
    "loss=ce resume=corrupt/checkpoints/step-00000002": r"resume=.*corrupt.*newest good one is",
    "loss=ce model.init=good model.n_layer=2": r"model.n_layer=2: model.init=good has .*=1; leave",
    "loss=ce model.init=narrow": r"model.block_size=16: narrow reads at most 8 tokens",
    "loss=ce model.vocab_size=256": r"model.vocab_size=256: the tokenizer has 257 tokens",
    "loss=ce run_dir=text.txt/run": r"Not a directory: 'text.txt/run'",
    "loss=ce micro_batch_size=3": r"batch_size=2: must be a multiple of micro_batch_size x ranks",
    "model.n_head=3": r"model.n_embd=16: must be a multiple of model.n_head=3",
    "model.n_head=4 model.n_kv_head=3": r"model.n_kv_head=3: must divide model.n_head=4",
}


@pytest.mark.parametrize("words", TRAIN)
def test_training_mistakes(refusal, words):
    assert re.search(f"^error: .*{TRAIN[words]}", refusal("train", *WORDS, *words.split()))


TEXT = "path=good device=cpu data=text data.path=text.txt"
OTHERS = {
    "sample path=nowhere": r"path=nowhere: neither a model",
    "sample path=good top_q=3": r"did you mean top_[pk]\?",
    "sample path=ids prompt=a device=cpu": r"data.tokenizer=ids: cannot read text",
    f"sample path=good prompt={'long,' * 40} device=cpu": r"prompt: .* reads at most 16",
    "eval path=good": r"no run.s config.yaml there; say which text",
    "eval path=good data.path=x": r"data.path='x': .* not set; set the group too: data=text",
    "eval path=good data=text data.path=x": "No such file or directory: 'x'",
    f"eval {TEXT} data.tokenizer=ids": r"data.tokenizer=ids: cannot read text",
    f"eval {TEXT} data.tokenizer=/nope": r"data.tokenizer=/nope: .*one of ",
    f"eval {TEXT} teacher.path=ids": r"teacher.path=ids: its vocab.* with the vocabulary of good",
}


@pytest.mark.parametrize("words", OTHERS)
def test_sampling_and_evaluation_mistakes(refusal, words):
    assert re.search(f"^error: .*{OTHERS[words]}", refusal(*words.split()))


def test_a_device_that_is_not_there(refusal, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "device=cuda: this machine has none" in refusal("train", *WORDS, "device=cuda")


def test_run_dir_of_another_config(refusal, monkeypatch, capsys):
    start(monkeypatch, "train", *SCRIPTS["train"], [*WORDS, "loss=ce"])
    capsys.readouterr()
    line = refusal("train", *WORDS, "loss=ce", "optim.lr=0.5")
    rule = r"run_dir=run: holds a run with optim.lr=[\d.]+, this one has optim.lr=0.5; give another"
    assert re.search(rule, line)


@pytest.mark.parametrize(
    "module, name",
    [("run_dir", "config.yaml"), ("logger", "metrics.jsonl"), ("checkpoint", "summary.json")],
)
def test_a_full_disk(refusal, monkeypatch, module, name):
    def write_atomic(file, text):
        if file.name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        file.write_text(text)

    monkeypatch.setattr(f"engine.{module}.write_atomic", write_atomic)
    line = refusal("train", *WORDS, "loss=ce")
    assert line == "error: [Errno 28] No space left on device"


@pytest.mark.parametrize(
    "words, message",
    [
        ("report.py nowhere", "error: nowhere: no run there"),
        ("report.py folder", "error: folder: no run there"),
        (
            "train.py data=text data.path=nowhere.txt",
            "error: [Errno 2] No such file",
        ),
    ],
)
def test_the_real_scripts_say_it_too(here, words, message):
    script, *words = words.split()
    command = [sys.executable, str(ROOT / script), *words]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stdout
