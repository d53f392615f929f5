"""The end of tests/gpu.sh: one table of all that failed and all that is faster or leaner than ours.

python -m tests.gpu_table FOLDER STEPS COMMIT

FOLDER holds NAME.log of each step, STEPS is a file with a line "NAME STATUS SECONDS LIMIT" for
each. The table keeps to 10,000 characters, because only the end of a long output comes back from
the machine. Exit status 1 if a step failed.
"""

import re
import sys
from pathlib import Path
from typing import NamedTuple

HEADING = "==== where we lose"
LIMITS = {"tests": 2600, "training": 2600, "kernels": 3000, "bench_train": 1200}  # characters
KILLED = (124, 137)  # how `timeout` says that the limit came, by its signal or by SIGKILL


class Step(NamedTuple):
    name: str
    status: int
    seconds: int
    limit: int

    @property
    def verdict(self) -> str:
        if self.status in KILLED:
            return f"STOPPED at its limit of {self.limit} s"
        if self.status != 0:
            return f"FAILED, exit status {self.status}, {self.seconds} s"
        return f"ok, {self.seconds} s"


def read_steps(path: Path) -> list[Step]:
    steps = []
    for line in path.read_text().splitlines():
        name, *numbers = line.split()
        steps.append(Step(name, *map(int, numbers)))
    return steps


def failed_tests(log: list[str]) -> list[str]:
    """Pytest's counts and its summary of failures.

    Where it was killed before the summary, the lines that it wrote on the way.
    """
    summary = [line for line in log if line.startswith(("FAILED ", "ERROR "))]
    on_the_way = [line for line in log if "::" in line and re.search("FAILED|ERROR", line)]
    counts = [line.strip("= ") for line in log if re.match(r"=+ .*\d+ \w+.* in [\d.]+s", line)]
    if not counts:
        passed = sum("PASSED" in line for line in log)
        counts = [f"{passed} passed until it was stopped"]
    return [*counts[-1:], *(summary or on_the_way)]


def failed_parts(log: list[str]) -> list[str]:
    """The parts of training that failed, with the end of their programs' output below."""
    return [line for line in log if line.startswith(("FAILED", "    "))]


def losses(log: list[str]) -> list[str]:
    """What stands under HEADING, up to an empty line or the next heading."""
    if HEADING not in log:
        return []
    lines = []
    for line in log[log.index(HEADING) + 1 :]:
        if not line or line.startswith("===="):
            break
        lines.append(line)
    return lines


def details(step: Step, log: list[str]) -> list[str]:
    readers = {"tests": failed_tests, "training": failed_parts}
    lines = readers.get(step.name, losses)(log)
    if step.status != 0 and step.name != "tests" and not lines:
        lines = log[-8:]
    return lines


def shorten(lines: list[str], limit: int, name: str) -> list[str]:
    """As many of the first lines, each cut at 150 characters, as keep to `limit` characters."""
    kept = []
    for line in lines:
        line = line[:150]
        limit -= len(line) + 14
        if limit < 0:
            kept.append(f"... and {len(lines) - len(kept)} lines more in {name}.log")
            break
        kept.append(line)
    return kept


def make_table(folder: Path, steps: list[Step], commit: str) -> list[str]:
    table = [f"{HEADING}, {commit}"]
    for name, limit in LIMITS.items():
        step = next((step for step in steps if step.name == name), None)
        if step is None:
            table.append(f"{name:12} FAILED: it never ran")
            continue
        log = (folder / f"{name}.log").read_text(errors="replace").splitlines()
        table.append(f"{name:12} {step.verdict}")
        lines = shorten(details(step, log), limit, name)
        table += [f"{name:12} {line}" for line in lines]
    return table


def main() -> None:
    folder, path, commit = sys.argv[1:]
    steps = read_steps(Path(path))
    table = make_table(Path(folder), steps, commit)
    print("", *table, sep="\n")
    ran = [step for step in steps if step.name in LIMITS]
    sys.exit(len(ran) < len(LIMITS) or any(step.status != 0 for step in ran))


if __name__ == "__main__":
    main()
