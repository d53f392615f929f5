"""A run directory belongs to one process and one configuration."""

import pytest

from engine import UserError
from engine.checkpoint import save
from engine.run_dir import claim, fixed, identity

CONFIG = {
    "optim": {"lr": 0.1},
    "max_steps": 10,
    "resume": "auto",
    "run_dir": "x",
    "wandb": {"mode": "disabled"},
    "teacher": {"path": "t", "kind": "online"},
}


@pytest.fixture
def run_dir(tmp_path):
    """The directory of a run of CONFIG that has saved."""
    claim(tmp_path, CONFIG).close()
    save(tmp_path, 1, lambda folder: None, {})
    return tmp_path


@pytest.mark.parametrize(
    "changes",
    [
        {"max_steps": 20, "wandb": {"mode": "offline"}},
        {"teacher": {"path": "moved", "kind": "online"}},
        {"resume": "{run_dir}/checkpoints/step-00000001"},
    ],
    ids=str,
)
def test_a_continuation_may_differ_in_where_and_how_long(run_dir, changes):
    if "resume" in changes:
        changes = {"resume": changes["resume"].format(run_dir=run_dir)}
    claim(run_dir, CONFIG | changes).close()


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
        claim(run_dir, CONFIG | changes)


def test_two_processes_cannot_train_in_one_directory(tmp_path):
    lock = claim(tmp_path, CONFIG)
    with pytest.raises(UserError, match="another process is training there"):
        claim(tmp_path, CONFIG)
    lock.close()
    claim(tmp_path, CONFIG).close()


def test_identity_follows_what_is_learned_and_nothing_else():
    assert identity(CONFIG, "a") == identity(CONFIG | {"run_dir": "y"}, "a")
    assert identity(CONFIG, "a") != identity(CONFIG, "b")
    assert identity(CONFIG, "a") != identity(CONFIG | {"max_steps": 11}, "a")
    assert fixed(CONFIG) == {"optim.lr": 0.1, "teacher.kind": "online"}
