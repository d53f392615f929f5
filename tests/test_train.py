"""The training step, its splits over ranks, resuming to the bit, signals, refusals."""

import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import train
from conf.schema import Config
from data import DataConfig, prepare
from data.batches import Batch
from engine import UserError, checkpoint
from engine.logger import read_metrics
from engine.optim import OptimConfig
from engine.ranks import Ranks
from model import GPT, ModelConfig
from model.loss import LossConfig
from teachers.online import AccessConfig, TeacherConfig, load_teacher
from tests.helpers import assert_close, loaded_teacher

ROOT = Path(__file__).parent.parent
SHAPE = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for place, source in enumerate(sorted((ROOT / "engine").glob("*.py"))):
        (folder / f"{place}.txt").write_text(source.read_text()[:1500])
    return folder


@pytest.fixture
def config(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Config(
        data=DataConfig(
            name="text", path=str(corpus), tokenizer="bytes", cache_dir=str(tmp_path / "tokens")
        ),
        model=SHAPE,
        teacher=TeacherConfig(kind="none"),
        access=AccessConfig(k=8),
        loss=LossConfig(name="ce"),
        optim=OptimConfig(lr=1e-2, warmup_steps=2),
        batch_size=8,
        max_steps=6,
        eval_every=3,
        eval_tokens=256,
        save_every=2,
        run_dir=str(tmp_path / "run"),
    )


@pytest.fixture
def tokens(config):
    return prepare(config.data, say=lambda line: None, progress=False)


@pytest.fixture
def teacher(config, tokens, tmp_path):
    torch.manual_seed(7)
    GPT(replace(SHAPE, n_embd=32), tokens.vocab_size).save_pretrained(tmp_path / "teacher")
    tokens.tokenizer.save(tmp_path / "teacher")
    return loaded_teacher(tmp_path / "teacher", tokens, 16, config.access)


def distilling(config):
    return replace(config, teacher=TeacherConfig(), loss=LossConfig(kl_weight=0.7, temperature=2.0))


def weights(run_dir, step):
    return load_file(Path(run_dir) / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def gradients(trainer, batch):
    """The gradient that one update takes its step with."""
    found = []
    trainer.optimizer.zero_grad = lambda: found.extend(
        param.grad.clone() for param in trainer.student.parameters()
    )
    return found, trainer.train_step(batch)()


@pytest.mark.parametrize("loss", ["ce", "topk_kl"])
def test_the_gradient_is_the_same_for_every_split_with_uneven_ignored_positions(
    config, tokens, teacher, loss
):
    config = replace(config, optim=replace(config.optim, grad_clip=0.0))
    config = distilling(config) if loss == "topk_kl" else config
    found = []
    for micro in (8, 4, 2, 1):
        trainer = train.Trainer(replace(config, micro_batch_size=micro), Ranks(), tokens, teacher)
        batch = trainer.batches.batch(0)
        labels = batch.labels.clone()
        labels[0, :15], labels[1], labels[5, 3:] = -100, -100, -100
        found.append(gradients(trainer, Batch(batch.ids, labels, batch.blocks)))
    whole, row = found[0]
    for grads, other in found[1:]:
        for one, same in zip(whole, grads, strict=True):
            assert_close(same, one, rtol=1e-4, atol=1e-7)
        for key in ("loss", "kl", "ce", "teacher_mass", "student_mass"):
            assert other[key] == pytest.approx(row[key], rel=1e-5)
    trainer = train.Trainer(
        config, Ranks(), tokens, teacher
    )  # and it is the mean over kept positions of plain autograd
    out = trainer.module(batch.ids, labels, trainer.targets(batch))
    (out.loss / (labels != -100).sum()).backward()
    for one, param in zip(whole, trainer.student.parameters(), strict=True):
        assert_close(one, param.grad, rtol=1e-4, atol=1e-7)


def test_targets_belong_to_the_tokens_that_the_student_reads(config, tokens, teacher):
    """Row n of the targets is the teacher's distribution after the same tokens: shifting by one would not agree."""
    trainer = train.Trainer(distilling(config), Ranks(), tokens, teacher)
    batch = trainer.batches.batch(3)
    targets = trainer.targets(batch)
    log_p = teacher.model(batch.ids).log_softmax(-1).flatten(0, 1)
    assert_close(targets.log_probs, log_p.gather(1, targets.ids.long()), rtol=1e-4, atol=1e-5)
    T = 2.0
    logits = teacher.model(batch.ids).flatten(0, 1)
    assert_close(
        targets.log_norm, (logits / T).logsumexp(1) - logits.logsumexp(1) / T, rtol=1e-4, atol=1e-5
    )


def test_the_temperature_reaches_the_loss(config, tokens, teacher):
    rows = []
    for T in (1.0, 4.0):
        changed = replace(distilling(config), loss=LossConfig(kl_weight=1.0, temperature=T))
        trainer = train.Trainer(changed, Ranks(), tokens, teacher)
        rows.append(trainer.train_step(trainer.batches.batch(0))())
    assert rows[1]["loss"] == pytest.approx(16 * rows[1]["kl"], rel=1e-5)
    assert rows[0]["loss"] == pytest.approx(rows[0]["kl"], rel=1e-5)
    assert (
        rows[0]["teacher_mass"] > rows[1]["teacher_mass"] + 0.001
    )  # flatter: less mass in the same k


def stop_at(monkeypatch, step):
    """A signal that arrives while update number `step` (from 0) runs."""
    real = train.Trainer.train_step

    def train_step(self, batch):
        if self.step == step and self.title == "student":
            self.ranks.stop = "SIGTERM"
        return real(self, batch)

    monkeypatch.setattr(train.Trainer, "train_step", train_step)


@pytest.mark.parametrize("loss", ["ce", "topk_kl"])
def test_resume_is_exact_twice_in_a_row_and_over_an_epochs_edge(
    config, tokens, teacher, loss, tmp_path, monkeypatch
):
    config = replace(
        config, data=replace(config.data, fraction=0.08), model=replace(SHAPE, dropout=0.1)
    )
    config = distilling(config) if loss == "topk_kl" else config
    assert (
        8 * 6 > train.Trainer(config, Ranks(), tokens, teacher).batches.n_blocks > 8
    )  # the epoch ends inside the run
    train.fit(config, Ranks(), tokens, teacher)
    broken = replace(config, run_dir=str(tmp_path / "broken"))
    for step in (2, 5):
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            with pytest.raises(train.Stopped):
                train.fit(broken, Ranks(), tokens, teacher)
        assert checkpoint.latest(Path(broken.run_dir)).name.endswith(str(step))
    train.fit(broken, Ranks(), tokens, teacher)
    assert equal(weights(config.run_dir, 6), weights(broken.run_dir, 6))
    state = [
        torch.load(Path(each.run_dir) / "checkpoints/step-00000006/trainer.pt", weights_only=True)
        for each in (config, broken)
    ]
    for one, other in zip(
        *(each["optimizer"]["parts"][0]["state"].values() for each in state), strict=True
    ):
        assert all(torch.equal(one[key], other[key]) for key in one)
    rows = [read_metrics(Path(each.run_dir)) for each in (config, broken)]
    same = [key for key in rows[0][-1] if key not in ("seconds", "tokens_per_s")]
    assert [[row.get(key) for key in same] for row in rows[0]] == [
        [row.get(key) for key in same] for row in rows[1]
    ]
    assert [row["step"] for row in rows[0]] == [1, 2, 3, 4, 5, 6] and "val_loss" in rows[0][-1]


def test_a_signal_during_the_last_evaluation_loses_nothing(config, tokens, tmp_path, monkeypatch):
    train.fit(config, Ranks(), tokens)
    cut = replace(config, run_dir=str(tmp_path / "cut"))
    ranks, real = Ranks(), train.evaluate

    def evaluate(*args, **kwargs):
        if len(read_metrics(Path(cut.run_dir))) == 5:
            ranks.stop = "SIGTERM"
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", evaluate)
        with pytest.raises(train.Stopped):
            train.fit(cut, ranks, tokens)
    summary = train.fit(cut, Ranks(), tokens)
    assert (
        summary["val_loss"]
        == json.loads((Path(config.run_dir) / "summary.json").read_text())["val_loss"]
    )
    assert equal(weights(config.run_dir, 6), weights(cut.run_dir, 6))


def test_a_run_that_stands_past_a_smaller_max_steps_is_evaluated_and_ends(
    config, tokens, monkeypatch
):
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(train.Stopped):
            train.fit(config, Ranks(), tokens)
    summary = train.fit(replace(config, max_steps=4), Ranks(), tokens)
    last = read_metrics(Path(config.run_dir))[-1]
    assert last["step"] == 5 and last["val_loss"] == summary["val_loss"] > 0


def test_a_signal_while_rank_0_measures_the_teacher_stops_the_others_too(
    config, tokens, teacher, monkeypatch
):
    monkeypatch.setattr(train, "DistributedDataParallel", lambda module, **options: module)
    ranks = Ranks(rank=1, world=2)
    ranks.share = lambda value: {}  # what rank 0 tells of an evaluation that a signal cut short
    trainer = train.Trainer(distilling(config), ranks, tokens, teacher)
    trainer.waited = 0.0
    with pytest.raises(train.Stopped):
        trainer.summary()


def test_a_corrupt_newest_checkpoint_falls_back_and_the_run_ends_the_same(
    config, tokens, tmp_path, capsys
):
    train.fit(config, Ranks(), tokens)
    other = replace(config, run_dir=str(tmp_path / "other"), max_steps=6)
    train.fit(other, Ranks(), tokens)
    newest = Path(other.run_dir) / "checkpoints/step-00000006"
    (newest / "trainer.pt").write_bytes(b"junk")
    train.fit(other, Ranks(), tokens)
    assert "step-00000006: trainer.pt does not match" in capsys.readouterr().out
    assert (
        equal(weights(config.run_dir, 6), weights(other.run_dir, 6))
        and checkpoint.fault(newest) is None
    )


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_non_finite_step_stops_before_the_update(config, tokens, monkeypatch, poison):
    trainer = train.Trainer(config, Ranks(), tokens)
    Path(config.run_dir).mkdir()
    before = [param.clone() for param in trainer.student.parameters()]
    if poison == "loss":
        real = trainer.module.forward
        trainer.module.forward = lambda *args: (lambda out: out._replace(loss=out.loss + math.inf))(
            real(*args)
        )
    else:
        trainer.student.ln_f.bias.register_hook(lambda grad: grad * math.nan)
    with pytest.raises(
        UserError, match=r"step 1: loss .* stopped before the update.*lower optim.lr=0.01"
    ):
        trainer.train_step(trainer.batches.batch(0))()
    assert all(
        torch.equal(old, new) for old, new in zip(before, trainer.student.parameters(), strict=True)
    )
    assert checkpoint.latest(Path(config.run_dir)) is not None


@pytest.mark.parametrize(
    "kernel, words", [("flash", "attention: flash"), ("math", "attention: math,")]
)
@pytest.mark.parametrize("masked", [False, True])
def test_a_run_on_a_gpu_says_its_attention(config, monkeypatch, capsys, kernel, words, masked):
    """Nothing is computed: the run is stopped where it would read its first batch."""
    config.data.document_mask = masked
    tokens = prepare(config.data, say=lambda line: None, progress=False)
    trainer = train.Trainer(config, Ranks(), tokens)
    trainer.run_dir.mkdir()
    trainer.device = torch.device("cuda")
    asked = []

    def choose(model, device, dtype, masked):
        asked.append((model, device.type, dtype, masked))
        return kernel

    def stop(*arguments, pin):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "attention_kernel", choose)
    monkeypatch.setattr(train, "Prefetch", stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert asked == [(config.model, "cuda", torch.float32, masked)]
    assert sum(line.startswith(words) for line in capsys.readouterr().out.splitlines()) == 1


def test_the_step_before_a_bad_one_keeps_its_held_out_loss(config, tokens, monkeypatch):
    config = replace(config, eval_every=2)
    trainer, taken = train.Trainer(config, Ranks(), tokens), []
    forward = trainer.module.forward

    def module(*inputs):
        taken.append(None)
        out = forward(*inputs)
        return out._replace(loss=out.loss * (math.inf if len(taken) == 3 else 1.0))

    monkeypatch.setattr(trainer.module, "forward", module)
    trainer.run_dir.mkdir()
    with pytest.raises(UserError, match="step 3: loss inf"):
        trainer.fit()
    saved = checkpoint.latest(Path(config.run_dir))
    measured = [row["val_loss"] for row in read_metrics(Path(config.run_dir)) if "val_loss" in row]
    assert (
        saved.name == "step-00000002" and checkpoint.manifest(saved)["val_loss"] == measured[0] > 0
    )


def test_a_model_without_a_trainers_state_is_no_checkpoint_to_resume(config, tokens):
    GPT(SHAPE, tokens.vocab_size).save_pretrained(Path("bare"))
    with pytest.raises(
        UserError, match="resume=bare: a model without its trainer's state.* model.init=bare"
    ):
        train.fit(replace(config, resume="bare"), Ranks(), tokens)


def test_seed_zero_is_a_seed_and_seeds_differ(config, tokens):
    starts = [train.Trainer(replace(config, seed=seed), Ranks(), tokens) for seed in (0, 0, 1)]
    first, again, other = (trainer.student.wte.weight for trainer in starts)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(starts[0].batches.batch(0).ids, starts[1].batches.batch(0).ids)
    assert not torch.equal(starts[0].batches.batch(0).ids, starts[2].batches.batch(0).ids)


def test_arms_share_initialisation_and_batches(config, tokens, teacher):
    """Plain and distilled students of one seed start alike and read alike: their difference is the teacher's."""
    plain, taught = (
        train.Trainer(config, Ranks(), tokens),
        train.Trainer(distilling(config), Ranks(), tokens, teacher),
    )
    assert torch.equal(plain.student.wte.weight, taught.student.wte.weight)
    assert torch.equal(plain.batches.batch(9).ids, taught.batches.batch(9).ids)


def test_batch_size_must_divide_and_other_tokens_are_refused(config, tokens, tmp_path):
    with pytest.raises(
        UserError, match="batch_size=8: must be a multiple of micro_batch_size x ranks = 3 x 1"
    ):
        train.Trainer(replace(config, micro_batch_size=3), Ranks(), tokens)
    train.fit(config, Ranks(), tokens)
    with pytest.raises(UserError, match="its run had another tokens"):
        train.fit(config, Ranks(), replace(tokens, fingerprint="other"))
    with pytest.raises(UserError, match="not one block and its next token"):
        tokens.check_length(16000)


def test_teachers_that_do_not_fit_are_refused_before_step_0(config, tokens, tmp_path):
    for name, vocab_size, block_size in (
        ("vocabulary", 300, 16),
        ("context", tokens.vocab_size, 8),
    ):
        GPT(replace(SHAPE, block_size=block_size), vocab_size).save_pretrained(tmp_path / name)
    wide = loaded_teacher(tmp_path / "vocabulary", tokens, 16, config.access)
    with pytest.raises(
        UserError,
        match="teacher.path=.*its vocabulary is 300, the student's 257; set model.vocab_size=300",
    ):
        train.Trainer(distilling(config), Ranks(), tokens, wide)
    GPT(SHAPE, 200).save_pretrained(tmp_path / "few")
    with pytest.raises(
        UserError, match="teacher.path=.*its vocabulary is 200, the data's 257; set data.tokenizer"
    ):
        load_teacher(tmp_path / "few", tokens, 16, config.access)
    with pytest.raises(
        UserError,
        match="model.block_size=16: the teacher at .* reads at most 8 tokens; set model.block_size=8",
    ):
        load_teacher(tmp_path / "context", tokens, 16, config.access)
    with pytest.raises(UserError, match="access.k=300: the vocabulary has 257 tokens"):
        load_teacher(tmp_path / "context", tokens, 8, AccessConfig(k=300))
    with pytest.raises(UserError, match="teacher.path=nowhere: no such folder"):
        load_teacher("nowhere", tokens, 16, config.access)
    other = prepare(
        replace(config.data, tokenizer="bpe", vocab_size=300), say=lambda line: None, progress=False
    )
    GPT(SHAPE, 257).save_pretrained(tmp_path / "other")
    tokens.tokenizer.save(tmp_path / "other")
    with pytest.raises(
        UserError,
        match=r"reads tokens of bytes \(vocabulary 257\), the data are tokens of bpe.*set data.tokenizer=",
    ):
        load_teacher(tmp_path / "other", other, 16, config.access)


def test_a_cache_is_asked_for_what_the_loss_and_the_evaluation_read(config, tokens, monkeypatch):
    asked = []
    monkeypatch.setattr(train, "CachedTeacher", SimpleNamespace)
    cache = SimpleNamespace(
        model=None,
        fingerprint="print",
        check_share=lambda blocks: asked.append(len(blocks)),
        check_held_out=lambda count: asked.append(count),
    )
    for each, wanted in (
        (config, [256]),
        (distilling(config), [len(tokens.blocks("train", 16)), 256]),
    ):
        train.Trainer(each, Ranks(), tokens, cache)
        assert asked == wanted
        asked.clear()


def test_only_its_own_text_is_its_draws(config, tokens, teacher, monkeypatch):
    found = []
    monkeypatch.setattr(
        train,
        "OnlineTeacher",
        lambda *args: found.append(args[-1]) or SimpleNamespace(targets=None),
    )
    for writer in (None, "another model", teacher.fingerprint):
        train.Trainer(distilling(config), Ranks(), replace(tokens, generated_by=writer), teacher)
    assert found == [False, False, True]


def test_a_disk_that_is_full_says_so_in_its_own_words(config, tokens):
    trainer = train.Trainer(config, Ranks(), tokens)
    trainer.save()
    whole = sum(file.stat().st_size for file in checkpoint.latest(Path(config.run_dir)).iterdir())
    trainer.step, (soft, hard) = 1, resource.getrlimit(resource.RLIMIT_FSIZE)
    for part in (
        0.05,
        0.4,
    ):  # of a checkpoint: the weights do not fit, the optimizer's state does not
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(part * whole), hard))
        try:
            with pytest.raises(
                UserError,
                match=r"cannot save step 1 \(.*File too large.*\); earlier checkpoints are kept",
            ):
                trainer.save()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoint.latest(Path(config.run_dir)).name == "step-00000000"


