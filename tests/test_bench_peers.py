"""The arithmetic of tests/bench_peers.py on numbers made up; the bench itself runs by hand."""

import pytest

from tests.bench_peers import CASES, Case, check_loss, make_rows, table_lines


def measurements(seconds, peak_mib=100.0):
    shared = {"loss": 2.0, "peak_mib": peak_mib}
    return [shared | {"seconds": float(each)} for each in seconds.split()]


@pytest.fixture
def rows():
    """Three rounds in which DistillKit and transformers' Trainer were not there."""
    rounds = {
        "cross-entropy, ours": measurements("1 2 4"),
        "online, ours": measurements("5 6 7"),
        "online, TRL GKD": measurements("12 14 17", peak_mib=250.0),
        "offline, ours": measurements("1 1 1"),
        "teacher, ours": measurements("3 4 4"),
        "teacher, transformers": measurements("2 2 2"),
    }
    caches = {"offline, ours": 194}
    versions = dict.fromkeys(rounds, "")
    rows = make_rows(rounds, caches, versions)
    return {(row["arm"], row["tool"]): row for row in rows}


def test_ratios_are_paired_by_round_and_the_teacher_is_taken_off(rows):
    ours = rows["online", "ours"]
    assert ours["seconds"] == 6.0
    assert ours["student_seconds"] == 2.0  # of 2, 2, 3
    assert ours["seconds_ratio"] == 1
    assert ours["student_seconds_ratio"] == 1
    assert ours["peak_mib_ratio"] == 1

    theirs = rows["online", "TRL GKD"]
    assert theirs["seconds"] == 14.0
    assert theirs["seconds_low"] == 12.0
    assert theirs["seconds_high"] == 17.0
    assert theirs["seconds_ratio"] == pytest.approx(2.4)  # of 2.4, 2.33, 2.43
    assert theirs["student_seconds"] == 12.0  # of 10, 12, 15
    assert theirs["student_seconds_ratio"] == 5.0  # of 5, 6, 5
    assert theirs["peak_mib_ratio"] == 2.5
    assert theirs["rounds"] == 3
    assert rows["teacher", "transformers"]["seconds_ratio"] == 0.5  # where we lose
    assert rows["offline", "ours"]["cache_bytes_ratio"] == 1


def test_a_peer_that_is_not_installed_has_a_row_that_says_so(rows):
    assert list(rows) == [(case.arm, case.tool) for case in CASES]
    _, *lines = table_lines(list(rows.values()))
    lines = {tuple(line[:2]): line[2:] for line in lines}
    *numbers, note = lines["offline", "DistillKit"]
    assert set(numbers) == {""}
    assert note == "distillkit is not installed"
    assert lines["cross-entropy", "Trainer"][-1] == "transformers is not installed"
    assert lines["online", "TRL GKD"][:4] == ["14.000", "2.40", "12.000", "5.00"]


def test_a_first_loss_off_the_reference_stops_the_bench():
    case = Case("online", "TRL GKD", "trl", "kl", "")
    check_loss(case, 10.0015, 10.0)
    message = r"^online, TRL GKD: first loss .*, the reference has 10"
    for loss in (10.003, float("nan")):
        with pytest.raises(ValueError, match=message):
            check_loss(case, loss, 10.0)
