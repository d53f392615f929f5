"""The end of tests/gpu.sh: one table of all that failed and all that is faster or leaner than ours.

python -m tests.gpu_table FOLDER STEPS COMMIT

FOLDER holds NAME.log of each step, STEPS is a file with a line "NAME STATUS SECONDS LIMIT" for
each. The table keeps to 10,000 characters, because only the end of a long output comes back from
the machine. Exit status 1 if a step failed.
"""

import sys
from pathlib import Path

NAMES = ("tests", "training", "kernels", "bench_train")
HEADING = "==== where we lose"
MAX_CHARACTERS = 2300  # of a step
KILLED = ("124", "137")  # how `timeout` says that the limit came, by its signal or by SIGKILL


def find_verdict(status: str, seconds: str, limit: str) -> str:
    if status in KILLED:
        return f"STOPPED at its limit of {limit} s"
    if status != "0":
        return f"FAILED, exit status {status}, {seconds} s"
    return f"ok, {seconds} s"


def find_details(name: str, log: str) -> list[str]:
    """What failed in the step, or where we lose."""
    lines = log.splitlines()
    if name == "tests":
        # Where pytest was killed before its summary, the lines that it wrote on the way.
        summary = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
        on_the_way = [line for line in lines if " FAILED " in line or " ERROR " in line]
        return lines[-1:] + (summary or on_the_way)
    if name == "training":
        return [line for line in lines if line.startswith(("FAILED", "    "))]
    return log.partition(f"{HEADING}\n")[2].split("\n\n")[0].splitlines()


def make_table(folder: Path, steps: dict[str, list[str]], commit: str) -> str:
    """steps: status, seconds and limit of each."""
    table = [f"{HEADING}, {commit}"]
    for name in NAMES:
        if name not in steps:
            table.append(f"{name:12} FAILED: it never ran")
            continue
        verdict = find_verdict(*steps[name])
        table.append(f"{name:12} {verdict}")
        log = (folder / f"{name}.log").read_text(errors="replace")
        details = find_details(name, log)
        if not details and not verdict.startswith("ok"):
            details = log.splitlines()[-8:]
        text = "\n".join(f"    {line[:150]}" for line in details)
        if len(text) > MAX_CHARACTERS:
            text = f"{text[:MAX_CHARACTERS]}\n    ... more in {name}.log"
        if text:
            table.append(text)
    return "\n".join(table)


def main() -> None:
    folder, path, commit = sys.argv[1:]
    steps = {}
    for line in Path(path).read_text().splitlines():
        name, *numbers = line.split()
        steps[name] = numbers
    print("", make_table(Path(folder), steps, commit), sep="\n")
    sys.exit(any(name not in steps or steps[name][0] != "0" for name in NAMES))


if __name__ == "__main__":
    main()
