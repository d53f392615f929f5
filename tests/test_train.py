"""The training step, its splits over ranks, resuming to the bit, signals, and what waits."""

import json
import math
import os
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func
from safetensors.torch import load_file
from torch._dynamo.backends.common import aot_autograd
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import eval as evaluation
import train
from conf.schema import Config
from data import DataConfig, prepare
from engine import UserError, checkpoint
from engine.logger import read_metrics
from engine.optim import OptimConfig
from engine.ranks import Ranks
from model import GPT, ModelConfig
from model.loss import LossConfig, StudentWithLoss
from teachers import capture
from teachers.access import AccessConfig
from teachers.online import TeacherConfig, open_teacher
from tests.helpers import assert_close

ROOT = Path(__file__).parent.parent
SHAPE = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16)
TEXT = "the quick brown fox jumps over the lazy dog, which is another matter. "


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT * 100)
    return Config(
        data=DataConfig(
            name="text",
            path="text.txt",
            tokenizer="bytes",
            cache_dir="tokens",
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
        run_dir="run",
        device="cpu",
    )


def read(config):
    return prepare(config.data, say=lambda line: None)


@pytest.fixture
def tokens(config):
    return read(config)


@pytest.fixture
def teach(config, tokens):
    """A function config -> (config that distils, its teacher)."""
    torch.manual_seed(7)
    model = GPT(replace(SHAPE, n_embd=32), tokens.vocab_size)
    model.save_pretrained(Path("teacher"))
    tokens.tokenizer.save(Path("teacher"))

    def make(config):
        loss = LossConfig(kl_weight=0.7, temperature=2.0)
        config = replace(config, teacher=TeacherConfig(), loss=loss)
        device = torch.device("cpu")
        autocast = train.autocast(device, config.dtype)
        return config, open_teacher("teacher", tokens, config, device, autocast)

    return make


def test_cross_entropy_reads_no_access(config, tokens):
    config.teacher = TeacherConfig()
    config.access.k = 9999  # more than the vocabulary
    assert train.find_teacher(config, None, tokens) is None


@pytest.fixture(params=["ce", "topk_kl"])
def task(request, config, teach):
    """(config, teacher) of both losses."""
    return (config, None) if request.param == "ce" else teach(config)


class Steps:
    """Single training steps, as train_model takes them."""

    def __init__(self, config, tokens, teacher=None, ranks=None):
        self.ranks = ranks or Ranks()
        size = train.find_micro_batch_size(config, self.ranks)
        self.config = replace(config, micro_batch_size=size)
        self.teacher = teacher
        parts = train.set_up_student(self.config, self.ranks, tokens)
        self.student, self.module, self.optimizer = parts
        self.batches = train.make_batches(self.config, self.ranks, tokens, teacher)
        self.gradients = []
        self.zero_grad = self.optimizer.zero_grad
        self.optimizer.zero_grad = self.keep_gradients

    def keep_gradients(self):
        params = self.student.parameters()
        self.gradients.append([param.grad.clone() for param in params])
        self.zero_grad()

    def take(self, batch, step=0):
        self.optimizer.set_learning_rate(self.config.optim.lr)
        return train.train_step(
            self.module,
            self.optimizer,
            batch,
            self.teacher,
            self.config,
            self.ranks,
            step,
        )


def assert_equal_tensors(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def load_weights(run_dir, step=6):
    return load_file(Path(run_dir) / f"checkpoints/step-{step:08d}/model.safetensors")


def assert_equal_weights(one, other, step=6):
    assert_equal_tensors(load_weights(one, step), load_weights(other, step))


# --- the step ---


def test_the_gradient_is_the_mean_over_kept_positions_for_every_split(task, tokens):
    config, teacher = task
    optim = replace(config.optim, grad_clip=0.0)
    config = replace(config, optim=optim)
    results = []
    for size in (8, 4, 2, 1):
        steps = Steps(replace(config, micro_batch_size=size), tokens, teacher)
        batch = steps.batches.batch(0)
        labels = batch.labels.clone()
        labels[0, :15] = -100
        labels[1] = -100
        labels[5, 3:] = -100
        num_kept = int((labels != -100).sum())
        batch = batch._replace(labels=labels, num_kept=num_kept)
        metrics = steps.take(batch)
        results.append((steps.gradients[0], metrics))

    # Plain autograd of the mean.
    steps = Steps(config, tokens, teacher)
    targets = teacher.targets(batch) if teacher else None
    output = steps.module(batch.ids, batch.labels, targets)
    (output.loss / batch.num_kept).backward()
    for gradients, metrics in results:
        for actual, param in zip(gradients, steps.student.parameters(), strict=True):
            assert_close(actual, param.grad, rtol=1e-4, atol=1e-7)
        for name in output._fields:
            expected = getattr(output, name).detach() / batch.num_kept
            assert_close(metrics[name], expected)


def test_activation_checkpointing_gives_the_same_gradients_from_less(config, tokens):
    results = []
    for on in (False, True):
        shape = replace(SHAPE, n_layer=2, dropout=0.1)
        changed = replace(config, activation_checkpointing=on, model=shape)
        steps = Steps(changed, tokens)
        sizes = []

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            steps.take(steps.batches.batch(0))
        results.append((steps.gradients[0], sum(sizes)))
    plain, plain_size = results[0]
    checkpointed, checkpointed_size = results[1]
    for one, other in zip(plain, checkpointed, strict=True):
        assert torch.equal(one, other)
    assert checkpointed_size < 0.5 * plain_size


def test_float16_scales_the_loss_and_leaves_out_what_overflows(config, tokens):
    steps = Steps(replace(config, dtype="float16"), tokens)
    before = steps.student.wte.weight.detach().clone()
    steps.optimizer.scaler._init_scale = 2.0**40  # far too large: every gradient overflows
    metrics = steps.take(steps.batches.batch(0))
    assert metrics["loss"].isfinite()
    assert not metrics["grad_norm"].isfinite()
    assert torch.equal(steps.student.wte.weight, before)
    assert steps.optimizer.scaler.get_scale() == 2.0**39


WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2"}


class Waits(TorchDispatchMode):
    """Where the host waits for a device: values read, and shapes that depend on values."""

    def __init__(self):
        super().__init__()
        self.places = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::")
        name, _, _ = name.partition(".")
        ours = []
        for frame in traceback.extract_stack():
            if frame.filename.startswith(str(ROOT)):
                ours.append(frame.name)
        caller = ours[-2]  # the last frame is this method's
        if name in WAITING and caller != "scale_gradient":  # which reads on a CPU alone
            self.places.append(caller)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("size", [8, 2])
def test_no_step_waits_for_the_device(task, tokens, optimizer, size):
    config, teacher = task
    optim = replace(config.optim, name=optimizer)
    config = replace(config, micro_batch_size=size, optim=optim)
    steps = Steps(config, tokens, teacher)
    batch = steps.batches.batch(0)
    with Waits() as waits:
        steps.take(batch)
        assert waits.places == []
        torch.ones(3).sum().item()
        torch.ones(3).nonzero()
    assert len(waits.places) == 2  # the counter counts


# --- the loop ---


def stop_at(monkeypatch, step):
    """A signal that arrives while step number `step` (from 0) runs."""
    real = train.train_step

    def train_step(module, optimizer, batch, teacher, config, ranks, number):
        if number == step:
            ranks.stop = "SIGTERM"
        return real(module, optimizer, batch, teacher, config, ranks, number)

    monkeypatch.setattr(train, "train_step", train_step)


def train_and_stop(monkeypatch, step, config, *arguments):
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(train.Stopped):
            train.train_model(config, Ranks(), *arguments)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_resume_is_exact_twice_in_a_row_and_over_an_epochs_edge(task, tokens, dtype, monkeypatch):
    config, teacher = task
    data = replace(config.data, fraction=0.08)
    shape = replace(SHAPE, dropout=0.1)
    config = replace(config, data=data, model=shape, dtype=dtype)
    steps = Steps(config, tokens, teacher)
    assert 8 * 6 > steps.batches.num_blocks > 8
    train.train_model(config, Ranks(), tokens, teacher)

    cut = replace(config, run_dir="cut")
    for step in (2, 5):
        train_and_stop(monkeypatch, step, cut, tokens, teacher)
        saved = checkpoint.latest(Path("cut"))
        assert saved.name.endswith(str(step))
    train.train_model(cut, Ranks(), tokens, teacher)

    def record(run_dir):
        """Its optimizer's state and its rows but for their times."""
        rows = read_metrics(Path(run_dir))
        for row in rows:
            del row["seconds"], row["tokens_per_s"]
        path = Path(run_dir) / "checkpoints/step-00000006/trainer.pt"
        state = torch.load(path, weights_only=True)
        return state["optimizer"]["parts"][0]["state"], rows

    assert_equal_weights("run", "cut")
    states, rows = record("run")
    cut_states, cut_rows = record("cut")
    for param in states:
        assert_equal_tensors(states[param], cut_states[param])
    assert rows == cut_rows
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert "val_loss" in rows[-1]


def test_a_signal_during_the_last_evaluation_loses_nothing(config, tokens, monkeypatch):
    summary = train.train_model(config, Ranks(), tokens)
    real = train.evaluate
    ranks = Ranks()

    def evaluate(*arguments):
        if len(read_metrics(Path("cut"))) == 5:
            ranks.stop = "SIGTERM"
        return real(*arguments)

    cut = replace(config, run_dir="cut")
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", evaluate)
        with pytest.raises(train.Stopped):
            train.train_model(cut, ranks, tokens)
    continued = train.train_model(cut, Ranks(), tokens)
    assert continued["val_loss"] == summary["val_loss"]
    assert_equal_weights("run", "cut")


def test_a_run_that_stands_past_a_smaller_max_steps_is_evaluated(config, tokens, monkeypatch):
    train_and_stop(monkeypatch, 5, config, tokens)
    config = replace(config, max_steps=4)
    summary = train.train_model(config, Ranks(), tokens)
    rows = read_metrics(Path("run"))
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]  # the evaluation joins its step's row
    assert rows[-1]["val_loss"] == summary["val_loss"] > 0
    assert "loss" in rows[-1]


def test_a_signal_while_rank_0_measures_the_teacher_stops_the_others_too(config, teach, tokens):
    config, teacher = teach(config)
    train.train_model(config, Ranks(), tokens, teacher)
    ranks = Ranks()
    ranks.share = lambda value: {}  # what rank 0 tells of an evaluation that a signal cut short
    with pytest.raises(train.Stopped):
        train.train_model(config, ranks, tokens, teacher)


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_bad_step_and_the_one_queued_after_it_change_nothing(config, tokens, monkeypatch, poison):
    """The step after the bad one is queued already when it is read."""
    weights = []

    def forward(self, *inputs, real=StudentWithLoss.forward):
        params = self.student.named_parameters()
        copies = {name: param.detach().clone() for name, param in params}
        weights.append(copies)
        output = real(self, *inputs)
        if len(weights) == 2 and poison == "loss":
            return output._replace(loss=output.loss + math.inf)
        if len(weights) == 2:
            output.loss.register_hook(lambda gradient: gradient * math.nan)
        return output

    monkeypatch.setattr(StudentWithLoss, "forward", forward)
    config = replace(config, save_every=100)
    with pytest.raises(UserError, match=r"step 2: loss .*stopped before the update, state saved"):
        train.train_model(config, Ranks(), tokens)
    assert len(weights) == 3
    saved = GPT.from_pretrained("run/checkpoints/step-00000001")
    assert_equal_tensors(dict(saved.named_parameters()), weights[1])


def test_fine_tuning_rows_are_trained_on_their_answers(config):
    rows = [{"prompt": f"what is {n}? ", "completion": f"{n} and more"} for n in range(60)]
    lines = map(json.dumps, rows)
    Path("rows.jsonl").write_text("\n".join(lines))
    config.data = replace(config.data, path="rows.jsonl", val_fraction=0.2)
    config = replace(config, model=replace(SHAPE, block_size=64))
    tokens = read(config)
    batch = Steps(config, tokens).batches.batch(0)
    in_loss = batch.labels != -100
    assert batch.num_kept == in_loss.sum()
    assert in_loss.float().mean() < 0.5
    train.train_model(config, Ranks(), tokens)
    losses = [row["loss"] for row in read_metrics(Path("run"))]
    assert losses[-1] < losses[0]


def test_seeds_differ_and_arms_share_initialisation_and_batches(config, teach, tokens):
    def start(config):
        steps = Steps(config, tokens)
        return steps.student.wte.weight, steps.batches.batch(9).ids

    weights, ids = start(config)
    taught_weights, taught_ids = start(teach(config)[0])
    other_weights, other_ids = start(replace(config, seed=1))
    assert torch.equal(weights, taught_weights)
    assert torch.equal(ids, taught_ids)
    assert not torch.equal(weights, other_weights)
    assert not torch.equal(ids, other_ids)


def test_fresh_draws_depend_on_the_visit_and_are_the_same_for_every_split(config, tokens):
    config = replace(config, access=AccessConfig(kind="sampled", fresh=True))
    whole = Steps(config, tokens).batches.batch(3).blocks
    assert whole.tolist() == list(range(24, 32))
    ranks = Ranks(rank=1, world=2)
    config = replace(config, micro_batch_size=2)
    batches = train.make_batches(config, ranks, tokens)
    visits = batches.batch(3).blocks.tolist()
    assert visits == [26, 27, 30, 31]


@pytest.mark.parametrize("kernel, masked", [("flash", False), ("math", True)])
def test_a_run_on_a_gpu_says_its_attention(config, monkeypatch, capsys, kernel, masked):
    config.data.document_mask = masked
    config = replace(config, micro_batch_size=8)
    batches = train.make_batches(config, Ranks(), read(config))
    cuda = torch.device("cuda")

    def choose(*arguments):
        assert arguments == (config.model, cuda, torch.bfloat16, masked)
        return kernel

    monkeypatch.setattr(train, "attention_kernel", choose)
    train.describe_attention(config, Ranks(device=cuda), batches)
    out = capsys.readouterr().out
    assert out.startswith(f"attention: {kernel}\n")
    assert ("it holds the scores" in out) == (kernel == "math")


def test_out_of_memory_says_which_key_to_turn(config, tokens, monkeypatch):
    def fail(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(train, "train_step", fail)
    pattern = r"^out of memory at step 1 with micro_batch_size=8 .*; set micro_batch_size=4,"
    with pytest.raises(UserError, match=pattern):
        train.train_model(config, Ranks(), tokens)


# --- several ranks ---


def two_gradients(steps):
    for step in range(2):
        steps.take(steps.batches.batch(step), step)
    return steps.gradients


def ddp_rank(rank, config):
    """One of two ranks: saves its gradients and the order of what its backward passes did."""
    meeting = f"file://{Path.cwd()}/meet"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    events = []

    def compile_backward(graph, inputs):
        def backward(*arguments):
            events.append("backward")
            return graph(*arguments)

        return make_boxed_func(backward)

    def compile_forward(graph, inputs):
        return make_boxed_func(graph.forward)

    def all_reduce(state, bucket):
        events.append("all-reduce")
        return default_hooks.allreduce_hook(None, bucket)

    backend = aot_autograd(fw_compiler=compile_forward, bw_compiler=compile_backward)
    torch.compile = partial(torch.compile, backend=backend)
    # The least that can be split.
    train.DistributedDataParallel = partial(DistributedDataParallel, bucket_cap_mb=1)

    ranks = Ranks(rank=rank, world=2)
    steps = Steps(config, read(config), ranks=ranks)
    steps.module.register_comm_hook(None, all_reduce)
    gradients = two_gradients(steps)
    if rank == 0:
        torch.save((gradients, events), "rank.pt")
    dist.barrier()
    # As engine/cli.py's ranks: gloo's threads may abort an interpreter that ends
    # (pytorch/pytorch#179291).
    os._exit(0)


def test_compiled_ddp_reduces_gradients_while_the_backward_goes_on(config, tokens):
    """Two ranks of two micro-batches each, in graphs split where DDP's buckets end."""
    optim = OptimConfig(lr=1e-6, warmup_steps=0, grad_clip=0.0)
    shape = replace(SHAPE, n_embd=256)  # several buckets
    config = replace(config, model=shape, optim=optim)
    ranks_config = replace(config, micro_batch_size=2, compile="on")
    torch.multiprocessing.spawn(ddp_rank, (ranks_config,), nprocs=2)
    gradients, events = torch.load("rank.pt")
    whole = two_gradients(Steps(config, tokens))
    for theirs, ours in zip(gradients, whole, strict=True):
        for actual, expected in zip(theirs, ours, strict=True):
            assert_close(actual, expected, rtol=1e-4, atol=1e-7)
    # In the first step DDP only plans its buckets.
    second_step = events[events.index("all-reduce") + 1 :]
    assert second_step.count("all-reduce") > 1
    assert "backward" in second_step[second_step.index("all-reduce") :]


# --- the script ---


WORDS = """
    data=text data.path=text.txt data.tokenizer=bytes data.cache_dir=tokens
    model.n_layer=1 model.n_embd=16 model.block_size=16 optim.lr=1e-2
    teacher.model.n_layer=1 teacher.model.n_embd=16 teacher.max_steps=4
    batch_size=8 eval_tokens=256 eval_every=3 access.k=8 max_steps=6
"""


def start_script(*words, ranks=1):
    """train.py as its user starts it."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.Popen(
        [*command, ROOT / "train.py", *WORDS.split(), *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish_script(process):
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output


def wait_for_rows(run_dir, count, seconds=60):
    deadline = time.monotonic() + seconds
    while len(read_metrics(Path(run_dir))) < count:
        time.sleep(0.02)
        assert time.monotonic() < deadline


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["ce", "topk_kl"])
def test_two_ranks_equal_one_rank_with_accumulation_two(config, loss):
    words = [f"loss={loss}", "baseline=off"]
    finish_script(start_script(*words, "run_dir=one", "micro_batch_size=4"))
    finish_script(start_script(*words, "run_dir=two", ranks=2))
    assert_equal_weights("one", "two")
    one = read_metrics(Path("one"))
    two = read_metrics(Path("two"))
    assert len(one) == len(two) == 6
    for row, same in zip(one, two, strict=True):
        for name in ("loss", "kl", "ce", "grad_norm"):
            assert row[name] == pytest.approx(same[name], rel=1e-6)


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on_to_the_same_end(config):
    words = ["loss=ce", "max_steps=300", "eval_every=300", "save_every=1000"]
    finish_script(start_script(*words, "run_dir=whole"))
    process = start_script(*words, "run_dir=cut")
    wait_for_rows("cut", 20)
    process.send_signal(signal.SIGTERM)
    output = finish_script(process)
    assert "SIGTERM: student saved at step" in output
    assert "run_dir=cut goes on" in output
    assert "going on from step" in finish_script(start_script(*words, "run_dir=cut"))
    assert_equal_weights("whole", "cut", step=300)


@pytest.mark.slow
def test_jobs_of_one_sweep_are_separate_runs_and_the_report_reads_them(config):
    finish_script(start_script("-m", "loss=ce,topk_kl", "seed=0,1", "run_dir=sweep"))
    for job in range(4):
        text = Path(f"sweep/{job}/summary.json").read_text()
        assert json.loads(text)["val_loss"] > 0
    command = [sys.executable, str(ROOT / "report.py"), "sweep"]
    report = subprocess.run(command, capture_output=True, text=True)
    assert report.returncode == 0
    assert " of 2" in report.stdout
    assert Path("sweep/curves.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_first_step_comes_within_ten_seconds_when_everything_is_there(config):
    finish_script(start_script("run_dir=warm", "loss=ce"))
    started = time.monotonic()
    process = start_script("run_dir=timed", "loss=ce", "max_steps=100000")
    wait_for_rows("timed", 1)
    elapsed = time.monotonic() - started
    process.kill()
    process.communicate()
    assert elapsed < 10, f"{elapsed:.1f} s"


def test_a_softcap_is_the_teachers_too_and_is_read_wherever_a_checkpoint_is(config):
    config = replace(
        config,
        model=replace(SHAPE, logit_softcap=0.3),
        teacher=TeacherConfig(max_steps=2),
        loss=LossConfig(),
        baseline="off",
    )
    train.run(config)
    first, *_, last = read_metrics(Path("run"))
    (teacher,) = map(str, Path("runs").glob("teacher-*"))
    assert GPT.from_pretrained(teacher).config.logit_softcap == 0.3
    assert (GPT.from_pretrained("run")(torch.arange(16)[None]).abs() <= 0.3).all()

    against = evaluation.AgainstConfig(teacher)
    measures = evaluation.measure(
        evaluation.EvalConfig("run", against, tokens=256, batch_size=8, device="cpu")
    )
    for name in ("val_loss", "val_kl", "val_ece"):
        assert measures[name] == pytest.approx(last[name], rel=1e-6)

    capture.run(
        capture.CaptureConfig(
            capture.TeacherPath(teacher), config.access, eval_tokens=256, out="cache", device="cpu"
        )
    )
    offline = replace(
        config,
        teacher=TeacherConfig("cache", path="cache"),
        max_steps=1,
        run_dir="offline",
    )
    train.run(offline)
    assert read_metrics(Path("offline"))[0]["loss"] == pytest.approx(first["loss"], rel=1e-3)
