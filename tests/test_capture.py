"""A teacher recorded once: the same targets as online, whatever killed the capture, and refused where it does not fit."""

import os
import random
import re
import shlex
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from conf.schema import Config
from data import DataConfig, held_out, prepare
from data.tokenizer import Tokenizer
from engine import UserError
from engine.logger import read_metrics
from engine.optim import OptimConfig
from engine.ranks import Ranks, autocast
from model import GPT, ModelConfig
from model.loss import LossConfig, SparseTargets
from teachers.access import ACCESS_KINDS, AccessConfig
from teachers.cache import Cache, CacheSpec
from teachers.capture import Capture, CaptureConfig, TeacherPath
from teachers.online import (
    FULL_LIMIT,
    VAL,
    CachedTeacher,
    OnlineTeacher,
    TeacherConfig,
    check_access,
    check_recorded,
    load_teacher,
    open_teacher,
    query_teacher,
    slot_blocks,
)
from tests.helpers import assert_close

ROOT = Path(__file__).parent.parent
T = 16
SHAPE = ModelConfig(n_layer=1, n_embd=16, n_head=2, block_size=T)
SPLITS = ("train", "val")


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = [
        (ROOT / "engine" / name).read_text()[:3000]
        for name in ("ranks.py", "optim.py", "checkpoint.py")
    ]
    Path("texts").mkdir()
    for place, text in enumerate(texts):
        Path(f"texts/{place}.txt").write_text(text)
    return DataConfig(name="text", path="texts", tokenizer="bytes", cache_dir="tokens")


@pytest.fixture
def tokens(data):
    return prepare(data, say=lambda line: None, progress=False)


@pytest.fixture
def teacher(tokens):
    torch.manual_seed(7)
    model = GPT(replace(SHAPE, n_embd=32), tokens.vocab_size)
    for param in model.parameters():
        param.data.mul_(8)
    model.save_pretrained("teacher")
    tokens.tokenizer.save("teacher")
    return load_teacher("teacher", tokens, T, AccessConfig())


def access_of(kind: str, **changes) -> AccessConfig:
    return AccessConfig(**{"kind": kind, "k": 8, "n": 5, "seed": 3} | changes)


def capture(tokens, data, out="cache", access=None, ranks=None, **changes) -> Capture:
    config = CaptureConfig(
        teacher=TeacherPath("teacher"),
        access=access or access_of("topk"),
        data=data,
        block_size=T,
        out=out,
    )
    config = replace(config, **{"eval_tokens": 256, "batch_size": 4, "device": "cpu"} | changes)
    return Capture(
        config, tokens, load_teacher("teacher", tokens, T, config.access), ranks or Ranks()
    )


def small_shards(monkeypatch, blocks: int = 40) -> None:
    made = CacheSpec.__post_init__

    def smaller(self):
        self.blocks_per_shard = self.blocks_per_shard or blocks
        made(self)

    monkeypatch.setattr(CacheSpec, "__post_init__", smaller)


def contents(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}


@pytest.fixture
def config(data):
    return Config(
        data=data,
        model=SHAPE,
        teacher=TeacherConfig(kind="cache", path="cache"),
        access=access_of("topk"),
        loss=LossConfig(kl_weight=0.7),
        optim=OptimConfig(lr=1e-2, warmup_steps=2),
        batch_size=8,
        max_steps=6,
        eval_every=3,
        eval_tokens=256,
        run_dir="run",
        device="cpu",
    )


