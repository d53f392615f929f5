"""A run directory belongs to one process and one configuration, by what it reads, not its names."""

from types import SimpleNamespace

import pytest

from engine import UserError
from engine.checkpoint import save
from engine.run_dir import claim, find_fingerprints, fixed, identity, input_difference

CONFIG = {
    "optim": {"lr": 0.1},
    "max_steps": 10,
    "resume": "auto",
    "run_dir": "x",
    "wandb": {"mode": "disabled"},
    "teacher": {"path": "t", "kind": "online"},
    "model": {"init": None},
    "data": {
        "path": "a.txt",
        "tokenizer": "bpe",
        "vocab_size": 300,
        "val_fraction": 0.1,
        "prompts": None,
        "documents": 9,
        "max_tokens": None,
        "cache_dir": "tokens",
    },
}
READ = {"tokens": "a", "tokenizer": "b", "teacher": "c", "init": None}


def changed(**data):
    return {"data": CONFIG["data"] | data}


@pytest.fixture
def run_dir(tmp_path):
    """The directory of a run of CONFIG that has saved."""
    claim(tmp_path, CONFIG, READ).close()
    save(tmp_path, 1, lambda folder: None, {"fingerprints": READ})
    return tmp_path


@pytest.mark.parametrize(
    "changes",
    [
        {"max_steps": 20, "wandb": {"mode": "offline"}},
        {"teacher": {"path": "moved", "kind": "online"}},
        changed(path="/scratch/a.txt", tokenizer="./tok", vocab_size=4096, cache_dir="/scratch"),
        {"resume": "{run_dir}/checkpoints/step-00000001"},
    ],
    ids=str,
)
def test_a_continuation_may_differ_in_where_and_how_long(run_dir, changes):
    if "resume" in changes:
        changes = {"resume": changes["resume"].format(run_dir=run_dir)}
    claim(run_dir, CONFIG | changes, READ).close()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"optim": {"lr": 0.2}}, "holds a run with optim.lr=0.1, this one has optim.lr=0.2; give"),
        ({"resume": "never"}, "resume=never: run_dir=.* holds checkpoints of its own"),
        ({"resume": "elsewhere/step-1"}, "of its own; resume=auto goes on with them, or give"),
    ],
    ids=str,
)
def test_a_directory_with_checkpoints_of_another_run_is_refused(run_dir, changes, message):
    with pytest.raises(UserError, match=message):
        claim(run_dir, CONFIG | changes, READ)


@pytest.mark.parametrize(
    "changes, read, message",
    [
        (
            changed(path="b.txt"),
            {"tokens": "other"},
            "did not have the tokens of data.path=b.txt .*; set data.path=a.txt, or give another",
        ),
        (
            changed(path="b.txt", tokenizer="char"),
            {"tokens": "other", "tokenizer": "other"},
            "of data.path=b.txt data.tokenizer=char .*; set data.path=a.txt data.tokenizer=bpe,",
        ),
        (
            {},
            {"tokens": "other"},
            "the tokens of data.path=a.txt changed since .*; bring the old content back,",
        ),
        (
            {"teacher": {"path": "u", "kind": "online"}},
            {"teacher": "other"},
            "did not have the teacher of teacher.path=u .*; set teacher.path=t, or give another",
        ),
        (
            {"model": {"init": "m"}},
            {"init": "of m"},
            "did not have the init of model.init=m .*; set model.init=None, or give another",
        ),
    ],
    ids=str,
)
def test_what_a_run_reads_is_compared_by_its_content(run_dir, changes, read, message):
    config = CONFIG | changes
    before = (run_dir / "config.yaml").read_text()
    with pytest.raises(UserError, match=f"^run_dir=.*: .*{message}.*run_dir$"):
        claim(run_dir, config, READ | read)
    assert (run_dir / "config.yaml").read_text() == before
    checkpoint = run_dir / "checkpoints/step-00000001"
    assert input_difference(checkpoint, config, READ) is None


def test_two_processes_cannot_train_in_one_directory(tmp_path):
    lock = claim(tmp_path, CONFIG, READ)
    with pytest.raises(UserError, match="another process is training there"):
        claim(tmp_path, CONFIG, READ)
    lock.close()
    claim(tmp_path, CONFIG, READ).close()


def test_identity_follows_what_is_learned_and_nothing_else():
    same = identity(CONFIG, READ)
    assert identity(CONFIG | {"run_dir": "y"}, READ) == same
    assert identity(CONFIG | changed(path="./a.txt"), READ) == same
    assert identity(CONFIG, READ | {"tokens": "other"}) != same
    assert identity(CONFIG, READ | {"init": "other"}) != same
    assert identity(CONFIG | {"max_steps": 11}, READ) != same

    names = fixed(CONFIG)  # by which report.py tells runs apart
    assert names["data.path"] == "a.txt"
    assert names["optim.lr"] == 0.1
    assert not names.keys() & {"max_steps", "resume", "run_dir", "wandb.mode", "data.cache_dir"}


def test_fingerprints_are_of_all_that_a_run_reads(tmp_path):
    save(tmp_path, 1, lambda folder: (folder / "config.json").write_text("{}"), {})
    tokens = SimpleNamespace(fingerprint="a", tokenizer=SimpleNamespace(fingerprint="b"))
    model = SimpleNamespace(init=None)
    config = SimpleNamespace(model=model)
    assert find_fingerprints(config, tokens) == READ | {"teacher": None}
    model.init = str(tmp_path)
    found = find_fingerprints(config, tokens, SimpleNamespace(fingerprint="c"))
    assert found == READ | {"init": found["init"]}
    assert len(found["init"]) == 64
