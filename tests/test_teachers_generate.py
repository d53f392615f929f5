"""Documents that a teacher writes: its own draws, whole, resumable, and any access over them."""

import json
import resource
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from conf.schema import Config
from data import DataConfig, prepare
from engine import UserError
from engine.checkpoint import fingerprint
from engine.optim import OptimConfig
from engine.ranks import Ranks
from model import ModelConfig
from teachers import capture, generate
from teachers.access import AccessConfig
from teachers.cached import CachedTeacher
from teachers.online import OnlineTeacher, TeacherConfig
from tests.helpers import record, save_teacher

T = 16


@pytest.fixture
def teacher(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = save_teacher("teacher", width=16, block_size=T + 1)
    model.wte.weight.data[256] += 0.2  # documents that end early
    model.save_pretrained("teacher")
    return model


def written(**changes) -> DataConfig:
    return DataConfig(name="written", **{"cache_dir": "tokens", "documents": 150} | changes)


def write(data: DataConfig, ranks=None) -> Path:
    return Path(generate.generate_documents(data, "teacher", T + 1, ranks or Ranks()))


def read(folder: Path):
    return prepare(written(path=str(folder)), say=lambda line: None)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def documents_of(ids: np.ndarray, mask: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    starts = np.flatnonzero(mask == 2)[1:]
    return list(zip(np.split(ids, starts), np.split(mask, starts), strict=True))


def test_documents_are_the_teachers_own_draws(teacher):
    """Each ends at the end token or at the longest; the first tokens have the teacher's probability."""
    tokens = read(write(written()))
    assert tokens.generated_by == fingerprint(Path("teacher"))
    assert tokens.tokenizer.name == "bytes"
    documents = [ids for ids, _ in documents_of(tokens.train, tokens.train_mask)]
    assert len(documents) + (tokens.val_mask == 2).sum() == 150
    lengths = set()
    for document in documents:
        assert document[0] == 256 and 2 <= len(document) <= T + 1
        assert len(document) == T + 1 or document[-1] == 256
        assert 256 not in document[1:-1]
        lengths.add(len(document))
    assert len(lengths) > 2
    assert len({document.tobytes() for document in documents}) > 100  # no part is another's copy
    first = np.array([document[1] for document in documents])
    with torch.no_grad():
        probs = teacher(torch.tensor([[256]]))[0, 0].softmax(-1)
    p = probs.max().item()
    share = (first == probs.argmax().item()).mean()
    assert abs(share - p) < 4 * (p / len(first)) ** 0.5


def test_prompts_are_context_and_each_is_answered(teacher):
    prompts = ["one", "two", "three"]
    Path("prompts.txt").write_text("one\n\ntwo\nthree\n")
    lines = [json.dumps({"prompt": prompt}) for prompt in prompts]
    Path("prompts.jsonl").write_text("\n".join(lines))
    text = write(written(prompts="prompts.txt", val_fraction=0.4))
    assert contents(text) == contents(
        write(written(prompts="prompts.jsonl", val_fraction=0.4, cache_dir="other"))
    )
    tokens = read(text)
    answered = []
    for ids, mask in (
        *documents_of(tokens.train, tokens.train_mask),
        *documents_of(tokens.val, tokens.val_mask),
    ):
        length = int((mask != 1).sum())
        assert mask.tolist() == [2] + [0] * (length - 1) + [1] * (len(mask) - length)
        answered.append(bytes(ids[1:length].tolist()).decode())
    assert sorted(answered) == sorted(prompts)


def test_a_killed_writer_goes_on_and_ranks_share_the_work(teacher, monkeypatch):
    whole = contents(write(written()))
    real = generate.write_documents
    calls = []

    def counting(*inputs):
        calls.append(1)
        return real(*inputs)

    def dying(*inputs):
        if calls:
            raise KeyboardInterrupt
        return counting(*inputs)

    # Killed in the second of three parts.
    again = written(cache_dir="elsewhere")
    monkeypatch.setattr(generate, "write_documents", dying)
    with pytest.raises(KeyboardInterrupt):
        write(again)
    monkeypatch.setattr(generate, "write_documents", counting)
    # Killed before the folder is sealed.
    with monkeypatch.context() as patch:
        patch.setattr(generate, "seal_folder", lambda *inputs, **facts: 1 / 0)
        for rank in (1, 0):
            ranks = Ranks(rank=rank, world=2)
            ranks.share = lambda value: value
            with nullcontext() if rank else pytest.raises(ZeroDivisionError):
                write(again, ranks)
    assert len(calls) == 3
    for _ in range(2):
        assert contents(write(again)) == whole
    assert len(calls) == 3


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
    whole = contents(write(written()))
    again = written(cache_dir="elsewhere")
    ranks = Ranks()
    ranks.say = lambda line: None  # to a file, under pytest
    message = (
        r"^data.cache_dir=elsewhere/written-\S+: cannot write there \(File too large\);"
        " make room .* keeps the finished"
    )
    with files_of(64), pytest.raises(UserError, match=message):  # in the first part
        write(again, ranks)
    with monkeypatch.context() as patch:
        patch.setattr(generate, "assemble_parts", lambda *inputs: None)
        write(again)
    with files_of(len(whole["train.bin"]) - 1), pytest.raises(UserError, match=message):
        write(again, ranks)
    monkeypatch.setattr(generate, "write_documents", None)  # no part is written again
    assert contents(write(again)) == whole


@pytest.mark.parametrize("kind", ["text", "unbiased"])
@pytest.mark.parametrize("writer", ["teacher", "other"])
def test_what_it_wrote_is_recorded_as_its_draws(teacher, kind, writer):
    """And what another wrote is not."""
    tokens = read(write(written()))
    model = teacher
    if writer == "other":
        model = save_teacher("other", block_size=T + 1)
    access = AccessConfig(kind, k=4)
    data = written(path=str(tokens.folder))
    record(tokens, data, access, teacher=capture.TeacherPath(writer), eval_tokens=64)
    blocks = tokens.blocks("train", T)
    batch = blocks.read(np.arange(len(blocks)))  # documents that ended early leave padding
    assert (batch.labels < 0).any()
    online = OnlineTeacher(model, access, 1.0, nullcontext, writer == "teacher")
    found = CachedTeacher("cache", tokens, T, access, 1.0, 257).read_targets(batch)
    assert torch.equal(found.ids.flatten(0, 1).long(), online.targets(batch).ids.long())
    if kind == "text":
        drawn = found.ids[..., 0] == batch.labels
        assert drawn[batch.labels >= 0].all() == (writer == "teacher")


def test_capture_and_train_write_the_documents_first(teacher):
    text = AccessConfig("text")
    config = capture.CaptureConfig(
        capture.TeacherPath("teacher"), text, written(), T, 64, out="cache", device="cpu"
    )
    capture.run(config)
    folder = write(written())
    assert config.data.path == str(folder)
    train.run(
        Config(
            data=written(documents=100),
            model=ModelConfig(n_layer=1, n_embd=16, n_head=2, block_size=T),
            teacher=TeacherConfig(path="teacher"),
            access=text,
            optim=OptimConfig(lr=1e-2),
            batch_size=4,
            max_steps=2,
            eval_tokens=64,
            run_dir="run",
            device="cpu",
        )
    )
    assert Path("run/summary.json").is_file() and len(list(Path("tokens").iterdir())) == 2


def test_what_cannot_be_written_is_one_line(teacher):
    Path("long.txt").write_text("x" * 40 + "\nshort\n")
    Path("single.txt").write_text("one\n")
    Path("number.jsonl").write_text('{"prompt": 1}\n{"prompt": "two"}\n')
    cases = [
        ("nowhere", "cannot be read"),
        ("number.jsonl", "cannot be read"),
        ("long.txt", "a prompt has 41 tokens, a document 17 at most"),
        ("single.txt", "1 prompts; at least two"),
    ]
    for prompts, message in cases:
        with pytest.raises(UserError, match=f"^data.prompts={prompts}: {message}"):
            write(written(prompts=prompts))
    with pytest.raises(UserError, match=r"^data.path=null: data=written needs teacher.path"):
        generate.generate_documents(written(), None, T, Ranks())
    with pytest.raises(UserError, match=r"^data.path=nowhere: data=written needs a folder"):
        read(Path("nowhere"))
    tokens = write(written(documents=2, val_fraction=0.9))  # one is left to train on
    assert len(documents_of(read(tokens).train, read(tokens).train_mask)) == 1
