"""Teachers and students that people have: every family distils end to end, starts, pads, refuses, and saves back."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

import train
from conf.schema import Config
from data import DataConfig, prepare
from data.tokenizer import Tokenizer
from engine import UserError
from engine.logger import read_metrics
from engine.optim import OptimConfig
from engine.ranks import Ranks
from model import GPT, ModelConfig
from model.loss import LossConfig
from model.metrics import row_measures
from teachers.online import AccessConfig, TeacherConfig, load_teacher, make_student
from tests.helpers import assert_close

ROOT = Path(__file__).parent.parent
TEXT = (
    "the quick brown fox jumps over the lazy dog, and what it says is another matter altogether. "
    * 200
)
LLAMA = {"norm": "rmsnorm", "mlp": "swiglu", "bias": "none", "rope_theta": 10000.0}
ACCESS_KINDS = {
    "gpt2": {"bos_token_id": None, "eos_token_id": None},
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "qwen2": {},
    "qwen3": {},
}


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    return Config(
        data=DataConfig(name="text", path="text.txt", tokenizer="bytes", cache_dir="tokens"),
        model=ModelConfig(n_layer=1, n_embd=16, n_head=2, block_size=16),
        teacher=TeacherConfig(kind="none"),
        loss=LossConfig(name="ce"),
        access=AccessConfig(k=8),
        optim=OptimConfig(lr=1e-2, warmup_steps=0),
        batch_size=8,
        max_steps=2,
        eval_tokens=256,
        run_dir="run",
        device="cpu",
    )


@pytest.fixture
def tokens(config):
    return prepare(config.data, say=lambda line: None, progress=False)


def folder(
    kind: str, path: Path, vocab_size: int, width: int, layers: int, positions: int = 256
) -> Path:
    """A randomly initialised model of transformers' own, as people have it on disk."""
    shape = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
    }
    shape |= {
        "num_key_value_heads": 2,
        "max_position_embeddings": positions,
        "head_dim": width // 4,
    }
    if kind == "gpt2":
        shape = {"n_embd": width, "n_layer": layers, "n_head": 4, "n_positions": positions}
    described = transformers.AutoConfig.for_model(
        kind, vocab_size=vocab_size, **shape, **ACCESS_KINDS[kind]
    )
    transformers.AutoModelForCausalLM.from_config(described).save_pretrained(path)
    return path


def distil(path: Path, *words: str) -> tuple[int, list[dict]]:
    """Peak memory in bytes and the metrics of train.py in a process of its own."""
    code = "import resource, runpy, sys; sys.argv = ['train.py', *sys.argv[1:]]; sys.path.insert(0, {root!r});"
    code += "runpy.run_path({root!r} + '/train.py', run_name='__main__');"
    code += "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    run = [
        sys.executable,
        "-c",
        code.format(root=str(ROOT)),
        "device=cpu",
        "data=bin",
        "data.path=bins",
        "data.tokenizer=ids",
    ]
    run += [
        "max_steps=3",
        "eval_tokens=256",
        "optim.warmup_steps=0",
        f"teacher.path={path}",
        "wandb=disabled",
        *words,
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "2"}
    result = subprocess.run(run, capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr
    found = next(word for word in words if word.startswith("run_dir=")).split("=")[1]
    return int(result.stdout.rsplit("peak", 1)[1]), read_metrics(Path(found))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ACCESS_KINDS)
def test_a_teacher_of_ten_million_parameters_distils_and_no_logits_exist_whole(
    kind, config, tmp_path
):
    """One with 151,936 entries: eight times the rows cost an eighth of one [N,V] array at most."""
    vocab_size, width, layers = (151936, 64, 2) if kind == "qwen3" else (8192, 320, 7)
    folder(kind, tmp_path / "teacher", vocab_size, width, layers)
    size = GPT.from_pretrained(tmp_path / "teacher").num_params()
    assert 8e6 < size < 20e6
    Path("bins").mkdir()
    ids = torch.randint(vocab_size if kind != "qwen3" else 2**16, (40000,)).numpy().astype("uint16")
    ids[:30000].tofile("bins/train.bin"), ids[30000:].tofile("bins/val.bin")
    words = [
        f"data.vocab_size={vocab_size}",
        "model.n_layer=2",
        f"model.n_embd={8 if kind == 'qwen3' else 64}",
    ]
    words += ["model.n_head=2", "model.block_size=128", "access.k=16", "loss.temperature=2"]
    small, _ = distil(tmp_path / "teacher", *words, "batch_size=2", "run_dir=small")
    large, rows = distil(tmp_path / "teacher", *words, "batch_size=16", "run_dir=large")
    assert GPT.from_pretrained("large").num_params() < 1.6e6
    assert (
        all(0 < row["loss"] < 100 and 0 < row["teacher_mass"] < 1 for row in rows)
        and len(rows) == 3
    )
    assert rows[-1]["val_kl"] > 0
    whole = 16 * 128 * vocab_size * 4  # 1.2 GB at 151,936 entries
    if kind == "qwen3":
        assert large - small < whole / 8 + 300e6, (
            f"{(large - small) / 1e6:.0f} MB more for {whole / 1e6:.0f} MB of logits"
        )