@pytest.mark.parametrize("kind", ACCESS_KINDS)
def test_a_cache_says_what_the_teacher_says_online(kind, tokens, data, teacher, monkeypatch):
    """Draws, ids and final weights to the bit where nothing is quantised; log-probs within the bound otherwise."""
    small_shards(monkeypatch)
    access = access_of(kind)
    T2 = 1.0 if ACCESS_KINDS[kind].final_weights else 2.0
    capture(tokens, data, access=access, temperatures=[T2]).run()
    cached = CachedTeacher("cache", tokens, T, access, T2, tokens.vocab_size)
    online = OnlineTeacher(teacher.model, access, T2, autocast(torch.device("cpu"), "float32"))
    blocks = tokens.blocks("train", T)
    batch = blocks.read(torch.tensor([5, 0, len(blocks) - 1]).numpy())
    want, found = (
        online.targets(batch),
        batch._replace(targets=cached.targets(batch))
        .part(slice(None), torch.device("cpu"))
        .targets,
    )
    if kind == "full":  # in the vocabulary's order
        assert found.ids is None
        z = want.hidden @ want.head.T
        log_norm = (z / T2).logsumexp(1) - z.logsumexp(1) / T2
        want = SparseTargets(None, z.log_softmax(1), log_norm)
    else:
        assert torch.equal(found.ids.long(), want.ids.long())
    if kind in ("greedy", "text", "sampled"):
        assert torch.equal(found.log_probs, want.log_probs)
    mass = [part.log_probs.exp() for part in (found, want)]
    assert (mass[0] - mass[1]).abs().max() < 0.02
    if T2 != 1:
        lt, lq = (part.log_probs / T2 - part.log_norm[:, None] for part in (want, found))
        assert_close(found.log_norm, want.log_norm, rtol=0.05, atol=0.05)
        tails = [(1 - side.exp().sum(1)).clamp(min=1e-9) for side in (lt, lq)]
        kl = (lt.exp() * (lt - lq)).sum(1) + tails[0] * (tails[0] / tails[1]).log()
        assert kl.max() < 1.5e-4


def test_draws_belong_to_seed_and_position(tokens, data, teacher):
    access = access_of("sampled")
    online = OnlineTeacher(teacher.model, access, 1.0, autocast(torch.device("cpu"), "float32"))
    blocks = tokens.blocks("train", T)
    one, other = (blocks.read(torch.tensor(chosen).numpy()) for chosen in ([3, 9], [9, 1, 3]))
    first, second = (
        online.targets(one).ids.unflatten(0, (2, T)),
        online.targets(other).ids.unflatten(0, (3, T)),
    )
    assert torch.equal(first[0], second[2]) and torch.equal(first[1], second[0])
    online.access = replace(access, seed=4)
    assert (online.targets(one).ids.unflatten(0, (2, T)) != first).float().mean() > 0.2


def test_held_out_draws_are_not_the_training_texts(tokens, data, teacher):
    """The same text in both splits: its draws are others, those of positions that begin at VAL."""
    same = replace(tokens, val=tokens.train)
    access = access_of("sampled")
    worker = capture(same, data, access=access)
    worker.run()
    cached = CachedTeacher("cache", same, T, access, 1.0, 257)
    batch = same.blocks("val", T).read(
        slot_blocks("val", len(same.blocks("val", T)), cached.spec)[:4]
    )
    drawn = [cached.read(split, batch).draws for split in SPLITS]
    with torch.no_grad():
        want = [
            query_teacher(teacher.model, batch, access, (1.0,), first=at).draws for at in (0, VAL)
        ]
    assert all(torch.equal(one, other.long()) for one, other in zip(drawn, want, strict=True))
    assert not torch.equal(*drawn)


@pytest.mark.parametrize("kind", ["topk", "full"])
def test_what_is_measured_against_does_not_depend_on_the_students_access(
    kind, tokens, data, teacher
):
    """val_kl is over all the entries recorded, likeliest first, whether the student sees one of them or eight."""
    capture(tokens, data, access=access_of(kind)).run()
    batch = tokens.blocks("val", T).read(np.arange(1))
    asked = (
        access_of(kind),
        access_of("topk", k=2),
        access_of("greedy"),
        access_of("residual_to_label", k=3),
    )
    told = [
        CachedTeacher("cache", tokens, T, access, 1.0, 257).teacher_topk(batch) for access in asked
    ]
    assert all(
        torch.equal(each.ids, told[0].ids) and torch.equal(each.log_probs, told[0].log_probs)
        for each in told
    )
    assert told[0].ids.shape == (1, T, 257 if kind == "full" else 8)
    with torch.no_grad():
        log_probs = teacher.model(batch.ids).log_softmax(-1)
    assert torch.equal(told[0].ids[..., 0], log_probs.argmax(-1))
    assert (told[0].log_probs - log_probs.gather(2, told[0].ids)).abs().max() < 0.1


