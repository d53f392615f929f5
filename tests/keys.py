"""docs/keys.md: every key of every script, from the comments beside the fields of the dataclasses.

python -m tests.keys > docs/keys.md
"""

import ast
import dataclasses
import inspect
import re

from conf.schema import Config
from eval import EvalConfig
from sample import SampleConfig
from teachers.capture import CaptureConfig

SCRIPTS = {
    "train.py": Config,
    "sample.py": SampleConfig,
    "eval.py": EvalConfig,
    "teachers.capture": CaptureConfig,
}
NOT_TYPED = {"experiment"}  # the record of a group that was chosen
# Fields that the choice of a group sets: teacher=cache is teacher.kind
GROUPS = {"data.name", "teacher.kind", "access.kind", "loss.name", "optim.name", "wandb.mode"}


def comments(kind: type) -> dict[str, str]:
    """The comment of each field: the one beside it and below that, else the one above."""
    source = inspect.getsource(kind)
    (tree,) = ast.parse(source).body
    lines = source.splitlines()
    result = {}
    previous = None
    end = 0
    for node in tree.body:
        between = [line.strip() for line in lines[end : node.lineno - 1]]
        above = [line.removeprefix("# ") for line in between if line.startswith("#")]
        end = node.end_lineno
        if not isinstance(node, ast.AnnAssign):
            continue
        name = node.target.id
        beside = re.search(r"  # (.*)", lines[end - 1])
        if beside and previous:  # what stands above belongs to the field before
            result[previous] = " ".join([result[previous], *above])
        result[name] = beside[1] if beside else " ".join(above)
        previous = name
    return result


def rows(kind: type, prefix: str = "") -> list[tuple[str, str, str]]:
    """(key, default, meaning) of every field, nested ones too."""
    meanings = comments(kind)
    table = []
    for field in dataclasses.fields(kind):
        key = prefix + field.name
        nested = field.default_factory
        if nested is not dataclasses.MISSING and dataclasses.is_dataclass(nested):
            table += rows(nested, f"{key}.")
        elif field.name not in NOT_TYPED:
            if key in GROUPS:
                key = prefix.removesuffix(".")
            default = field.default
            if default is dataclasses.MISSING:
                default = "[]"
            default = {None: "unset", "???": "required"}.get(default, str(default))
            table.append((key, default, meanings[field.name]))
    return table


def page() -> str:
    text = "# Every key\n\nDefaults are those of the schema; an option of `conf/` may set others.\n"
    for script, kind in SCRIPTS.items():
        text += f"\n## {script}\n\n| key | default | what it is |\n|---|---|---|\n"
        for key, default, meaning in rows(kind):
            meaning = meaning.replace("|", r"\|").replace("<", "&lt;")
            text += f"| `{key}` | {default} | {meaning} |\n"
        if script in ("eval.py", "teachers.capture"):
            text += "\n`data.*` are those of train.py.\n"
    return text


if __name__ == "__main__":
    print(page(), end="")
