"""The mistakes that a newcomer makes first, through the real scripts: each is one line and exit
status 2.

Those that the command line alone finds are in test_engine_cli.py.
"""

import errno
import gc
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
import tiktoken
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra

import eval as evaluation
import sample
import train
from conf.schema import Config
from data.tokenizer import make_tokenizer
from engine import UserError, checkpoint, cli
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
    "data.path=nowhere.txt": "data.path=nowhere.txt: no such file or folder",
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
    "teacher.path=nobody": r"teacher.path=nobody: no such folder",
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
    "sample path=nowhere": r"path=nowhere: no such folder",
    "sample path=good top_q=3": r"did you mean top_[pk]\?",
    "sample path=ids prompt=a device=cpu": r"data.tokenizer=ids: cannot read text",
    f"sample path=good prompt={'long,' * 40} device=cpu": r"prompt: .* reads at most 16",
    "eval path=good": r"no run.s config.yaml there; say which text",
    "eval path=good data.path=x": r"data.path='x': .* not set; set the group too: data=text",
    "eval path=good data=text data.path=x": "data.path=x: no such file or folder",
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


# What is typed after WORDS, what the line advises, and the words of somebody who follows it.
ADVICE = [
    (
        "teacher.path=narrow",
        "set model.block_size .* to 8 or less",
        "teacher.path=narrow model.block_size=8",
    ),
    ("teacher.path=good access.k=258", "at most 257", "teacher.path=good access.k=257"),
    (
        "loss=ce model.init=narrow",
        "set that or less",
        "loss=ce model.init=narrow model.block_size=8",
    ),
    ("loss=ce model.init=good model.n_head=1", "leave model.n_head=1 ", "loss=ce model.init=good"),
    ("loss=ce model.vocab_size=9", "has 257 tokens", "loss=ce model.vocab_size=257"),
    ("loss=ce data.tokenizer=bpe data.vocab_size=9", "at least 257", "loss=ce data.vocab_size=257"),
    ("loss=ce micro_batch_size=3", "batch_size=2: must be a multiple of", "loss=ce batch_size=3"),
    ("loss=ce optim.lr=1e30 max_steps=4", "lower optim.lr", "loss=ce run_dir=new max_steps=4"),
    ("loss=ce resume=good", "model.init=good, without resume", "loss=ce model.init=good"),
]


def overrides(*words):
    return [cli.in_hydra_grammar(word, "-m" in words) for word in words if word != "-m"]


def run_training(*words):
    """train.py's work, without the command line around it."""
    gc.collect()  # an error's traceback holds the run's lock
    with hydra.initialize_config_dir(str(cli.FOLDER), version_base="1.3"):
        config = cli.compose("train", overrides(*WORDS, "baseline=off", *words))
    train.run(config)


@pytest.fixture
def schema():
    GlobalHydra.instance().clear()
    ConfigStore.instance().store(name="train_schema", node=Config)


@pytest.mark.slow
@pytest.mark.parametrize("words, advice, followed", ADVICE)
def test_who_follows_the_advice_goes_on(here, schema, words, advice, followed):
    with pytest.raises(UserError, match=advice):
        run_training(*words.split())
    shutil.rmtree("run", ignore_errors=True)  # of a run that had begun
    run_training(*followed.split())


# After `train.py loss=ce run_dir=run`; `new` is another run_dir.
ADVICE_ON_A_RUN = [
    ("optim.lr=0.5", "give another run_dir", "optim.lr=0.5 run_dir=new"),
    ("resume=never", "resume=auto goes on with them", "resume=auto"),
    ("resume=never", "or give another run_dir", "resume=never run_dir=new"),
    ("data.path=b.txt", "set data.path=text.txt, or", "data.path=text.txt"),
    ("data.path=b.txt", "give another run_dir", "data.path=b.txt run_dir=new"),
    (
        "run_dir=new resume=run model.n_head=2",
        "set model.n_head=1 model.n_kv_head=1 model.head_dim=16",
        "run_dir=new resume=run model.n_head=1 model.n_kv_head=1 model.head_dim=16",
    ),
    ("run_dir=new resume=run optim=muon", "optim=adamw; set", "run_dir=new resume=run optim=adamw"),
    (
        "run_dir=new resume=run data.path=b.txt",
        "or start from its weights by model.init=run, without resume",
        "run_dir=new model.init=run data.path=b.txt",
    ),
]


