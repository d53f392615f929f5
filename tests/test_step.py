"""The optimizers, what undoes a bad step, and that nothing in a step waits for the device."""

import contextlib
import copy
import math
import os
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import train
from conf.schema import Config
from data import DataConfig, prepare
from engine import UserError, checkpoint, optim
from engine.logger import read_metrics
from engine.optim import Muon, OptimConfig, Optimizers
from engine.ranks import Ranks
from model import GPT, ModelConfig
from model.loss import LossConfig, SparseTargets, StudentWithLoss, TeacherStates
from teachers.access import ACCESS_KINDS, AccessConfig
from teachers.online import OnlineTeacher, TeacherConfig, load_teacher
from tests.helpers import assert_close

ROOT = Path(__file__).parent.parent
SHAPE = ModelConfig(n_layer=2, n_embd=16, n_head=2, block_size=16)


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(
        "the quick brown fox jumps over the lazy dog, which is another matter. " * 100
    )
    return Config(
        data=DataConfig(name="text", path="text.txt", tokenizer="bytes", cache_dir="tokens"),
        model=SHAPE,
        teacher=TeacherConfig(kind="none"),
        loss=LossConfig(name="ce"),
        optim=OptimConfig(lr=1e-2, warmup_steps=0),
        batch_size=8,
        max_steps=4,
        eval_every=4,
        eval_tokens=256,
        run_dir="run",
        device="cpu",
    )


@pytest.fixture
def tokens(config):
    return prepare(config.data, say=lambda line: None, progress=False)


@pytest.fixture
def teacher(config, tokens):
    GPT(replace(SHAPE, n_embd=32), tokens.vocab_size).save_pretrained("teacher")
    return load_teacher("teacher", tokens, 16, config.access)


