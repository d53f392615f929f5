"""Models whose embeddings have other rows than the tokenizer has tokens.

One tokenizer of 259 tokens, a teacher of 288 rows and a student of 272, as Qwen2.5's models of
several sizes have it. Rows past the tokenizer's are impossible tokens, so that every result is that
of the same models with these rows cut off.
"""

import json
import re
import shlex
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

import eval as evaluation
import sample
import train
from conf.schema import Config
from data import DataConfig
from data.tokenizer import load_tokenizer
from engine import UserError
from engine.checkpoint import resolve
from engine.logger import read_metrics
from engine.optim import OptimConfig
from engine.ranks import Ranks
from model import GPT, ModelConfig
from model.gpt import build_student
from model.loss import LossConfig, StudentWithLoss
from sample import SampleConfig
from teachers import capture, generate
from teachers.access import ACCESS_KINDS, AccessConfig
from teachers.cache import Cache
from teachers.capture import CaptureConfig
from teachers.online import OnlineTeacher, TeacherConfig, load_model
from tests.command_line import start
from tests.helpers import assert_close
from tests.recording import SPECIAL, TOPK, open_cache, read_tokens, record, write_tokenizer

V = 259
T = 16
SHAPE = ModelConfig(n_layer=1, n_embd=16, n_head=2, block_size=T)


def save_model(
    folder,
    rows,
    cut=None,
    dtype=torch.float32,
    special=SPECIAL,
    **shape,
) -> GPT:
    """A model that likes its padding, and its copy without it at `cut`; each with the tokenizer."""
    model = GPT(replace(SHAPE, **shape), rows)
    for param in model.parameters():
        param.data.mul_(8)
    head = model.head_weight.data
    head[V:] *= 3
    model = model.to(dtype)
    model.save_pretrained(folder)
    write_tokenizer(folder, special)
    if cut is not None:
        small = GPT(model.config, V).to(dtype)
        weights = model.state_dict()
        for name in ("wte.weight", "lm_head.weight"):
            if name in weights:
                weights[name] = weights[name][:V]
        small.load_state_dict(weights)
        small.save_pretrained(cut)
        write_tokenizer(cut, special)
    return model


@pytest.fixture
def here(tmp_path, monkeypatch):
    """teacher/ (288 rows), student/ (272), and both cut to 259: teacher_cut/, student_cut/."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (6000,), generator=generator).tolist()
    Path("text.txt").write_text(bytes(letters).decode())
    save_model("teacher", 288, "teacher_cut", n_embd=32, tied=False)
    save_model("student", 272, "student_cut")


def data(**changes) -> DataConfig:
    settings = {
        "name": "text",
        "path": "text.txt",
        "tokenizer": "teacher",
        "cache_dir": "tokens",
    }
    return DataConfig(**settings | changes)


def train_student(
    student,
    teacher,
    run_dir="run",
    **changes,
) -> list[dict]:
    """The rows of a short run's metrics."""
    settings = {
        "data": data(),
        "model": replace(SHAPE, init=student),
        "teacher": TeacherConfig(path=teacher),
        "access": TOPK,
        "optim": OptimConfig(
            lr=1e-2,
            warmup_steps=1,
            weight_decay=0.0,
        ),
        "batch_size": 4,
        "max_steps": 3,
        "eval_tokens": 64,
        "run_dir": run_dir,
        "device": "cpu",
    }
    config = Config(**settings | changes)
    config.resolve([])
    train.run(config)
    return read_metrics(Path(run_dir))


NOT_COMPARED = {"seconds", "tokens_per_s", "val_reliability"}


def assert_same(actual: list[dict], expected: list[dict]):
    for one, other in zip(actual, expected, strict=True):
        for name in one.keys() - NOT_COMPARED:
            assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-7), name


LOSSES = [(kind, None) for kind in ACCESS_KINDS] + [("topk", "smooth"), ("topk", "renormalize")]