@pytest.mark.parametrize("kind", ACCESS_KINDS)
def test_a_student_starts_from_a_folder_and_saves_back_into_one(kind, config, tokens, tmp_path):
    folder(kind, tmp_path / "init", tokens.vocab_size + 7, 32, 2)
    config = replace(config, model=ModelConfig(block_size=16, init=str(tmp_path / "init")))
    config.resolve([])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "init").eval()
    trainer = train.Trainer(config, Ranks(), tokens)
    batch = trainer.batches.batch(0)
    want = torch.nn.functional.cross_entropy(
        theirs(batch.ids).logits.flatten(0, 1), batch.labels.flatten()
    )
    assert trainer.train_step(batch)()["ce"] == pytest.approx(want.item(), rel=1e-4)
    train.fit(config, Ranks(), tokens)
    trained = transformers.AutoModelForCausalLM.from_pretrained(
        next(Path("run/checkpoints").glob("*2"))
    ).eval()
    assert trained.config.model_type == kind and trained.dtype == torch.float32
    assert trained.config.eos_token_id == tokens.tokenizer.eot
    assert_close(
        GPT.from_pretrained("run").eval()(batch.ids), trained(batch.ids).logits, rtol=0, atol=1e-4
    )
    assert (
        trainer.student.config.dropout == 0.0
    )  # GPT-2's config.json says .1: model.dropout decides
    assert not torch.equal(trained(batch.ids).logits, theirs(batch.ids).logits)
    manifest = json.loads(next(Path("run/checkpoints").glob("*2/manifest.json")).read_text())
    assert len(manifest["fingerprints"]["init"]) == 64


def test_a_teacher_in_bfloat16_stays_in_it(config, tokens, tmp_path):
    folder("llama", tmp_path / "teacher", tokens.vocab_size, 32, 2)
    GPT.from_pretrained(tmp_path / "teacher").bfloat16().save_pretrained(tmp_path / "half")
    teacher = load_teacher(tmp_path / "half", tokens, 16, config.access)
    trainer = train.Trainer(
        replace(config, loss=LossConfig(), teacher=TeacherConfig()), Ranks(), tokens, teacher
    )
    row = trainer.train_step(trainer.batches.batch(0))()
    assert {param.dtype for param in teacher.model.parameters()} == {torch.bfloat16}
    student = make_student(
        ModelConfig(init=str(tmp_path / "half"), block_size=16), tokens
    )  # but what is trained is fp32
    assert {param.dtype for param in student.parameters()} == {torch.float32}
    assert 0 < row["loss"] < 10 and {param.dtype for param in trainer.student.parameters()} == {
        torch.float32
    }


def test_padded_rows_of_the_student_have_no_probability_under_the_teacher(config, tokens, tmp_path):
    """With every token of the teacher given, the rows that it lacks are a tail of 0: as if padded by -inf."""
    GPT(
        ModelConfig(n_layer=1, n_embd=16, n_head=2, block_size=16), tokens.vocab_size
    ).save_pretrained(tmp_path / "teacher")
    teacher = load_teacher(tmp_path / "teacher", tokens, 16, AccessConfig(kind="full"))
    config = replace(
        config, loss=LossConfig(), teacher=TeacherConfig(), access=AccessConfig(kind="full")
    )
    config = replace(config, model=replace(config.model, vocab_size=tokens.vocab_size + 60))
    trainer = train.Trainer(config, Ranks(), tokens, teacher)
    batch = trainer.batches.batch(0)
    with torch.no_grad():
        student, known = (
            trainer.student(batch.ids).flatten(0, 1),
            teacher.model(batch.ids).flatten(0, 1),
        )
    log_t = torch.cat([known, torch.full((len(known), 60), -torch.inf)], 1).log_softmax(-1)
    want = torch.where(log_t.exp() > 0, log_t.exp() * (log_t - student.log_softmax(-1)), 0.0).sum(
        -1
    )
    assert trainer.train_step(batch)()["kl"] == pytest.approx(want.mean().item(), rel=1e-4)
    found = row_measures(student, batch.labels.flatten(), known)
    assert_close(found["kl"], want, rtol=1e-4, atol=1e-6)
    assert_close(
        found["acceptance"],
        torch.minimum(log_t, student.log_softmax(-1)).exp().sum(-1),
        rtol=1e-5,
        atol=1e-7,
    )


def test_models_that_do_not_fit_the_tokens_are_refused(config, tokens, tmp_path):
    config.model.vocab_size = 200
    with pytest.raises(UserError, match=r"model.vocab_size=200: the tokenizer has 257 tokens"):
        make_student(config.model, tokens)
    folder("llama", tmp_path / "few", 100, 32, 1, positions=8)
    with pytest.raises(
        UserError,
        match=r"model.init=.*few: its vocabulary is 100, the data's 257; set data.tokenizer",
    ):
        make_student(ModelConfig(init=str(tmp_path / "few"), block_size=8), tokens)
    folder("llama", tmp_path / "short", 300, 32, 1, positions=8)
    with pytest.raises(UserError, match=r"model.block_size=16: .*short reads at most 8 tokens"):
        make_student(ModelConfig(init=str(tmp_path / "short"), block_size=16), tokens)
    Tokenizer({"kind": "ids", "vocab_size": 300}).save(tmp_path / "short")
    with pytest.raises(
        UserError, match=r"model.init=.*short: it reads tokens of ids.*set data.tokenizer="
    ):
        make_student(ModelConfig(init=str(tmp_path / "short"), block_size=8), tokens)
