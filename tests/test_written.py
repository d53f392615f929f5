"""Documents that a teacher writes: its own draws, whole, resumable, and any access over them."""

import json
import resource
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from conf.schema import Config
from data import DataConfig, prepare
from data.tokenizer import Tokenizer
from engine import UserError
from engine.checkpoint import fingerprint
from engine.optim import OptimConfig
from engine.ranks import Ranks, autocast
from model import GPT, ModelConfig
from teachers import generate as written
from teachers.capture import Capture, CaptureConfig, TeacherPath
from teachers.capture import run as run_capture
from teachers.online import AccessConfig, CachedTeacher, OnlineTeacher, TeacherConfig, load_teacher

T = 16


@pytest.fixture
def teacher(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = GPT(ModelConfig(n_layer=1, n_embd=16, n_head=2, block_size=T + 1), 257)
    for param in model.parameters():
        param.data.mul_(6)
    model.wte.weight.data[256] += 0.1
    model.save_pretrained("teacher")
    Tokenizer({"kind": "bytes"}).save(Path("teacher"))
    return model.eval()


def config(**changes) -> DataConfig:
    return DataConfig(name="written", cache_dir="tokens", documents=150, **changes)


def write(data: DataConfig, ranks=None) -> Path:
    return Path(written.write_first(data, "teacher", T + 1, ranks or Ranks()))


def test_documents_are_the_teachers_own_draws(teacher):
    """Drawn again from the same generator, token by token without a cache; ends at the end token or at the longest."""
    folder = write(config())
    tokens = prepare(config(path=str(folder)), say=lambda line: None)
    assert tokens.generated_by == fingerprint(Path("teacher")) and tokens.tokenizer.name == "bytes"
    starts = np.flatnonzero(tokens.train_mask == 2)
    documents = np.split(np.asarray(tokens.train), starts[1:])
    assert len(documents) + (tokens.val_mask == 2).sum() == 150
    for document in documents:
        assert document[0] == 256 and 2 <= len(document) <= T + 1
        assert len(document) == T + 1 or document[-1] == 256
        assert 256 not in document[1:-1]
    assert len({document.tobytes() for document in documents}) > 100  # no part is another's copy
    ids = np.concatenate(
        [document[1:2] for document in documents]
    )  # first tokens: draws of softmax at the start
    with torch.no_grad():
        probs = teacher(torch.tensor([[256]]))[0, 0].softmax(-1)
    top = int(probs.argmax())
    assert abs((ids == top).mean() - float(probs[top])) < 4 * (float(probs[top]) / len(ids)) ** 0.5


def test_prompts_are_context_and_each_is_answered(teacher):
    Path("prompts.txt").write_text("one\n\ntwo\nthree\n")
    Path("prompts.jsonl").write_text(
        "\n".join(json.dumps({"prompt": prompt}) for prompt in ("one", "two", "three"))
    )
    folders = [
        write(config(prompts=f"prompts.{kind}", val_fraction=0.4)) for kind in ("txt", "jsonl")
    ]
    tokens = prepare(config(path=str(folders[0])), say=lambda line: None)
    found = []
    for split in ("train", "val"):
        ids, mask = np.asarray(getattr(tokens, split)), np.asarray(getattr(tokens, f"{split}_mask"))
        for document, marks in zip(
            *(np.split(part, np.flatnonzero(mask == 2)[1:]) for part in (ids, mask)), strict=True
        ):
            length = int((marks != 1).sum())
            found.append(bytes(document[1:length].tolist()).decode())
            assert marks[0] == 2 and (marks[1:length] == 0).all() and (marks[length:] == 1).all()
    assert sorted(found) == ["one", "three", "two"]
    assert (folders[0] / "train.bin").read_bytes() == (folders[1] / "train.bin").read_bytes()


def test_a_killed_writer_goes_on_and_ranks_share_the_work(teacher, monkeypatch):
    whole = write(config())
    content = {file.name: file.read_bytes() for file in whole.iterdir()}
    again = config()
    again.cache_dir = "elsewhere"
    real, calls = written.write_part, []

    def dying(*inputs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*inputs)

    monkeypatch.setattr(written, "write_part", dying)
    with pytest.raises(KeyboardInterrupt):
        write(again)
    monkeypatch.setattr(written, "write_part", lambda *inputs: calls.append(2) or real(*inputs))
    for rank in (1, 0):
        ranks = Ranks(rank=rank, world=2)
        ranks.share = lambda value: value
        folder = write(again, ranks)
    assert calls.count(2) == 2  # of three parts one was there
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == content
    assert write(again) == folder and calls.count(2) == 2


@contextmanager
def files_of(limit: int):
    """No file grows beyond `limit` bytes: a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_line_and_keeps_the_parts(teacher, monkeypatch):
    whole = write(config())
    content = {file.name: file.read_bytes() for file in whole.iterdir()}
    again = config()
    again.cache_dir = "elsewhere"
    ranks = Ranks()
    ranks.say = lambda line: None  # to a file, under pytest
    rule = r"^data.cache_dir=elsewhere/written-\S+: cannot write there \(File too large\); make room .* keeps the finished"
    with files_of(64), pytest.raises(UserError, match=rule):  # in the first part
        write(again, ranks)
    folder = Path("elsewhere") / whole.name
    with monkeypatch.context() as patch:
        patch.setattr(written, "assemble_parts", lambda *inputs: None)
        write(again)
    with files_of(len(content["train.bin"]) - 1), pytest.raises(UserError, match=rule):
        write(again, ranks)
    assert len(list((folder / "parts").glob("*.json"))) == 3 and not (folder / "meta.json").exists()
    monkeypatch.setattr(
        written, "write_part", lambda *inputs: pytest.fail("a part was written again")
    )
    assert {file.name: file.read_bytes() for file in write(again).iterdir()} == content


def test_a_writer_killed_at_its_last_step_writes_no_part_again(teacher, monkeypatch):
    whole = write(config())
    content = {file.name: file.read_bytes() for file in whole.iterdir()}
    again = config()
    again.cache_dir = "elsewhere"
    with monkeypatch.context() as patch:
        patch.setattr(
            written,
            "seal_folder",
            lambda *inputs, **facts: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        with pytest.raises(KeyboardInterrupt):
            write(again)
    monkeypatch.setattr(
        written, "write_part", lambda *inputs: pytest.fail("a part was written again")
    )
    assert {file.name: file.read_bytes() for file in write(again).iterdir()} == content


@pytest.mark.parametrize("kind", ["text", "unbiased", "sampled"])
def test_the_next_token_is_the_draw(teacher, kind):
    tokens = prepare(config(path=str(write(config()))), say=lambda line: None)
    batch = tokens.blocks("train", T).read(np.arange(3))
    access = AccessConfig(kind=kind, k=4, n=3)
    found = OnlineTeacher(
        teacher, access, 1.0, autocast(torch.device("cpu"), "float32"), wrote=True
    ).targets(batch)
    labels, kept = batch.labels.flatten(), batch.labels.flatten() >= 0
    if kind == "text":
        assert torch.equal(found.ids[kept, 0].long(), labels[kept])
    elif kind == "unbiased":
        inside = (found.ids[:, :4] == labels[:, None]).any(1)
        assert (
            torch.equal(found.ids[kept & ~inside, 4].long(), labels[kept & ~inside])
            and (found.ids[inside, 4] == -1).all()
        )
        assert 0 < inside[kept].float().mean() < 1
    else:
        assert found.ids.shape[1] == 3 and not torch.equal(found.ids[kept, 0].long(), labels[kept])


@pytest.mark.parametrize("kind", ["text", "unbiased"])
def test_what_it_wrote_is_recorded_as_it_is_online(teacher, kind):
    tokens = prepare(config(path=str(write(config()))), say=lambda line: None)
    access = AccessConfig(kind=kind, k=4)
    asked = CaptureConfig(
        TeacherPath("teacher"),
        access,
        config(path=str(tokens.folder)),
        T,
        64,
        out="cache",
        device="cpu",
    )
    Capture(asked, tokens, load_teacher("teacher", tokens, T, access), Ranks()).run()
    blocks = tokens.blocks("train", T)
    batch = blocks.read(np.arange(len(blocks)))  # documents that ended early leave padding
    online = OnlineTeacher(
        teacher, access, 1.0, autocast(torch.device("cpu"), "float32"), wrote=True
    ).targets(batch)
    found = CachedTeacher("cache", tokens, T, access, 1.0, 257).targets(batch)
    assert (
        torch.equal(found.ids.flatten(0, 1).long(), online.ids.long()) and (batch.labels < 0).any()
    )


def test_what_another_wrote_or_nobody_says_who_is_no_draw_of_the_teachers(teacher):
    tokens = prepare(config(path=str(write(config()))), say=lambda line: None)
    other = GPT(replace(teacher.config, n_embd=32), 257)
    other.save_pretrained("other")
    Tokenizer({"kind": "bytes"}).save(Path("other"))
    access = AccessConfig(kind="text")
    batch = tokens.blocks("train", T).read(np.arange(3))
    online = OnlineTeacher(other, access, 1.0, autocast(torch.device("cpu"), "float32")).targets(
        batch
    )
    assert not torch.equal(online.ids[:, 0].long(), batch.labels.flatten().clamp(min=-1))
    asked = CaptureConfig(
        TeacherPath("other"),
        access,
        config(path=str(tokens.folder)),
        T,
        64,
        out="cache",
        device="cpu",
    )
    Capture(asked, tokens, load_teacher("other", tokens, T, access), Ranks()).run()
    found = CachedTeacher("cache", tokens, T, access, 1.0, 257).targets(
        batch
    )  # its teacher, asked again, agrees
    assert torch.equal(found.ids.flatten(0, 1).long(), online.ids.long())
    meta = json.loads((tokens.folder / "meta.json").read_text())
    del meta["writer"]
    (tokens.folder / "meta.json").write_text(json.dumps(meta))
    assert prepare(config(path=str(tokens.folder)), say=lambda line: None).generated_by is None


def test_the_written_token_is_no_draw_from_the_tail(teacher):
    """Of stratified even the single draw is from outside the top entries: the written token would weigh the top twice."""
    tokens = prepare(config(path=str(write(config()))), say=lambda line: None)
    batch = tokens.blocks("train", T).read(np.arange(3))
    access, on_cpu = (
        AccessConfig(kind="stratified", k=4, n=1),
        autocast(torch.device("cpu"), "float32"),
    )
    mine, drawn = (
        OnlineTeacher(teacher, access, 1.0, on_cpu, wrote).targets(batch).ids
        for wrote in (True, False)
    )
    assert torch.equal(mine, drawn) and not (mine[:, :4] == mine[:, 4:]).any()


def test_a_capture_writes_the_documents_first(teacher):
    asked = CaptureConfig(
        TeacherPath("teacher"),
        AccessConfig(kind="text"),
        config(),
        T,
        64,
        out="cache",
        device="cpu",
    )
    run_capture(asked)
    tokens = prepare(config(path=str(write(config()))), say=lambda line: None)
    batch = tokens.blocks("train", T).read(np.arange(3))
    found = CachedTeacher("cache", tokens, T, asked.access, 1.0, 257).targets(batch)
    assert torch.equal(found.ids.flatten().long(), batch.labels.flatten().clamp(min=-1))


def test_a_student_learns_from_what_its_teacher_wrote(teacher):
    run = Config(
        data=config(),
        model=ModelConfig(n_layer=1, n_embd=16, n_head=2, block_size=T),
        teacher=TeacherConfig(path="teacher"),
        access=AccessConfig(kind="unbiased", k=4),
        optim=OptimConfig(lr=1e-2, warmup_steps=2),
        batch_size=4,
        max_steps=4,
        eval_tokens=64,
        run_dir="run",
        device="cpu",
    )
    train.run(replace(run))
    assert Path("run/summary.json").is_file()


def test_what_cannot_be_written_is_one_line(teacher):
    for data, rule in (
        (config(prompts="nowhere"), r"data.prompts=nowhere: cannot be read"),
        (
            config(prompts="long.txt"),
            r"data.prompts=long.txt: a prompt has 41 tokens, a document 17 at most",
        ),
        (config(prompts="single.txt"), r"data.prompts=single.txt: 1 prompts; at least two"),
    ):
        Path("long.txt").write_text("x" * 40 + "\nshort\n")
        Path("single.txt").write_text("one\n")
        with pytest.raises(UserError, match=rule):
            write(data)
    with pytest.raises(UserError, match=r"data.path=null: data=written needs teacher.path"):
        written.write_first(config(), None, T, Ranks())
    with pytest.raises(
        UserError, match=r"data.path=nowhere: data=written needs a folder that a teacher wrote"
    ):
        prepare(config(path="nowhere"))