@pytest.mark.parametrize("kind, tail", LOSSES)
def test_loss_and_gradients_are_those_of_the_models_without_padding(kind, tail, here):
    temperature = 2.0
    if ACCESS_KINDS[kind].final_weights:
        tail = "truncate"
        temperature = 1.0
    loss = LossConfig(
        kl_weight=0.7,
        temperature=temperature,
        tail=tail,
    )
    access = replace(TOPK, kind=kind)
    tokens = read_tokens(data())
    batch = tokens.blocks("train", T).read(np.array([0, 3]))
    results = []
    for cut in ("", "_cut"):
        student = GPT.from_pretrained(f"student{cut}").limit_vocabulary(V)
        model = load_model(f"teacher{cut}", tokens)
        teacher = OnlineTeacher(model, access, temperature, nullcontext)
        module = StudentWithLoss(student, loss)
        output = module(batch.ids, batch.labels, teacher.targets(batch))
        output.loss.backward()
        gradient = student.wte.weight.grad
        assert (gradient[V:] == 0).all()
        attention = student.h[0].attn.c_attn
        results.append([*output, gradient[:V], attention.weight.grad])
    for padded, plain in zip(*results, strict=True):
        assert_close(
            padded.detach(),
            plain.detach(),
            atol=1e-6,
        )


RUNS = {
    "topk": {},
    "full": {"access": AccessConfig("full")},
    "smooth": {"loss": LossConfig(tail="smooth")},
    "cross_entropy": {"loss": LossConfig(name="ce")},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_that_of_the_models_without_padding(name, here):
    """Its metrics, its checkpoint and its samples; the checkpoint keeps the rows it began with."""
    padded = train_student("student", "teacher", "padded", **RUNS[name])
    cut = train_student("student_cut", "teacher_cut", "cut", **RUNS[name])
    assert_same(padded, cut)
    assert {"val_kl", "val_acceptance"} <= padded[-1].keys()

    weights = GPT.from_pretrained("padded").wte.weight
    begun = GPT.from_pretrained("student").wte.weight
    assert weights.shape == (272, 16)
    assert torch.equal(weights[V:], begun[V:])  # no gradient, and no weight decay here

    texts = []
    for path in ("padded", "cut"):
        tokenizer = load_tokenizer("teacher")
        text = sample.sample_text(path, tokenizer)
        texts.append(text)
    assert texts[0] == texts[1]


def measure(path, teacher, **keys):
    config = evaluation.EvalConfig(
        path=path,
        data=data(**keys),
        block_size=T,
        device="cpu",
    )
    config.teacher.path = teacher
    return evaluation.measure(config)


def test_evaluation_is_that_of_the_models_without_padding(here):
    expected = measure("student_cut", "teacher_cut")
    assert expected["val_kl"] > 0
    assert_same([measure("student", "teacher")], [expected])
    assert_same([measure("student", "teacher_cut")], [expected])


def test_without_a_tokenizer_all_rows_have_logits(here):
    ids = torch.tensor([[97, 98]])
    assert GPT.from_pretrained("teacher")(ids).shape == (1, 2, 288)
    limited = GPT.from_pretrained("teacher").limit_vocabulary(V)
    assert limited(ids).shape == (1, 2, V)
    assert limited.limit_vocabulary(300).vocab_size == V


@pytest.mark.parametrize("rows", [288, 320])
def test_a_new_student_may_have_padding_of_its_own(rows, here):
    """Drawn as many as there are rows, trained as those that are tokens."""
    metrics = train_student(None, "teacher", model=replace(SHAPE, vocab_size=rows))
    torch.manual_seed(0)
    student = build_student(replace(SHAPE, vocab_size=rows), V).limit_vocabulary(V)
    assert GPT.from_pretrained("run").vocab_size == rows
    saved = GenerationConfig.from_pretrained(resolve("run"))
    assert saved.suppress_tokens == list(range(V, rows))  # transformers draws none of them
    assert metrics[-1]["val_kl"] > 0
    assert student.head_weight.shape[0] == V


def test_a_teacher_in_bfloat16(here):
    save_model("teacher16", 288, "teacher16_cut", torch.bfloat16, n_embd=32)
    padded = train_student("student", "teacher16", "padded", access=AccessConfig("full"))
    assert_same(
        padded, train_student("student_cut", "teacher16_cut", "cut", access=AccessConfig("full"))
    )


@pytest.mark.parametrize("kind", ["topk", "full", "sampled"])
def test_a_cache_holds_the_tokenizers_vocabulary(kind, here, monkeypatch, capsys):
    """And the command that a capture prints trains a student."""
    words = f"teacher.path=teacher access={kind} access.k=8 block_size={T} eval_tokens=64 out=cache"
    words += " data=text data.path=text.txt data.tokenizer=teacher data.cache_dir=tokens device=cpu"
    start(monkeypatch, "capture", capture.run, CaptureConfig, words.split())
    assert Cache("cache").spec.vocab_size == V

    command = re.search("Next: python train.py (.*)", capsys.readouterr().out)[1]
    words = "model.init=student max_steps=2 batch_size=4 run_dir=run device=cpu"
    start(monkeypatch, "train", train.run, Config, shlex.split(f"{command} {words}"))
    metrics = read_metrics(Path("run"))
    assert metrics[-1]["step"] == 2


def test_a_cache_that_holds_padding_is_refused_before_step_0(here):
    """As captures of earlier versions do."""
    tokens = read_tokens(data())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GPT, "limit_vocabulary", lambda model, vocab_size: model)
        record(tokens, data(), TOPK)
    assert Cache("cache").spec.vocab_size == 288
    cached = open_cache(tokens, TOPK)
    student = GPT(SHAPE, 288).limit_vocabulary(V)
    with pytest.raises(UserError, match="^teacher.path=cache: the cache has 288 tokens, 259 of .*"):
        cached.fit(student)
    cached.fit(GPT(SHAPE, 288))