def test_who_follows_the_advice_on_a_run_goes_on(here, schema):
    Path("b.txt").write_text("another text, long enough for a block or two. " * 20)
    run_training("loss=ce")
    for words, advice, followed in ADVICE_ON_A_RUN:
        shutil.rmtree("new", ignore_errors=True)
        with pytest.raises(UserError, match=advice):
            run_training("loss=ce", *words.split())
        shutil.rmtree("new", ignore_errors=True)
        run_training("loss=ce", *followed.split())


# The same where the command line alone tells.
ADVICE_ON_WORDS = [
    ("optim.lrr=1", "did you mean optim.lr?", "optim.lr=1"),
    ("lr=1", "did you mean optim.lr?", "optim.lr=1"),
    ("loss=topk", "did you mean topk_kl?", "loss=topk_kl"),
    ("+optim.lr=1", "write KEY=VALUE", "optim.lr=1"),
    ("wandb.name=a(b", "special characters in quotes", "wandb.name='a(b'"),
    ("wandb.name=a,b", "put -m before, or quote them", "wandb.name='a,b'"),
    ("wandb.name=a,b", "put -m before, or quote them", "-m wandb.name=a,b"),
    ("optim.lr=interval(1,2)", "list values (0.1,0.2)", "-m optim.lr=0.1,0.2"),
    ("optim.lr=interval(1,2)", "use range(1,5)", "-m optim.lr=range(1,5)"),
    ("-m run_dir=a,b", "give one (in quotes where it has a comma)", "-m run_dir='a,b'"),
    ("access=text loss.tail=ghost", "leave loss.tail out, or", "access=text"),
    ("access=text loss.tail=ghost", "or set access=topk", "access=topk loss.tail=ghost"),
    ("access=text loss.temperature=2", "leave loss.temperature out", "access=text"),
    ("access=text loss.temperature=2", "or set access=topk", "access=topk loss.temperature=2"),
    ("loss.divergence=tv loss.tail=smooth", "leave loss.divergence out", "loss.tail=smooth"),
    ("loss.divergence=tv loss.tail=smooth", "set loss.tail=ghost", "loss.divergence=tv"),
    ("model.n_head=3", "n_embd=64: must be a multiple of", "model.n_head=3 model.n_embd=63"),
    ("data=text", "needs data.path=FILE_OR_FOLDER", "data=text data.path=x"),
    ("data=stdlib data.path=x", "set data=text", "data=text data.path=x"),
    ("teacher=none", "set teacher=online, or loss=ce", "teacher=online"),
    ("teacher=none", "set teacher=online, or loss=ce", "teacher=none loss=ce"),
    ("data=text data.path=x data.prompts=y", "or written", "data=written"),
    ("optim.grad_clip=-1", "at least 0", "optim.grad_clip=0"),
    ("loss.temperature=1e9", "at most 1000000.0", "loss.temperature=1e6"),
    ("seed=100000000000000000000", "below 2^63", "seed=9223372036854775807"),
]


@pytest.mark.parametrize("words, advice, followed", ADVICE_ON_WORDS)
def test_who_follows_the_advice_on_words_goes_on(schema, words, advice, followed):
    with pytest.raises(UserError) as caught:
        check_words(*words.split())
    assert advice in str(caught.value)
    check_words(*followed.split())


def check_words(*words):
    """What the command line does before the first job."""
    cli.check_jobs("train", overrides(*words), "-m" in words)


@pytest.mark.parametrize(
    "words, message",
    [
        ("report.py nowhere", "error: nowhere: no run there"),
        ("report.py folder", "error: folder: no run there"),
        (
            "train.py data=text data.path=nowhere.txt",
            "error: data.path=nowhere.txt: no such file or folder",
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
