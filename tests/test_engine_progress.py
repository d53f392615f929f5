"""What a user sees of a run."""

import re
from types import SimpleNamespace

import pytest

from engine import progress
from engine.progress import ProgressLine, ProgressPrinter, format_duration, print_closing


def test_durations():
    assert format_duration(59.6) == "0:59"
    assert format_duration(3725) == "1:02:05"


def test_a_long_job_says_its_pace_every_ten_seconds(monkeypatch):
    moments = iter([0, 5, 11, 12, 30])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(moments)))
    lines = []
    printer = ProgressPrinter("job", 8, lines.append)
    for _ in range(4):
        printer.add(2, 99)
    assert lines == ["job: 50% | 18 tok/s | ETA 0:11", "job: 100% | 13 tok/s | ETA 0:00"]


@pytest.mark.parametrize("bound, label", [(False, "kl to teacher"), (True, "kl to teacher >=")])
def test_the_line_of_a_step(capsys, bound, label):
    row = {"step": 1, "tokens": 100, "tokens_per_s": 5e3}
    row |= {"loss": 2.0, "ce": 3.0, "kl": 1.0, "teacher_mass": 0.9}
    line = ProgressLine("student", 9, True, bound)
    line.show(row, 61.0, 0.5, 2**30)
    assert capsys.readouterr().out == ""  # ten seconds have not passed
    line.show(row | {"val_loss": 3.5, "val_kl": 0.25}, 61.0, None, 2**30)
    line.close()
    words = f"student 1/9 | loss 2.000 | ce 3.000 kl 1.000 | held-out 3.500 {label} 0.250"
    assert capsys.readouterr().out == f"{words} | 5,000 tok/s | MFU n/a | ETA 1:01 | 1.0 GiB\n"


@pytest.mark.parametrize("live", [False, True])
def test_the_pace_shown_is_a_mean(capsys, live):
    """Of the steps since the last line, on a terminal of the last seconds."""
    row = {
        "loss": 2.0,
        "teacher_mass": 0.0,
    }
    lines = []
    line = ProgressLine("student", 9, True)
    if live:
        line.live = SimpleNamespace(update=lines.append)
    paces = (100.0, 10_000.0, 100_000.0)  # a step of 10 s, of 0.1 s, of 0.01 s
    for step, pace in enumerate(paces, start=1):
        row["step"] = step
        row["tokens"] = 1000 * step
        row["tokens_per_s"] = pace
        evaluation = {"val_loss": 3.0} if step != 2 else {}
        line.show(row | evaluation, 1.0, pace / 1e6, 0)
    lines += capsys.readouterr().out.splitlines()
    assert "100 tok/s | MFU 0.0%" in lines[0]
    slow, quick = re.findall(r"([\d,]+) tok/s", " ".join(lines[-2:]))
    if live:  # 2 and 3 steps in some 10 s
        assert (slow, quick) == ("199", "299")
    else:  # 2 steps in 0.11 s
        assert "18,182 tok/s | MFU 1.8%" in lines[1]


def test_the_last_lines_compare_and_say_what_to_run_next(capsys):
    student = {"parameters": 1e6, "text_tokens": 2000, "best_val_loss": 1.5, "teacher": None}
    print_closing("r", student, None, "Once", "text", taught=False)
    out = capsys.readouterr().out
    assert "teacher" not in out and "Next: python sample.py path=r\n" in out

    print_closing("my run", student, None, "Once", "text", taught=True)  # by a recording
    out = capsys.readouterr().out
    assert "      python eval.py 'path=my run'\n" in out and ", taught by the teacher\n" in out
    assert "baseline=on trains the same student without the teacher" in out

    teacher = {"path": "t", "parameters": 2e6, "val_loss": 1.0}
    student |= {"teacher": teacher}
    print_closing("r", student, {"best_val_loss": 1.75}, "Once", "stdlib", taught=True)
    out = capsys.readouterr().out
    for line in (
        "  student   1.500   1.00M parameters, 2,000 tokens of text, taught by the teacher",
        "The teacher was worth 0.250 nats a token.",
        "Next: python sample.py path=r prompt='def '",
        "      python eval.py path=r teacher.path=t",
    ):
        assert line in out.splitlines()
