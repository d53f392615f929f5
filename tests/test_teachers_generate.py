"""Documents that a teacher writes: its own draws, whole, resumable, and any access over them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from conf.schema import Config
from data import DataConfig, Tokens
from engine import UserError
from engine.checkpoint import fingerprint
from engine.optim import OptimConfig
from engine.ranks import Ranks
from teachers import capture, generate
from teachers.access import AccessConfig
from teachers.online import TeacherConfig
from tests.recording import SHAPE, T, contents, open_cache, read_tokens, record, save_teacher

TEXT = AccessConfig("text")


@pytest.fixture
def teacher(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = save_teacher("teacher", block_size=T + 1)
    model.wte.weight.data[256] *= 3  # so that some documents end early
    model.save_pretrained("teacher")
    return model


def written(**changes) -> DataConfig:
    fields = {
        "name": "written",
        "cache_dir": "tokens",
        "documents": 150,
    }
    return DataConfig(**fields | changes)


def write(ranks=None, **changes) -> Path:
    config = written(**changes)
    return Path(generate.generate_documents(config, "teacher", T + 1, ranks or Ranks()))


def read(folder: Path) -> Tokens:
    return read_tokens(written(path=str(folder)))


def documents_of(tokens: Tokens, split: str) -> list[tuple]:
    """(ids, mask) of each document."""
    ids = getattr(tokens, split)
    mask = getattr(tokens, f"{split}_mask")
    starts = np.flatnonzero(mask == 2)[1:]
    documents = zip(np.split(ids, starts), np.split(mask, starts), strict=True)
    return [(ids.tolist(), mask.tolist()) for ids, mask in documents]


def test_documents_are_the_teachers_own_draws(teacher):
    """Each ends at the end token or at the longest; first tokens have the teacher's probability."""
    tokens = read(write())
    assert tokens.generated_by == fingerprint(Path("teacher"))
    documents = [ids for ids, _ in documents_of(tokens, "train")]
    assert len(documents) + len(documents_of(tokens, "val")) == 150
    for document in documents:
        assert document[0] == 256
        assert len(document) == T + 1 or document[-1] == 256
        assert 256 not in document[1:-1]
    assert len(set(map(tuple, documents))) > 100  # no part is another's copy
    with torch.no_grad():
        probs = teacher(torch.tensor([[256]]))[0, 0].softmax(-1)
    p, likeliest = probs.max(0)
    first = torch.tensor([document[1] for document in documents])
    share = (first == likeliest).float().mean()
    assert abs(share - p) < 4 * (p / len(first)) ** 0.5


def test_prompts_are_context_and_each_is_answered(teacher):
    Path("prompts.txt").write_text("one\n\ntwo\nthree\n")
    entries = [{"prompt": prompt} for prompt in ("one", "two", "three")]
    Path("prompts.jsonl").write_text("\n".join(map(json.dumps, entries)))
    Path("prompts.NDJSON").write_text("\n".join(map(json.dumps, entries)))
    Path("prompts.json").write_text(json.dumps(entries, indent=1))
    for name in ("prompts.jsonl", "prompts.NDJSON", "prompts.json"):
        assert generate.read_prompts(name) == ["one", "two", "three"]
    folder = write(prompts="prompts.txt", val_fraction=0.4)
    same = write(prompts="prompts.jsonl", val_fraction=0.4, cache_dir="other")
    assert contents(same) == contents(folder)

    tokens = read(folder)
    answered = []
    for ids, mask in documents_of(tokens, "train") + documents_of(tokens, "val"):
        length = len(mask) - mask.count(1)
        assert mask[0] == 2
        assert mask[1:length] == [0] * (length - 1)
        answered.append(bytes(ids[1:length]).decode())
    assert sorted(answered) == ["one", "three", "two"]


def test_a_writer_goes_on_where_it_was_stopped_and_ranks_share_the_work(teacher, monkeypatch):
    """No finished part is written again and the bytes are the same."""
    whole = contents(write())
    write_documents = generate.write_documents
    written_parts = []

    def counting(*inputs):
        if written_parts == [1]:
            written_parts.append("killed")
            raise KeyboardInterrupt
        documents = write_documents(*inputs)
        written_parts.append(1)
        return documents

    monkeypatch.setattr(generate, "write_documents", counting)
    with pytest.raises(KeyboardInterrupt):  # in the second of three parts
        write(cache_dir="again")
    with monkeypatch.context() as patch:  # another rank's part
        patch.setattr(Ranks, "share", lambda ranks, value: value)
        write(Ranks(rank=1, world=2), cache_dir="again")
    assert written_parts == [1, "killed", 1]
    assert contents(write(cache_dir="again")) == whole
    assert written_parts == [1, "killed", 1, 1]


@pytest.mark.parametrize("writer", ["teacher", "other"])
def test_what_it_wrote_is_recorded_as_its_draws(teacher, writer):
    """And what another wrote is not."""
    tokens = read(write())
    save_teacher("other", block_size=T + 1, n_embd=32)
    data = written(path=str(tokens.folder))
    record(tokens, data, TEXT, teacher=capture.TeacherPath(writer), eval_tokens=64)
    blocks = tokens.blocks("train", T)
    batch = blocks.read(np.arange(len(blocks)))
    cached = open_cache(tokens, TEXT, eval_tokens=64)
    drawn = cached.read_targets(batch).ids[..., 0] == batch.labels
    kept = batch.labels >= 0
    assert not kept.all()  # documents that ended early leave padding
    assert drawn[kept].all() == (writer == "teacher")


def test_training_writes_the_documents_first(teacher):
    config = Config(
        data=written(),
        model=SHAPE,
        teacher=TeacherConfig(path="teacher"),
        access=TEXT,
        optim=OptimConfig(lr=1e-2),
        batch_size=4,
        max_steps=2,
        eval_tokens=64,
        run_dir="run",
        device="cpu",
    )
    train.run(config)
    assert Path("run/summary.json").is_file()
    assert config.data.path == str(write())


PROMPTS = {
    "x" * 40 + "\nshort\n": "one has 41 tokens, a document 17 at most",
    "one\n": "give two or more lines",
    "one\n\0": r"give two or more .* .it is not UTF-8 text",
    '"a prompt without its key"\n"another"\n': "give two or more lines",
}


@pytest.mark.parametrize("text", PROMPTS)
def test_prompts_that_cannot_be_answered_are_refused(teacher, text):
    name = "prompts.jsonl" if text.startswith('"') else "prompts.txt"
    Path(name).write_text(text)
    with pytest.raises(UserError, match=f"^data.prompts={name}: {PROMPTS[text]}"):
        write(prompts=name)


def test_one_document_is_left_to_train_on(teacher):
    tokens = read(write(documents=2, val_fraction=0.9))
    assert len(documents_of(tokens, "train")) == 1