def write_text():
    """Documents that the teacher writes."""
    config = data(name="written", path=None, documents=40)
    folder = generate.generate_documents(config, "teacher", T + 1, Ranks())
    return read_tokens(data(name="written", path=folder))


def test_written_text_has_no_padding(here):
    tokens = write_text()
    assert tokens.train.max() < V
    assert tokens.val.max() < V


def test_samples_have_no_padding(here, capsys):
    texts = []
    for path in ("teacher", "teacher_cut"):
        config = SampleConfig(
            path,
            n=3,
            max_new_tokens=20,
            top_k=None,
            device="cpu",
        )
        sample.run(config)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


# Added tokens


def tokens_of(tokenizer):
    return read_tokens(data(tokenizer=tokenizer))


@pytest.mark.parametrize("key", ["teacher.path", "model.init"])
def test_an_added_token_without_a_row_is_allowed_where_the_data_never_use_it(key, here):
    extended = [*SPECIAL, "<|extra|>"]
    save_model("short", V, special=extended)
    assert tokens_of("short").check_model("short", V, key) == V

    # As the end of text it is in all data
    save_model("short", V, special=extended)
    Path("short/tokenizer_config.json").write_text('{"eos_token": "<|extra|>"}')
    message = (
        f"^{key}=short: lacks a token that the data use, 259 .'<.extra.>'., of short's 260 it has"
        f" the first 259; give another {key} with the vocabulary of the data, or text without it"
    )
    with pytest.raises(UserError, match=message):
        tokens_of("short").check_model("short", V, key)


def test_a_run_with_an_added_token_that_is_never_used(here):
    extended = [*SPECIAL, "<|extra|>"]
    save_model("one", V, special=extended)
    save_model("more", 288, special=extended)
    for student, teacher in (("one", "more"), ("more", "one"), (None, "one")):
        run_dir = f"{student}-{teacher}"
        extra = {"data": data(tokenizer="more")}
        if student is None:
            extra["model"] = SHAPE
        metrics = train_student(student, teacher, run_dir, **extra)
        assert 0 < metrics[-1]["val_kl"] < 1e3
    all_tokens = AccessConfig("topk", k=V + 1)  # one of them is impossible
    train_student("one", "more", "all", data=data(tokenizer="more"), access=all_tokens)
    assert measure("one", "more", tokenizer="more")["val_kl"] < 1e3
    assert measure("one", "more", tokenizer="more", val_fraction=1.0)["val_kl"] < 1e3