@pytest.mark.parametrize("kind", ["topk", "greedy", "residual_to_label"])
def test_everything_is_in_a_full_cache(kind, tokens, data, teacher):
    capture(tokens, data, access=access_of("full"), temperatures=[2.0]).run()
    T2 = 2.0 if kind == "topk" else 1.0
    batch = tokens.blocks("train", T).read(np.arange(2))
    found = CachedTeacher("cache", tokens, T, access_of(kind), T2, 257).targets(batch)
    want = OnlineTeacher(
        teacher.model, access_of(kind), T2, autocast(torch.device("cpu"), "float32")
    ).targets(batch)
    assert (found.ids.flatten(0, 1) == want.ids).float().mean() > 0.98  # float16 makes ties
    assert_close(found.log_probs.flatten(0, 1)[:, :8], want.log_probs[:, :8], rtol=0, atol=0.01)
    if T2 != 1:
        assert_close(found.log_norm.flatten(), want.log_norm, rtol=0, atol=0.01)


@pytest.mark.parametrize("kind", ["topk", "full", "sampled"])
def test_held_out_blocks_that_are_not_recorded_are_refused(kind, tokens, data, teacher):
    capture(tokens, data, access=access_of(kind), eval_tokens=10 * T).run()
    cached = CachedTeacher("cache", tokens, T, access_of(kind), 1.0, 257)
    for eval_tokens in (10 * T, 10 * T + 1, 5 * T, T):
        cached.check_held_out(eval_tokens)
    rule = r"^eval_tokens=240: the cache holds \d of the 15 held-out blocks that are evaluated; set eval_tokens=160, or"
    with nullcontext() if kind == "sampled" else pytest.raises(UserError, match=rule):
        cached.check_held_out(15 * T)


@pytest.mark.parametrize("tail", ["renormalize", "renormalize_both"])
def test_a_temperature_whose_normaliser_cancels_need_not_be_recorded(
    tail, tokens, data, teacher, config
):
    for out, temperatures in (("cache", []), ("both", [2.0])):
        capture(tokens, data, out, temperatures=temperatures).run()
    config, rows = replace(config, loss=LossConfig(kl_weight=0.7, temperature=2.0, tail=tail)), []
    for out in ("cache", "both"):
        trainer = train.Trainer(config, Ranks(), tokens, open_teacher(out, tokens, config))
        rows.append(trainer.train_step(trainer.batches.batch(0))())
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-3)  # two grids of codes


def test_each_rank_reads_its_own_sequences_alone(tokens, data, teacher, config, monkeypatch):
    capture(tokens, data).run()
    monkeypatch.setattr(train, "DistributedDataParallel", lambda module, **options: module)
    cached = open_teacher("cache", tokens, config)
    whole = train.Trainer(config, Ranks(), tokens, cached).batches.batch(0)
    assert Ranks(rank=1, world=2).local_rows(8, 2) == [2, 3, 6, 7]
    for rank in (0, 1):
        trainer = train.Trainer(
            replace(config, micro_batch_size=2), Ranks(rank=rank, world=2), tokens, cached
        )
        batch = trainer.batches.batch(0)
        assert len(batch.targets.ids) == 4
        for turn in (0, 1):
            place = turn * 2 + rank
            part = batch.part(
                slice(place * 2, place * 2 + 2), torch.device("cpu"), slice(turn * 2, turn * 2 + 2)
            )
            want = whole.part(slice(place * 2, place * 2 + 2), torch.device("cpu"))
            assert torch.equal(part.targets.ids, want.targets.ids) and torch.equal(
                part.ids, want.ids
            )


def test_fresh_draws_change_with_each_visit_and_others_do_not(tokens, teacher, config):
    found = {}
    for fresh in (False, True):
        changed = replace(
            config,
            teacher=TeacherConfig(),
            access=access_of("sampled", fresh=fresh),
            loss=LossConfig(kl_weight=1.0),
        )
        trainer = train.Trainer(changed, Ranks(), tokens, teacher)
        seen = []
        targets = trainer.targets
        trainer.targets = lambda batch, seen=seen, targets=targets: (
            seen.append(targets(batch)),
            seen[-1],
        )[1]
        for _ in range(2):
            trainer.train_step(trainer.batches.batch(0))()
        found[fresh] = torch.equal(seen[0].ids, seen[1].ids)
    assert found == {False: True, True: False}


