"""A recorded teacher gives the targets of one beside the student, or is refused."""

import tracemalloc
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

import train
from conf.schema import Config
from data import DataConfig
from data.tokenizer import make_tokenizer
from engine import UserError
from engine.logger import read_metrics
from engine.optim import OptimConfig
from model.loss import LossConfig, SparseTargets
from teachers import quantize
from teachers.access import ACCESS_KINDS, AccessConfig
from teachers.cached import check_served
from teachers.online import OnlineTeacher, TeacherConfig
from tests.helpers import assert_close
from tests.recording import SHAPE, TOPK, Recording, T, cache_spec, open_cache, read_tokens


@pytest.fixture
def recording(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Recording()


def targets_of(recording, batch, access, temperature) -> tuple[SparseTargets, SparseTargets]:
    """[N,...] from the cache, by way of the batch as in training, and from the teacher itself."""
    cached = open_cache(recording.tokens, access, loss=LossConfig(temperature=temperature))
    batch = batch._replace(targets=cached.read_targets(batch))
    online = OnlineTeacher(recording.teacher, access, temperature, nullcontext)
    return cached.targets(batch), online.targets(batch)


@pytest.mark.parametrize("kind", ACCESS_KINDS)
def test_a_cache_gives_the_targets_of_the_teacher_itself(kind, recording):
    """Draws, ids and final weights to the bit; log-probabilities but for their quantisation."""
    access = replace(TOPK, kind=kind)
    temperature = 1.0 if ACCESS_KINDS[kind].final_weights else 2.0
    recording.record(access, temperatures=[temperature])
    batch = recording.batch([5, 0, 300])
    cached, online = targets_of(recording, batch, access, temperature)
    if kind == "full":  # in the vocabulary's order
        assert cached.ids is None
        z = online.hidden @ online.head.T
        log_norm = (z / 2).logsumexp(1) - z.logsumexp(1) / 2
        online = SparseTargets(None, z.log_softmax(1), log_norm)
    else:
        assert torch.equal(cached.ids.long(), online.ids.long())
    if kind in ("greedy", "text", "sampled"):
        assert torch.equal(cached.log_probs, online.log_probs)
    assert_close(cached.log_probs.exp(), online.log_probs.exp(), rtol=0, atol=0.02)
    if temperature == 2.0:
        assert_close(cached.log_norm, online.log_norm, rtol=0.05, atol=0.05)


def test_top_entries_are_in_a_full_cache(recording):
    recording.record(AccessConfig("full"), temperatures=[2.0])
    cached, online = targets_of(recording, recording.batch([0, 1]), TOPK, 2.0)
    same = cached.ids == online.ids
    assert same.float().mean() > 0.98  # float16 makes ties
    assert_close(cached.log_probs, online.log_probs, rtol=0, atol=0.01)
    assert_close(cached.log_norm, online.log_norm, rtol=0, atol=0.01)


@pytest.mark.parametrize("access", [TOPK, AccessConfig("full")])
def test_a_whole_vocabulary_is_decoded_a_few_rows_at_a_time(access, recording, monkeypatch):
    """To the same digits, and holding little more than what is asked for."""
    recording.record(AccessConfig("full"), temperatures=[2.0])
    cached = open_cache(recording.tokens, access, loss=LossConfig(temperature=2.0))
    batch = recording.batch(list(range(64)))
    row_bytes = 4 * cached.spec.k  # of one whole distribution
    asked_rows = 64 * T if access.kind == "full" else T  # of top entries: a sequence's

    targets = []
    for piece in (2**30, 1000):
        monkeypatch.setattr(quantize, "PIECE", piece)
        tracemalloc.start()
        targets.append(cached.read_targets(batch))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    for one, other in zip(*targets, strict=True):
        assert one is other is None or torch.equal(one, other)
    # The result, the file's rows twice, and what opening files takes
    assert peak < 2.2 * asked_rows * row_bytes + 200_000


@pytest.mark.parametrize("kind", ["topk", "full"])
def test_val_kl_is_measured_on_all_that_is_recorded(kind, recording):
    """The likeliest first, whether the student sees one entry or eight."""
    recording.record(replace(TOPK, kind=kind))
    batch = recording.batch([0], "val")
    with torch.no_grad():
        log_probs = recording.teacher(batch.ids).log_softmax(-1)  # [1,T,V]
    for access in (replace(TOPK, kind=kind), AccessConfig("greedy")):
        shown = open_cache(recording.tokens, access).teacher_topk(batch)
        assert shown.ids.shape == (1, T, 257 if kind == "full" else 8)
        assert torch.equal(shown.ids[..., 0], log_probs.argmax(-1))
        assert (shown.ids.sort().values.diff() > 0).all()  # each id once
        expected = log_probs.gather(2, shown.ids)
        assert (shown.log_probs - expected).abs().max() < 0.1


def test_blocks_that_are_not_recorded_are_refused(recording):
    recording.data.fraction = 0.5
    recording.record(eval_tokens=160)
    recording.record(AccessConfig("text"), eval_tokens=160, out="text")

    def open_for(fraction, eval_tokens, **changes):
        return open_cache(
            recording.tokens,
            data=DataConfig(fraction=fraction),
            eval_tokens=eval_tokens,
            **changes,
        )

    open_for(0.5, 161)
    open_for(0.2, 80)
    open_for(1.0, 160, loss=LossConfig(name="ce"))  # which trains on no targets
    with pytest.raises(UserError, match=r"^data.fraction=1.0 .* these \d+ train blocks; set both"):
        open_for(1.0, 160)
    with pytest.raises(UserError, match=r"eval_tokens=240: .* these 15 val blocks; set both"):
        open_for(0.5, 240)
    text = open_for(0.5, 240, path="text", access=AccessConfig("text"))  # no val_kl is measured
    assert text.teacher_topk(recording.batch([0], "val")) is None


def test_a_text_that_is_not_the_captures_is_refused(recording):
    recording.record()
    tokens = recording.tokens
    Path("texts/3.txt").write_text("another text " * 300)
    cases = {
        "data: .* data.val_fraction=0.1 data.document_mask=False; set": read_tokens(recording.data),
        "data.tokenizer: the cache cache has data.tokenizer=bytes, 257 tokens;": replace(
            tokens, tokenizer=make_tokenizer("ids", 257)
        ),
        # Of the same fingerprint, so that only the shards' own hashes can tell.
        "data: .* train-00000.bin covers other tokens": replace(tokens, train=tokens.train[::-1]),
        "data: .* val-00000.bin covers other tokens": replace(tokens, val=tokens.val[::-1]),
    }
    for message, other in cases.items():
        with pytest.raises(UserError, match=f"^{message}"):
            open_cache(other)


CASES = [  # the cache's access, the student's setting, what the line names (of None: it is served)
    ("topk", "model.block_size=16", "8"),
    (
        "topk",
        "loss.temperature=3.0",
        r"1.0 or 2.0 \(captured with temperatures=\[3.0\] it has that too\)",
    ),
    ("topk", "access.fresh=True", "False"),
    ("topk", "access.k=7", "up to 6"),
    ("stratified", "access.k=5", "6"),
    ("stratified", "access.n=5", "up to 4"),
    ("stratified", "access.seed=5", "0"),
    ("topk", "access.seed=5", None),
    ("unbiased", "access.kind=stratified", "greedy or text or sampled or .*"),
    ("greedy", "access.kind=topk", "greedy"),
    ("topk", "access.kind=greedy access.k=99 access.n=99", None),
    ("topk", "loss.temperature=3.0 loss.tail=renormalize_both", None),
    ("unbiased", "access.k=2", None),
    ("stratified", "access.n=2 model.vocab_size=41", None),
    ("sampled", "access.kind=text", None),
]


@pytest.mark.parametrize("kind, words, captured", CASES)
def test_what_a_cache_serves(kind, words, captured):
    spec = cache_spec(kind, vocab_size=40, temperatures=(2.0,))
    names = {"tokenizer": "bytes", "tokens": "a text"}
    cache = SimpleNamespace(spec=spec, names=names, folder="cache")
    tokens = SimpleNamespace(
        tokenizer=SimpleNamespace(fingerprint=spec.tokenizer),
        identity=spec.tokens,
    )
    usual = f"access.kind={kind} access.k=6 access.n=4 model.block_size=8 model.vocab_size=40"
    config = OmegaConf.merge(
        OmegaConf.structured(Config),
        OmegaConf.from_dotlist([*usual.split(), *words.split()]),
    )
    config = OmegaConf.to_object(config)
    if captured is None:
        check_served(cache, tokens, config)
    else:
        setting = words.replace(".kind", "")
        message = f"^{setting}: the cache cache has {captured}; set that, or capture again"
        with pytest.raises(UserError, match=message):
            check_served(cache, tokens, config)


@pytest.mark.parametrize(
    "tail, temperatures",
    [
        ("ghost", [2.0]),
        ("renormalize", []),  # the temperature's normaliser cancels: it need not be recorded
    ],
)
def test_a_student_learns_from_a_cache_as_beside_its_teacher(tail, temperatures, recording):
    recording.record(temperatures=temperatures)
    metrics = []
    for kind, path in (("cache", "cache"), ("online", "teacher")):
        config = Config(
            data=recording.data,
            model=SHAPE,
            teacher=TeacherConfig(kind=kind, path=path),
            access=TOPK,
            loss=LossConfig(kl_weight=0.7, temperature=2.0, tail=tail),
            optim=OptimConfig(lr=1e-2, warmup_steps=2),
            batch_size=8,
            max_steps=4,
            eval_tokens=256,
            run_dir=kind,
            device="cpu",
        )
        train.run(config)
        metrics.append(read_metrics(Path(kind)))
    offline, beside = metrics
    assert offline[0]["ce"] == beside[0]["ce"]
    assert offline[0]["loss"] == pytest.approx(beside[0]["loss"], rel=1e-3)
    # All that is not recorded is one outcome, so this is a lower bound.
    assert 0.8 < offline[-1]["val_kl"] / beside[-1]["val_kl"] < 1