MODELS = {  # the student's and the teacher's final tokens
    "alike": (["<|a|>"], ["<|b|>", "<|c|>"]),
    "one_is_longer": ([], ["<|b|>"]),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tokenizer", ["init", "teach", "bytes", "bpe"])
def test_models_of_other_final_tokens_share_the_others(name, tokenizer, here):
    """And what a hint says to set leads on."""
    ours, theirs = MODELS[name]
    save_model("init", 272, special=SPECIAL + ours)
    save_model("teach", 288, special=SPECIAL + theirs)
    settings = {"data": data(tokenizer=tokenizer, vocab_size=300)}
    if tokenizer == "bytes":  # in place of bpe, the default, the student's own is taken
        with pytest.raises(UserError, match="^teacher.path=teach: .*, or set data.tokenizer=teach"):
            train_student("init", "teach", **settings)
        settings = {"data": data(tokenizer="teach")}
    assert train_student("init", "teach", **settings)[-1]["val_kl"] > 0
    assert load_tokenizer("run/checkpoints/step-00000003").vocab_size > 256


def swap_letters(folder):
    tokenizer = json.loads(Path(folder, "tokenizer.json").read_text())
    letters = tokenizer["model"]["vocab"]
    letters["a"], letters["b"] = letters["b"], letters["a"]
    Path(folder, "tokenizer.json").write_text(json.dumps(tokenizer))


def test_no_hint_names_a_tokenizer_that_a_cache_or_written_text_rules_out(here):
    tokens = tokens_of("teacher")
    swap_letters("student")
    settled = {
        "cache": tokens,  # nothing is there: what is no model is a cache
        "the data": replace(tokens, generated_by="a teacher"),
    }
    for vocabulary, text in settled.items():
        partner = "cache" if vocabulary == "cache" else None
        with pytest.raises(UserError, match=f"give another model.init with the .* {vocabulary}$"):
            text.check_model("student", 272, "model.init", partner)
    with pytest.raises(UserError, match="or set data.tokenizer=student$"):
        tokens.check_model("student", 272, "model.init")


def test_chats_of_two_templates_do_not_point_at_each_other(here):
    """Plain text needs of a tokenizer its end of text alone, a chat perhaps all added tokens."""
    save_model("init", 272, special=[*SPECIAL, "<|a|>"])
    Path("init/tokenizer_config.json").write_text('{"eos_token": "<|a|>"}')
    save_model("teach", 288, special=[*SPECIAL, "<|b|>"])
    text = tokens_of("init")
    chats = replace(text, train_mask=np.ones(len(text.train), np.uint8))
    hints = {"or set data.tokenizer=teach, or text": text, "with the vocabulary of init": chats}
    for hint, tokens in hints.items():
        with pytest.raises(UserError, match=f"lacks .* 259 .*; give another teacher.path,? {hint}"):
            tokens.check_model("teach", 288, "teacher.path", "init")


def test_other_vocabularies_are_refused_with_one_hint(here):
    """Neither model's refusal names the tokenizer that the other one refuses."""
    swap_letters("teacher")
    for tokenizer, key, other in (
        ("bpe", "teacher.path=teacher", "student"),
        ("student", "teacher.path=teacher", "student"),
        ("teacher", "model.init=student", "teacher"),
    ):
        rule = f"^{key}: .* give another {key.split('=')[0]} with the vocabulary of {other}"
        with pytest.raises(UserError, match=rule):
            train_student("student", "teacher", data=data(tokenizer=tokenizer, vocab_size=270))


def test_a_model_without_a_tokenizer_has_at_most_so_much_padding(here):
    Path("bare").mkdir()
    Path("bare/config.json").write_text("{}")
    tokens = tokens_of("teacher")
    assert tokens.check_model("bare", 1347, "teacher.path") == V
    with pytest.raises(UserError, match="set data.tokenizer to what it was trained with"):
        tokens.check_model("bare", 1348, "teacher.path")


# Tokens that end a text


def set_ends(folder, eos):
    path = Path(folder, "generation_config.json")
    path.write_text(json.dumps({"eos_token_id": eos}))


def test_all_end_tokens_survive_training(here):
    """Those of the model that it starts from; a new student's are its teacher's."""
    set_ends("student", [257, 256])
    set_ends("teacher", [258, 256])
    train_student("student", "teacher", "tuned")
    assert GPT.from_pretrained("tuned").eos == [257, 256]
    train_student("tuned", "teacher", "again")
    assert GPT.from_pretrained("again").eos == [257, 256]
    train_student(None, "teacher", "new", model=SHAPE)
    assert GPT.from_pretrained("new").eos == [258, 256]


def test_written_documents_end_at_any_end_token(here):
    run_on = write_text()
    ends = [256, *range(97, 140)]
    set_ends("teacher", ends)
    tokens = write_text()
    assert tokens.folder != run_on.folder
    starts = np.flatnonzero(tokens.train_mask == 2)
    for document in np.split(np.array(tokens.train), starts[1:]):
        assert not set(document[1:-1]) & set(ends)
        assert document[-1] in ends or len(document) == T