def test_nothing_in_a_checkpoint_needs_pickled_code(config, tokens):
    train.fit(config, Ranks(), tokens)
    folder = checkpoint.latest(Path(config.run_dir))
    names = {file.name for file in folder.iterdir()}
    assert names == {
        "model.safetensors",
        "config.json",
        "nanodistill_tokenizer.json",
        "trainer.pt",
        "manifest.json",
    }
    torch.load(folder / "trainer.pt", weights_only=True)
    prints = checkpoint.manifest(folder)["fingerprints"]
    assert (
        prints["tokens"] == tokens.fingerprint
        and prints["tokenizer"] == tokens.tokenizer.fingerprint
    )


def script(config, *words, ranks=1, cwd=None, **options):
    """train.py as its user starts it, with the sizes of `config`."""
    data = [
        f"data.path={config.data.path}",
        "data=text",
        "data.tokenizer=bytes",
        f"data.cache_dir={config.data.cache_dir}",
    ]
    sizes = [
        "model.n_layer=1",
        "model.n_embd=16",
        "model.block_size=16",
        "optim.lr=1e-2",
        "batch_size=8",
        "eval_tokens=256",
    ]
    sizes += [
        "teacher.model.n_layer=1",
        "teacher.model.n_embd=16",
        "teacher.max_steps=4",
        "eval_every=3",
    ]
    start = (
        [sys.executable]
        if ranks == 1
        else [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={ranks}",
        ]
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*start, str(ROOT / "train.py"), *data, *sizes, "access.k=8", "max_steps=6", *words],
        cwd=cwd or Path(config.run_dir).parent,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["ce", "topk_kl"])