def test_a_student_of_a_cache_learns_as_one_beside_its_teacher(tokens, data, teacher, config):
    capture(tokens, data, temperatures=[2.0]).run()
    config = replace(config, loss=LossConfig(kl_weight=0.7, temperature=2.0))
    cached = open_teacher("cache", tokens, config)
    offline = train.Trainer(config, Ranks(), tokens, cached)
    online = train.Trainer(replace(config, teacher=TeacherConfig()), Ranks(), tokens, teacher)
    rows = [trainer.train_step(trainer.batches.batch(0))() for trainer in (offline, online)]
    assert (
        rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-4)
        and rows[0]["ce"] == rows[1]["ce"]
    )
    train.fit(config, Ranks(), tokens, cached)
    evaluated = [row for row in read_metrics(Path("run")) if "val_loss" in row]
    student = GPT.from_pretrained("run/checkpoints/step-00000006")
    blocks = tokens.blocks("val", T)
    found = CachedTeacher("cache", tokens, T, config.access, 1.0, None)
    kl, rows = 0.0, 0
    for batch in held_out(blocks, T, 8, 256):
        with torch.no_grad():
            log_t, log_p = (
                model(batch.ids).log_softmax(-1).flatten(0, 1) for model in (teacher.model, student)
            )
        ids = found.teacher_topk(batch).ids.flatten(0, 1)
        sides = [
            torch.cat(
                [side.gather(1, ids), (1 - side.gather(1, ids).exp().sum(1, keepdim=True)).log()], 1
            )
            for side in (log_t, log_p)
        ]
        kl, rows = kl + (sides[0].exp() * (sides[0] - sides[1])).sum().item(), rows + len(ids)
    assert evaluated[-1]["val_kl"] == pytest.approx(kl / rows, rel=1e-2)


@pytest.mark.parametrize("kind", ["topk", "stratified"])
def test_a_capture_killed_anywhere_and_run_again_ends_in_the_same_bytes(
    kind, tokens, data, teacher, monkeypatch
):
    small_shards(monkeypatch)
    capture(tokens, data, "whole", access_of(kind)).run()
    draw = random.Random(0)
    attempts = 0
    for _ in range(20):
        worker = capture(tokens, data, "broken", access_of(kind))
        left, hidden = draw.randrange(1, 30), worker.model.hidden

        def dying(*inputs, left=[left], hidden=hidden, **options):  # noqa: B006 (counts down)
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
            return hidden(*inputs, **options)

        worker.model.hidden = dying
        try:
            worker.run()
            break
        except KeyboardInterrupt:
            attempts += 1
    capture(tokens, data, "broken", access_of(kind)).run()
    assert attempts > 3 and contents("broken") == contents("whole")


def test_ranks_share_the_shards_and_the_bytes_are_one_ranks(tokens, data, teacher, monkeypatch):
    small_shards(monkeypatch)
    capture(tokens, data, "whole").run()
    for rank in (1, 0):  # the last to come writes the manifest
        ranks = Ranks(rank=rank, world=2)
        monkeypatch.setattr(ranks, "share", lambda value: value)
        capture(tokens, data, "shared", ranks=ranks).run()
        assert len(contents("shared")) < len(contents("whole")) or rank == 0
    assert contents("shared") == contents("whole")


def test_a_smaller_fraction_lies_in_a_larger_and_more_is_refused(tokens, data, teacher, config):
    capture(tokens, replace(data, fraction=0.5)).run()
    cached = open_teacher("cache", tokens, config)
    for fraction in (0.5, 0.2):
        trainer = train.Trainer(
            replace(config, data=replace(data, fraction=fraction)), Ranks(), tokens, cached
        )
        assert math_ok(trainer.train_step(trainer.batches.batch(0))()["loss"])
    with pytest.raises(
        UserError,
        match=r"data.fraction: the cache holds [\d,]+ of [\d,]+ blocks; set data.fraction=0.5",
    ):
        train.Trainer(config, Ranks(), tokens, cached)


def math_ok(value: float) -> bool:
    return 0 < value < 100


