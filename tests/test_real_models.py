"""Teachers and students of transformers' own families, trained end to end by train.py."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import train
from conf.schema import Config
from data import Batches, DataConfig, prepare
from engine.logger import read_metrics
from engine.optim import OptimConfig
from model import GPT, ModelConfig
from model.loss import LossConfig
from teachers.online import TeacherConfig
from tests.helpers import assert_close

ROOT = Path(__file__).parent.parent
TEXT = "the quick brown fox jumps over the lazy dog, and what it says is another matter. " * 200
FAMILIES = ("gpt2", "llama", "qwen2", "qwen3")


def save_model(kind, folder, vocab_size, width, layers):
    """A randomly initialised model as people have it on disk."""
    shape = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "head_dim": width // 4,
    }
    if kind == "gpt2":
        shape = {"n_embd": width, "n_layer": layers, "n_head": 4, "n_positions": 256}
        shape |= {"bos_token_id": None, "eos_token_id": None}
    if kind == "llama":
        shape["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
    config = transformers.AutoConfig.for_model(kind, vocab_size=vocab_size, **shape)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A run of two steps on bytes that starts from the model in init/."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    return Config(
        data=DataConfig(name="text", path="text.txt", tokenizer="bytes", cache_dir="tokens"),
        model=ModelConfig(block_size=16, init="init"),
        teacher=TeacherConfig(kind="none"),
        loss=LossConfig(name="ce"),
        optim=OptimConfig(lr=1e-2, warmup_steps=0),
        batch_size=8,
        max_steps=2,
        eval_tokens=256,
        run_dir="run",
        device="cpu",
    )


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_student_starts_from_a_folder_and_saves_back_into_one(kind, config):
    save_model(kind, "init", 264, 32, 2)  # padded past the 257 bytes
    theirs = transformers.AutoModelForCausalLM.from_pretrained("init").eval()
    blocks = prepare(config.data, say=lambda line: None).blocks("train", config.model.block_size)
    batch = Batches(blocks, config.batch_size, config.seed).batch(0)
    logits = theirs(batch.ids).logits.flatten(0, 1)[:, :257]
    want = torch.nn.functional.cross_entropy(logits, batch.labels.flatten())
    config.resolve([])
    assert config.model.dropout == 0  # GPT-2's config.json says .1
    train.run(config)
    first = read_metrics(Path("run"))[0]
    assert first["ce"] == pytest.approx(want.item(), rel=1e-4)

    (folder,) = Path("run/checkpoints").glob("*2")
    trained = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert trained.config.model_type == kind
    assert trained.config.eos_token_id == 256
    assert trained.dtype == torch.float32
    ours = GPT.from_pretrained("run").eval()
    logits = trained(batch.ids).logits
    assert_close(ours(batch.ids), logits, rtol=0, atol=1e-4)
    assert not torch.equal(logits, theirs(batch.ids).logits)


WORDS = """
device=cpu data=bin data.path=bins data.tokenizer=ids data.vocab_size=151936 max_steps=3
eval_tokens=256 optim.warmup_steps=0 teacher.path=teacher wandb=disabled model.n_layer=2
model.n_head=2 model.n_embd=8 model.block_size=128 access.k=16 loss.temperature=2
"""


def distil(run_dir, batch_size):
    """Peak memory in bytes of train.py in a process of its own."""
    words = [*WORDS.split(), f"run_dir={run_dir}", f"batch_size={batch_size}"]
    env = {**os.environ, "OMP_NUM_THREADS": "2"}
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *words], env=env)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    return usage.ru_maxrss * 1024


@pytest.mark.slow
def test_a_teacher_of_ten_million_parameters_distils(tmp_path, monkeypatch):
    """With 151,936 entries eight times the rows cost an eighth of one [N,V] array at most."""
    monkeypatch.chdir(tmp_path)
    save_model("qwen3", "teacher", 151936, 64, 2)
    Path("bins").mkdir()
    ids = np.random.default_rng(0).integers(2**16, size=30000).astype(np.uint16)
    for split in ("train", "val"):
        ids.tofile(f"bins/{split}.bin")
    few = distil("few", 2)
    many = distil("many", 16)
    logits = 16 * 128 * 151936 * 4  # 1.2 GB
    assert many - few < logits / 8 + 300e6
    *_, last = read_metrics(Path("many"))
    assert 0 < last["teacher_mass"] < 1
    assert last["val_kl"] > 0