def test_two_ranks_equal_one_rank_with_accumulation_two(config, loss):
    base = [f"loss={loss}", "baseline=off"]
    for name, ranks, extra in (("one", 1, ["micro_batch_size=4"]), ("two", 2, [])):
        process = script(config, *base, f"run_dir={name}", *extra, ranks=ranks)
        _out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    folder = Path(config.run_dir).parent
    assert equal(weights(folder / "one", 6), weights(folder / "two", 6))
    rows = [
        [
            {key: row[key] for key in ("loss", "kl", "ce", "grad_norm")}
            for row in read_metrics(folder / name)
        ]
        for name in ("one", "two")
    ]
    assert rows[0] == [pytest.approx(row, rel=1e-6) for row in rows[1]]


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on_to_the_same_end(config):
    folder = Path(config.run_dir).parent
    for name in ("whole", "cut"):
        process = script(
            config,
            f"run_dir={name}",
            "loss=ce",
            "max_steps=300",
            "eval_every=300",
            "save_every=1000",
            cwd=folder,
        )
        if name == "cut":
            log = folder / "cut/metrics.jsonl"
            while not (log.is_file() and log.read_text().count("\n") > 20):
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        if name == "cut":
            assert "SIGTERM: student saved at step" in out and "run_dir=cut goes on" in out
            process = script(
                config,
                f"run_dir={name}",
                "loss=ce",
                "max_steps=300",
                "eval_every=300",
                "save_every=1000",
                cwd=folder,
            )
            out, err = process.communicate(timeout=300)
            assert "going on from step" in out and process.returncode == 0, err
    assert equal(weights(folder / "whole", 300), weights(folder / "cut", 300))