REFUSED = {
    "k": ({"access": access_of("topk", k=9)}, r"access.k=9: .*set access.k to 8 or less"),
    "kind": (
        {"access": access_of("sampled")},
        r"access=sampled: .*set access to greedy or topk or residual_to_label",
    ),
    "temperature": ({"temperature": 3.0}, r"loss.temperature=3.0: .*set loss.temperature to 1.0"),
    "block": ({"block_size": 8}, r"model.block_size=8: .*set model.block_size to 16"),
    "rows": ({"rows": 200}, r"model.vocab_size=200: .*257, its teacher's"),
    "fresh": (
        {"access": access_of("topk", fresh=True)},
        r"access.fresh=true: a cache holds one drawing",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_before_step_0(case, tokens, data, teacher):
    capture(tokens, data).run()
    changes, rule = REFUSED[case]
    options = {
        "block_size": T,
        "access": access_of("topk"),
        "temperature": 1.0,
        "rows": 257,
    } | changes
    with pytest.raises(UserError, match=rule):
        CachedTeacher("cache", tokens, **options)


def test_other_tokens_and_other_documents_are_refused(tokens, data, teacher):
    capture(tokens, data).run()
    options = {"block_size": T, "access": access_of("topk"), "temperature": 1.0, "rows": None}
    with pytest.raises(
        UserError,
        match=r"^data.document_mask=True: not what the cache .*set data.document_mask to False, or capture again",
    ):
        CachedTeacher("cache", replace(tokens, document_mask=True), **options)
    chars = Tokenizer({"kind": "ids", "vocab_size": 257})
    rule = r"^data.tokenizer: not what the cache cache holds; set data.tokenizer to the capture's \(bytes, 257 tokens\)"
    with pytest.raises(UserError, match=rule):
        CachedTeacher("cache", replace(tokens, tokenizer=chars), **options)
    Path("texts/3.txt").write_text("another text " * 300)
    with pytest.raises(
        UserError,
        match=r"data: not what the cache cache holds; .*capture's \(data=text data.path=texts\)",
    ):
        CachedTeacher("cache", prepare(data, say=lambda line: None, progress=False), **options)
    swapped = replace(
        tokens, train=tokens.train[::-1]
    )  # of the same fingerprint: only the shards' own hashes can tell
    with pytest.raises(UserError, match=r"train-00000.bin covers other tokens"):
        CachedTeacher("cache", swapped, **options)


@pytest.mark.parametrize("kind", ["topk", "sampled", "greedy", "stratified", "full"])
def test_a_teacher_at_hand_is_asked_again(kind, tokens, data, teacher, monkeypatch):
    """SparseTargets off by one block, under hashes that fit: only the teacher itself can tell."""
    access = access_of(kind)
    capture(tokens, data, access=access).run()
    CachedTeacher("cache", tokens, T, access, 1.0, None)
    worker = capture(tokens, data, "shifted", access)
    real = worker.model.hidden
    worker.model.hidden = lambda ids, document_ids=None: real(
        ids.roll(1, 1), document_ids=document_ids
    )
    worker.run()
    with pytest.raises(
        UserError,
        match=r"teacher.path=shifted: the teacher at .*teacher, asked again, agrees with \d+%",
    ):
        CachedTeacher("shifted", tokens, T, access, 1.0, None)
    Path("shifted/capture.json").unlink()  # not at hand: the tokens' hashes must do
    CachedTeacher("shifted", tokens, T, access, 1.0, None)


@pytest.mark.parametrize(
    "kind", [kind for kind in ACCESS_KINDS if ACCESS_KINDS[kind].entries in ("top_k", "all")]
)
def test_another_teacher_of_the_same_ranking_is_caught(kind, tokens, data, teacher):
    """Its ids are the same in the same order: the log-probabilities alone can tell."""
    access = access_of(kind)
    worker = capture(tokens, data, "flat", access)
    real = worker.model.hidden
    worker.model.hidden = lambda ids, document_ids=None: real(ids, document_ids=document_ids) * 0.5
    worker.run()
    with pytest.raises(
        UserError,
        match=r"teacher.path=flat: the teacher at .*teacher, asked again, agrees with \d+%",
    ):
        CachedTeacher("flat", tokens, T, access, 1.0, None)


@pytest.mark.parametrize("kind", ACCESS_KINDS)
def test_a_capture_in_bfloat16_is_not_taken_for_another_teachers(kind, tokens, data, teacher):
    capture(tokens, data, "half", access_of(kind), dtype="bfloat16").run()
    CachedTeacher("half", tokens, T, access_of(kind), 1.0, None)


def test_final_weights_take_no_tail_no_temperature_and_no_other_divergence():
    for loss, rule in (
        (
            {"tail": "ghost"},
            r"loss.tail=ghost: access=sampled gives final weights.*leave loss.tail unset",
        ),
        (
            {"temperature": 2.0},
            r"loss.temperature=2.0: access=sampled gives final weights.*set loss.temperature=1",
        ),
        ({"divergence": "jsd"}, r"loss.divergence=jsd: access=sampled gives final weights"),
    ):
        with pytest.raises(UserError, match=rule):
            Config(access=AccessConfig(kind="sampled"), loss=LossConfig(**loss))
    assert (
        Config(access=AccessConfig(kind="sampled")).loss.tail == "truncate"
        and Config().loss.tail == "ghost"
    )
    with pytest.raises(UserError, match=r"teacher.path=null: teacher=cache needs"):
        TeacherConfig(kind="cache")


TEMPERATURES = {
    "high": ({"temperatures": [20.0]}, r"^temperatures=20.0: temperatures must be at most 10"),
    "low": (
        {"temperatures": [2.0, 0.05]},
        r"^temperatures=0.05: temperatures must be at least 0.1",
    ),
    "final": (
        {"temperatures": [2.0], "access": access_of("sampled")},
        r"^temperatures=\[2.0\]: access=sampled gives final",
    ),
}


@pytest.mark.parametrize("case", TEMPERATURES)
def test_temperatures_that_cannot_be_recorded_are_refused_at_once(case):
    changes, rule = TEMPERATURES[case]
    with pytest.raises(UserError, match=rule):
        CaptureConfig(**changes)
    (
        CaptureConfig(temperatures=[0.1, 10.0]),
        CaptureConfig(access=access_of("sampled"), temperatures=[1.0]),
    )


def test_a_folder_of_other_files_is_left_alone(tokens, data, teacher):
    with pytest.raises(
        UserError,
        match=r"^out=texts: a folder of other files, 0.txt among them; give a new or an empty one",
    ):
        capture(tokens, data, "texts").run()
    assert len(list(Path("texts").iterdir())) == 3


@pytest.mark.slow
def test_the_commands_themselves(tokens, data, teacher):
    """Two ranks record under torchrun, the tool looks at it, a student learns from it."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def call(*words):
        result = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=env)
        assert result.returncode == 0, result.stderr
        return result.stdout

    text = [
        "data=text",
        "data.path=texts",
        "data.tokenizer=bytes",
        "data.cache_dir=tokens",
        "eval_tokens=256",
        "device=cpu",
    ]
    words = [
        "teacher.path=teacher",
        "access=unbiased",
        "access.k=5",
        "out=both",
        "block_size=16",
        *text,
    ]
    call(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "teachers.capture",
        *words,
    )
    said = call("-m", "teachers.capture", *words[:3], "out=one", *words[4:])
    assert contents("both") == contents("one")
    assert "unbiased k=5" in call("-m", "teachers.cache", "info", "one") and "whole" in call(
        "-m", "teachers.cache", "verify", "one"
    )
    sizes = [
        "model.n_layer=1",
        "model.n_embd=16",
        "model.block_size=16",
        "max_steps=3",
        "batch_size=4",
        "run_dir=run",
    ]
    script, *line = shlex.split(
        re.search("Next: python (.*)", said)[1]
    )  # says all that the cache needs
    call(
        str(ROOT / script),
        *line,
        *(word for word in sizes if "block_size" not in word),
        "device=cpu",
    )
    assert [row["step"] for row in read_metrics(Path("run"))] == [1, 2, 3] and "access.k=5" in line
    call(
        "-m", "teachers.capture", "teacher.path=run", "access=greedy", "out=own", "device=cpu"
    )  # the run's own text and context
    assert Cache("own").spec.block_size == 16
    learn = [
        "teacher=cache",
        "teacher.path=one",
        "access=unbiased",
        "access.k=5",
        *sizes[:-1],
        *text,
        "micro_batch_size=2",
    ]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    call(
        *torchrun, str(ROOT / "train.py"), *learn, "run_dir=two"
    )  # each rank reads its own sequences alone
    call(str(ROOT / "train.py"), *learn, "run_dir=alone")
    two, alone = (
        GPT.from_pretrained(f"{name}/checkpoints/step-00000003").state_dict()
        for name in ("two", "alone")
    )
    assert all(torch.equal(two[name], alone[name]) for name in two)


def test_a_whole_distribution_is_not_recorded_over_a_large_vocabulary():
    """A cache of V entries a position; the teacher beside the student has no such limit."""
    full = AccessConfig(kind="full")
    check_recorded(full, FULL_LIMIT)
    with pytest.raises(
        UserError, match="access=full: .*set access=topk access.k=64, or train with teacher=online"
    ):
        check_recorded(full, FULL_LIMIT + 1)
    check_access(full, FULL_LIMIT + 1)
    check_recorded(AccessConfig(kind="topk", k=64), FULL_LIMIT + 1)