def distilling(config):
    return replace(config, teacher=TeacherConfig(), loss=LossConfig(kl_weight=0.7, temperature=2.0))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_whole_distribution_is_the_loss_of_all_its_entries(config, tokens, teacher, temperature):
    """access=full, beside the teacher and as a cache has it, against the teacher's V entries ranked; a wider student too."""
    batch = tokens.blocks("train", 16).read(np.arange(2))
    loss = LossConfig(kl_weight=0.7, temperature=temperature)
    for rows in (tokens.vocab_size, tokens.vocab_size + 7):
        module = StudentWithLoss(GPT(SHAPE, rows), loss)
        online = OnlineTeacher(
            teacher.model, AccessConfig(kind="full"), temperature, contextlib.nullcontext
        ).targets(batch)
        ranked = AccessConfig(kind="topk", k=tokens.vocab_size)
        entries = OnlineTeacher(teacher.model, ranked, temperature, contextlib.nullcontext).targets(
            batch
        )
        in_order = torch.zeros_like(entries.log_probs).scatter(
            1, entries.ids.long(), entries.log_probs
        )
        cached = SparseTargets(None, in_order, entries.log_norm)
        found = []
        for targets in (entries, online, cached):
            out = module(batch.ids, batch.labels, targets)
            fields = out.loss, out.kl, out.ce
            found.append(
                [
                    *(part.detach() for part in fields),
                    *torch.autograd.grad(out.loss, list(module.parameters())),
                ]
            )
        assert isinstance(online, TeacherStates)
        for parts in found[1:]:
            for one, other in zip(parts, found[0], strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("slow", [False, True], ids=["bf16", "fp32"])
def test_muon_is_torchs_muon(monkeypatch, slow):
    """All matrices of a shape at once make the updates of one at a time, to bfloat16's rounding; the momentum to the bit."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: not slow)
    shapes = [(8, 24), (24, 8), (8, 24), (16, 16), (1, 5)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = copy.deepcopy(ours)
    options = {"lr": 0.01, "weight_decay": 0.3, "momentum": 0.9, "adjust_lr_fn": "match_rms_adamw"}
    one, other = Muon(ours, **options), torch.optim.Muon(theirs, **options)
    for _ in range(3):
        before = [param.detach().clone() for param in theirs]
        for mine, his in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            his.grad = mine.grad.clone()
        one.step(), other.step()
        for mine, his, old in zip(ours, theirs, before, strict=True):
            assert (mine - his).norm() < 0.04 * (his - old).norm()
            assert_close(
                one.state[mine]["momentum_buffer"],
                other.state[his]["momentum_buffer"],
                rtol=0,
                atol=0,
            )


def test_muon_takes_the_blocks_matrices_and_adamw_the_rest():
    model = GPT(replace(SHAPE, qk_norm=True), 31)
    muon, adamw = optim.make_optimizers(model, OptimConfig(name="muon", lr=1e-3))
    names = {id(param): name for name, param in model.named_parameters()}
    of_muon = {names[id(param)] for group in muon.param_groups for param in group["params"]}
    assert of_muon == {
        name
        for name in names.values()
        if name.startswith("h.") and name.endswith(("attn.weight", "c_proj.weight", "c_fc.weight"))
    }
    of_adamw = {names[id(param)] for group in adamw.param_groups for param in group["params"]}
    assert of_muon | of_adamw == set(names.values()) and not of_muon & of_adamw


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("poison", ["gradient", "loss"])
def test_a_step_that_is_not_finite_changes_nothing_and_neither_does_one_queued_after_it(
    name, poison
):
    model = GPT(SHAPE, 31)
    optimizers = Optimizers(model, OptimConfig(name=name, lr=1e-2))
    optimizers.set_learning_rate(1e-2)

    def step(bad):
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        if bad and poison == "gradient":
            next(model.parameters()).grad[0, 0] = math.nan
        optimizers.step(torch.tensor(math.inf if bad and poison == "loss" else 1.0))

    step(False)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizers.state_dict())
    step(True), step(False)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())
    for part, old in zip(optimizers.state_dict()["parts"], state["parts"], strict=True):
        for key, entry in old["state"].items():
            assert all(
                torch.equal(part["state"][key][field], value) for field, value in entry.items()
            )
    assert optimizers.failed == 1


def test_the_run_stops_before_a_bad_update_with_the_state_before_it(config, tokens, monkeypatch):
    """The step after the bad one is queued already when it is read: the saved step and weights are those before both."""
    trainer = train.Trainer(config, Ranks(), tokens)
    forward, calls = trainer.module.forward, []

    def module(*inputs):
        calls.append(
            {name: param.detach().clone() for name, param in trainer.student.named_parameters()}
        )
        out = forward(*inputs)
        return out._replace(loss=out.loss * (math.inf if len(calls) == 2 else 1.0))

    monkeypatch.setattr(trainer.module, "forward", module)
    trainer.run_dir.mkdir()
    with pytest.raises(
        UserError, match=r"step 2: loss inf.*stopped before the update, state saved"
    ):
        trainer.fit()
    assert len(calls) == 3
    saved = checkpoint.latest(Path("run"))
    assert saved.name == "step-00000001"
    kept = GPT.from_pretrained(saved).state_dict()
    assert all(torch.equal(kept[name], value) for name, value in calls[1].items())


def test_float16_scales_the_loss_skips_what_overflows_and_resumes(config, tokens):
    config = replace(config, dtype="float16")
    trainer = train.Trainer(config, Ranks(), tokens)
    before = {name: param.detach().clone() for name, param in trainer.student.named_parameters()}
    trainer.optimizer.scaler._init_scale = 2.0**40  # far too large: every gradient overflows
    row = trainer.train_step(trainer.batches.batch(0))()
    assert not math.isfinite(row["grad_norm"]) and math.isfinite(row["loss"])
    assert all(
        torch.equal(param, before[name]) for name, param in trainer.student.named_parameters()
    )
    assert trainer.optimizer.scaler.get_scale() == 2.0**39
    train.fit(replace(config, run_dir="whole"), Ranks(), tokens)
    half = replace(config, run_dir="half", max_steps=4, save_every=1)
    trainer = train.Trainer(half, Ranks(), tokens)
    Path("half").mkdir()
    for step in (0, 1):
        trainer.train_step(trainer.batches.batch(step))()
    trainer.save()
    train.fit(half, Ranks(), tokens)
    one, other = (GPT.from_pretrained(name).state_dict() for name in ("whole", "half"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    losses = [row["loss"] for row in read_metrics(Path("whole"))]
    assert losses[-1] < losses[0]


def test_float16_gives_up_after_many_overflows_in_a_row(config, tokens):
    trainer = train.Trainer(replace(config, dtype="float16"), Ranks(), tokens)
    trainer.overflows, trainer.since = train.MOST_OVERFLOWS, 0.0
    trainer.run_dir.mkdir()
    trainer.step = 1
    with pytest.raises(UserError, match=r"step 1: loss 1, gradient norm inf: stopped"):
        trainer.row(1, 0.1, lambda: ([1.0, 0.0, 1.0, 0.0, 0.0, math.inf], 1.0))


def test_activation_checkpointing_gives_the_same_gradients_from_less(config, tokens):
    found = []
    for on in (False, True):
        trainer = train.Trainer(
            replace(config, activation_checkpointing=on, model=replace(SHAPE, dropout=0.1)),
            Ranks(),
            tokens,
        )
        kept = []
        trainer.optimizer.zero_grad = lambda kept=kept, trainer=trainer: kept.extend(
            p.grad.clone() for p in trainer.student.parameters()
        )
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, saved=saved: (saved.append(tensor.numel()), tensor)[1],
            lambda tensor: tensor,
        ):
            trainer.train_step(trainer.batches.batch(0))
        found.append((kept, sum(saved)))
    for one, other in zip(found[0][0], found[1][0], strict=True):
        assert torch.equal(one, other)
    assert found[1][1] < 0.5 * found[0][1]


WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2"}
WAITING = {f"aten::{name}" for name in WAITING}


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: values read, and shapes that depend on values."""

    def __init__(self):
        super().__init__()
        self.places = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().split(".")[0] in WAITING:
            frames = [
                frame.name
                for frame in traceback.extract_stack()
                if frame.filename.startswith(str(ROOT))
            ]
            self.places.append(frames[-2])  # the last one is this method's
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("loss", ["ce", "topk_kl"])
def test_no_step_waits_for_the_device(config, tokens, teacher, loss, name, monkeypatch):
    """One value is read, from the labels in host memory, however many micro-batches: how many the batch keeps."""
    monkeypatch.setattr(
        train.processes, "copy_to_host_async", lambda values: lambda: None
    )  # on CUDA a copy and an event
    config = distilling(config) if loss == "topk_kl" else config
    config = replace(config, optim=replace(config.optim, name=name))
    for micro in (8, 2):
        trainer = train.Trainer(replace(config, micro_batch_size=micro), Ranks(), tokens, teacher)
        with Waits() as waits:
            assert trainer.train_step(trainer.batches.batch(0))
        assert [place for place in waits.places if place != "scale_gradient"] == [
            "update"
        ]  # which reads on a CPU alone
    with Waits() as waits:
        torch.ones(3).sum().item(), bool(torch.ones(1) > 0), torch.ones(3).nonzero()
    assert len(waits.places) == 3  # the counter counts


def test_ddp_sees_the_loss_and_keeps_gradients_in_its_buckets(config, tokens, monkeypatch):
    found = []
    monkeypatch.setattr(
        train,
        "DistributedDataParallel",
        lambda module, **options: found.append((module, options)) or module,
    )
    train.Trainer(config, Ranks(world=2), tokens)
    ((module, options),) = found
    assert isinstance(module, StudentWithLoss) and options["gradient_as_bucket_view"]


def two_gradients(trainer):
    """The gradients of two steps, each as the optimizer gets it."""
    gradients = []

    def keep_gradients():
        gradients.append([param.grad.clone() for param in trainer.student.parameters()])
        for param in trainer.student.parameters():
            param.grad = None

    trainer.optimizer.zero_grad = keep_gradients
    for step in range(2):
        trainer.train_step(trainer.batches.batch(step))()
    return gradients


def ddp_rank(rank, config):
    """One of two ranks: trains for two steps, saves its gradients and the order of what its backward passes did."""
    dist.init_process_group(
        "gloo", init_method=f"file://{Path.cwd()}/meet", rank=rank, world_size=2
    )
    events = []

    def compile_backward(graph, inputs):
        def backward(*arguments):
            events.append("backward")
            return graph(*arguments)

        return make_boxed_func(backward)

    backend = aot_autograd(
        fw_compiler=lambda graph, inputs: make_boxed_func(graph.forward),
        bw_compiler=compile_backward,
    )
    torch.compile = partial(torch.compile, backend=backend)
    train.DistributedDataParallel = partial(
        DistributedDataParallel, bucket_cap_mb=1
    )  # the least that can be split

    def all_reduce(state, bucket):
        events.append("all-reduce")
        return default_hooks.allreduce_hook(None, bucket)

    tokens = prepare(config.data, say=lambda line: None, progress=False)
    trainer = train.Trainer(config, Ranks(rank=rank, world=2), tokens)
    trainer.module.register_comm_hook(None, all_reduce)
    gradients = two_gradients(trainer)
    if rank == 0:
        torch.save((gradients, events), "rank.pt")
    dist.barrier()
    os._exit(
        0
    )  # as engine/cli.py's ranks: gloo's threads may abort an interpreter that ends (pytorch/pytorch#179291)


def test_compiled_ddp_reduces_gradients_while_the_backward_goes_on(config, tokens):
    """Two ranks that accumulate two micro-batches each, in graphs split where DDP's buckets end, are one process."""
    model = replace(SHAPE, n_layer=1, n_embd=256)  # 3 MiB: several buckets
    config = replace(config, model=model, optim=OptimConfig(lr=1e-6, warmup_steps=0, grad_clip=0.0))
    torch.multiprocessing.spawn(
        ddp_rank, (replace(config, micro_batch_size=2, compile="on"),), nprocs=2
    )
    gradients, events = torch.load("rank.pt")
    whole = two_gradients(train.Trainer(config, Ranks(), tokens))
    for theirs, ours in zip(gradients, whole, strict=True):
        for one, other in zip(theirs, ours, strict=True):
            assert_close(one, other, rtol=1e-4, atol=1e-7)
    second_step = events[
        events.index("all-reduce") + 1 :
    ]  # in the first DDP only plans its buckets
    assert second_step.count("all-reduce") > 1
    assert "backward" in second_step[second_step.index("all-reduce") :]


@pytest.mark.gpu
@pytest.mark.parametrize("loss", ["ce", "topk_kl"])
def test_no_step_waits_for_a_real_device(config, tokens, teacher, loss):
    config = distilling(config) if loss == "topk_kl" else config
    config = replace(
        config,
        optim=replace(config.optim, name="muon"),
        device="cuda",
        compile="off",
        micro_batch_size=4,
    )
    trainer = train.Trainer(config, Ranks(device=torch.device("cuda")), tokens, teacher)
    batches = [trainer.batches.batch(step) for step in range(3)]
    batches = [batch.pinned() for batch in batches]
    trainer.train_step(batches[0])()
    torch.cuda.set_sync_debug_mode("error")
    try:
        rows = [trainer.train_step(batch) for batch in batches[1:]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(math.isfinite(row()["loss"]) for row in rows)


@pytest.mark.parametrize("loss", ["ce", "topk_kl"])
@pytest.mark.parametrize(
    "model",
    [
        SHAPE,
        replace(SHAPE, norm="rmsnorm", rope_theta=1e4, mlp="swiglu", bias="none", qk_norm=True),
    ],
)
def test_the_whole_step_is_one_graph(config, tokens, teacher, loss, model):
    config = (
        distilling(replace(config, model=model))
        if loss == "topk_kl"
        else replace(config, model=model)
    )
    trainer = train.Trainer(config, Ranks(), tokens, teacher)
    batch = trainer.batches.batch(0)
    documents = (batch.ids == 32).cumsum(1)
    inputs = (
        batch.ids,
        batch.labels,
        trainer.targets(batch._replace(documents=documents)),
        documents,
    )
    torch._dynamo.reset()
    found = torch._dynamo.explain(StudentWithLoss(trainer.student, config.loss))(*inputs)
    assert found.graph_count == 1 and found.graph_break_count == 0, found.break_reasons


@pytest.mark.parametrize("kind", ACCESS_KINDS)
def test_the_teachers_side_is_one_graph(config, tokens, teacher, kind):
    config = replace(
        config, teacher=TeacherConfig(), loss=LossConfig(), access=AccessConfig(kind=kind, k=5, n=3)
    )
    trainer = train.Trainer(config, Ranks(), tokens, teacher)
    torch._dynamo.reset()
    found = torch._dynamo.explain(trainer.targets)(trainer.batches.batch(0))
    assert found.graph_count == 1 and found.graph_break_count == 0, found.break_reasons


MEMORY = {
    (
        8,
        False,
    ): r"micro_batch_size=8 sequences of 16 tokens; set micro_batch_size=4 \(the same gradient in 2 rounds\), or activation_",
    (
        9,
        False,
    ): r"micro_batch_size=9 sequences of 16 tokens; set micro_batch_size=3 \(the same gradient in 3 rounds\), or activation_",
    (1, False): r"with micro_batch_size=1 .*; set activation_checkpointing=true$",
    (1, True): r"; set model.block_size=8, or give a smaller model$",
}


@pytest.mark.parametrize("micro, on", MEMORY)
def test_out_of_memory_says_which_key_to_turn_and_by_how_much(
    config, tokens, monkeypatch, micro, on
):
    config = replace(
        config,
        batch_size=9 if micro == 9 else 8,
        micro_batch_size=micro,
        activation_checkpointing=on,
    )
    errors = (
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[x] DefaultCPUAllocator: can't allocate memory"),
    )
    for place, error in enumerate(errors):
        trainer = train.Trainer(replace(config, run_dir=f"run{place}"), Ranks(), tokens)
        trainer.run_dir.mkdir()

        def fail(*inputs, error=error):
            raise error

        monkeypatch.setattr(trainer.module, "forward", fail)
        with pytest.raises(UserError, match=r"^out of memory at step 1 .*" + MEMORY[micro, on]):
            trainer.fit()
    trainer = train.Trainer(replace(config, run_dir="other"), Ranks(), tokens)
    trainer.run_dir.mkdir()
    monkeypatch.setattr(
        trainer.module, "forward", lambda *inputs: (_ for _ in ()).throw(RuntimeError("a bug"))
    )
    with pytest.raises(RuntimeError, match="a bug"):
        trainer.fit()


DIAL = {2: (64, 2), 4: (128, 4), 6: (384, 6), 8: (512, 8), 12: (768, 12)}


@pytest.mark.parametrize("layers", DIAL)
def test_one_dial_gives_the_shapes_that_are_known_to_work(layers):
    """The demo's, nanoGPT's two for Shakespeare, GPT-2's smallest."""
    shape = GPT(ModelConfig(n_layer=layers), 7).config
    assert (shape.n_embd, shape.n_head) == DIAL[layers]


def test_a_start_from_a_model_is_recorded_and_batched_in_its_shape(tmp_path):
    GPT(
        replace(SHAPE, n_layer=3, n_embd=256, n_head=8, n_kv_head=4, mlp="swiglu", block_size=64),
        41,
    ).save_pretrained(tmp_path)
    config = Config(model=ModelConfig(init=str(tmp_path), block_size=32, dropout=0.1))
    model = config.model
    assert (model.n_layer, model.n_embd, model.n_head, model.n_kv_head, model.mlp) == (
        3,
        256,
        8,
        4,
        "swiglu",
    )
    assert (model.block_size, model.dropout, model.vocab_size, model.n_inner) == (32, 0.1, 41, 704)
    assert (
        config.optim.lr == 5e-5
        and config.batch_size == Config(model=ModelConfig(n_embd=256, block_size=32)).batch_size
    )
    assert replace(config, seed=1).model == model
    assert (
        Config(model=ModelConfig(init="x")).optim.lr == 5e-5
    )  # what is not there is refused later
    with pytest.raises(
        UserError,
        match=r"model.vocab_size=44: model.init=.* has 41 rows.*leave model.vocab_size unset",
    ):
        Config(model=ModelConfig(init=str(tmp_path), vocab_size=44))


def test_the_dial_gives_rate_and_batch():
    for layers, block_size, rate, tokens in ((2, 128, 3.0e-3, 2048), (12, 1024, 6.0e-4, 2**19)):
        config = Config(model=ModelConfig(n_layer=layers, block_size=block_size))
        assert config.optim.lr == rate and config.batch_size * block_size == tokens
    assert Config(optim=OptimConfig(lr=0.1), batch_size=3).optim.lr == 0.1