@pytest.mark.slow
def test_jobs_of_one_sweep_are_separate_runs_and_the_report_reads_them(config):
    process = script(config, "-m", "loss=ce,topk_kl", "seed=0,1", "run_dir=sweep")
    _out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    folder = Path(config.run_dir).parent
    for job in range(4):
        assert json.loads((folder / f"sweep/{job}/summary.json").read_text())["val_loss"] > 0
    reported = subprocess.run(
        [sys.executable, str(ROOT / "report.py"), "sweep"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert (
        (reported.returncode == 0 and "2 of 2" in reported.stdout)
        or "1 of 2" in reported.stdout
        or "0 of 2" in reported.stdout
    )
    assert (folder / "sweep/curves.png").stat().st_size > 10_000 and (
        folder / "sweep/bars.png"
    ).is_file()


@pytest.mark.slow
def test_first_step_comes_within_ten_seconds_when_everything_is_there(config):
    script(config, "run_dir=warm", "loss=ce").communicate(timeout=300)
    started = time.monotonic()
    process = script(config, "run_dir=timed", "loss=ce", "max_steps=100000")
    log = Path(config.run_dir).parent / "timed/metrics.jsonl"
    while not (log.is_file() and "\n" in log.read_text()):
        time.sleep(0.05)
        assert time.monotonic() - started < 60
    elapsed = time.monotonic() - started
    process.kill()
    process.communicate()
    assert elapsed < 10, f"{elapsed:.1f} s"
