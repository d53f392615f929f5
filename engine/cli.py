"""The door of every script: Hydra composes, plain dataclasses go in, and a user's mistake comes out as one line.

main("train", run, Config)      # conf/train.yaml over the schema Config, then run(Config)
"""

import os
import re
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import is_dataclass
from itertools import islice, product
from pathlib import Path
from typing import get_args, get_type_hints

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from engine import UserError, nearest

FOLDER = Path(__file__).parent.parent / "conf"
SWEEP = {"-m", "--multirun"}
VERBATIM = {"prompt", "path", "run_dir", "resume", "cache_dir"}
QUOTES = "'\""
VALUE_KINDS = {
    "Float": "a number such as 3.0e-4",
    "Integer": "a whole number",
    "Boolean": "true or false",
}


def main(name: str, run: Callable, schema: type) -> None:
    """Runs `run(config)` with the configuration that sys.argv asks for; exit status 2 after a user's mistake."""
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    with one_line(rank):
        sweep = bool(SWEEP & set(sys.argv))
        words = sorted(
            sys.argv[1:], key=lambda word: word not in SWEEP
        )  # argparse wants -m before overrides
        sys.argv[1:] = [fix(word, sweep) for word in words]
        if world > 1 and sweep:
            raise UserError(
                "-m: sweeps and torchrun do not mix (job 2 would hang); run one torchrun a job, or -m without it"
            )
        if sweep and "WANDB_SWEEP_ID" in os.environ:
            raise UserError(
                "-m: under wandb agent all jobs would be one W&B run; list the values in the sweep's parameters"
            )
        pairs = zip(
            sys.argv, sys.argv[1:], strict=False
        )  # a word behind a flag such as --cfg is the flag's own
        words = [
            word for flag, word in pairs if word[:1] != "-" and (flag[:1] != "-" or flag in SWEEP)
        ]
        check(name, words, schema, sweep)

    def task(composed):
        config = OmegaConf.to_object(composed)
        if HydraConfig.get().mode == RunMode.MULTIRUN and hasattr(config, "run_dir"):
            config.run_dir = HydraConfig.get().runtime.output_dir
            config.baseline = (
                "off" if config.baseline == "auto" else config.baseline
            )  # report.py compares a sweep's arms
            config.wandb.name = config.wandb.name or "/".join(
                Path(config.run_dir).parts[-2:]
            )  # 0, 1, ... of which sweep
        with one_line(rank):
            run(config)

    hydra.main(version_base="1.3", config_path=str(FOLDER), config_name=name)(task)()
    if (
        world > 1
    ):  # all is saved and closed; torch's threads have aborted a rank at the interpreter's own exit (3 runs of 26)
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(0)


@contextmanager
def one_line(rank: int = 0):
    """Turns a user's mistake into its line on stderr and exit status 2; a bug keeps its traceback."""
    try:
        yield
    except UserError as error:
        print(
            f"error: {error}" if rank == 0 else f"error on rank {rank}: {error}",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped at once; what was saved stays", file=sys.stderr, flush=True)
        sys.exit(130)


def fix(word: str, sweep: bool) -> str:
    """An override as people and sweeps write it, in Hydra's grammar.

    W&B's sweeps write Python's None for null. A prompt or path is taken to the letter, commas and spaces too, but in a sweep.
    Under -m, run_dir=X names the folder of all jobs: X/0, X/1, ...
    """
    key, equals, value = word.partition("=")
    if value == "None":
        return f"{key}=null"
    if key == "run_dir" and sweep:
        return f"hydra.sweep.dir={value}"
    if (
        equals
        and not sweep
        and value != "null"
        and value[:1] not in "'\""
        and key.split(".")[-1] in VERBATIM
    ):
        escaped = value.replace("\\", "\\\\").replace("'", "\\'") if "'" in value else value
        return f"{key}='{escaped}'"
    return word


def check(name: str, words: list[str], schema: type, sweep: bool = True) -> None:
    """Composes every job that the overrides ask for (at most 1,000) before the first starts; UserError on a mistake."""
    for word in words:
        if word[:1] in "+~":
            raise UserError(
                f"{word}: keys are neither added nor removed; write KEY=VALUE with a key of `{name}.py --cfg job`"
            )
        if "=" not in word:
            raise UserError(
                f"{word}: overrides are KEY=VALUE; see `python {name}.py --cfg job` for the keys"
            )
    defaults = [
        entry
        for entry in OmegaConf.load(FOLDER / f"{name}.yaml").defaults
        if not isinstance(entry, str)
    ]
    groups = {
        group: sorted(file.stem for file in (FOLDER / group).glob("*.yaml"))
        for entry in defaults
        for group in entry
    }
    known, unset = (
        keys(schema),
        {group for entry in defaults for group in entry if entry[group] is None},
    )
    unset -= {word.split("=")[0] for word in words}
    with hydra.initialize_config_dir(str(FOLDER), version_base="1.3"):
        axes = [choices(word, known, groups, unset) for word in words]
        if not sweep and (
            several := [word for word, axis in zip(words, axes, strict=True) if len(axis) > 1]
        ):
            raise UserError(
                f"{several[0]}: several values are a sweep; put -m before them, or quote the value"
            )
        for job in islice(product(*axes), 1000):
            compose(name, list(job))


def keys(schema: type, prefix: str = "") -> set[str]:
    """The dotted keys of a dataclass, those of its nested (or optional) dataclasses too."""
    found = set()
    for name, hint in get_type_hints(schema).items():
        nested = next((kind for kind in (hint, *get_args(hint)) if is_dataclass(kind)), None)
        found |= keys(nested, f"{prefix}{name}.") if nested else {prefix + name}
    return found


def choices(word: str, known: set[str], groups: dict[str, list[str]], unset: set[str]) -> list[str]:
    """The overrides that one word of a sweep stands for (one, without commas); refuses unknown keys and options.

    groups: the options of each; unset: those of which none is chosen.
    """
    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException as error:
        raise UserError(
            f"{word}: not a valid override ({str(error).splitlines()[0]}); quote special characters"
        ) from None
    key = override.key_or_group
    if key.split(".")[0] == "hydra":
        return [word]
    values = (
        [f"{key}={value}" for value in override.sweep_string_iterator()]
        if override.is_sweep_override()
        else [word]
    )
    if key in groups:
        for value in values:
            option = value.split("=", 1)[1].strip(QUOTES)
            if option not in groups[key]:
                raise UserError(
                    f"{value}: {key} is one of {', '.join(groups[key])}{nearest(option, groups[key])}"
                )
    elif (group := key.split(".")[0]) in unset:
        raise UserError(
            f"{word}: {group} is not chosen; set {group}= too, one of {', '.join(groups[group])}"
        )
    elif key not in known:
        leaves = {
            full.rsplit(".", 1)[-1]: full
            for full in sorted(known, key=lambda full: -full.count("."))
        }
        hint = nearest(key, [*known, *groups]) or nearest(key.rsplit(".", 1)[-1], leaves)
        raise UserError(f"{word}: no such key{hint or '; `--cfg job` lists them'}")
    return values


def compose(name: str, overrides: list[str]):
    """The plain configuration that `overrides` give; UserError for a value of the wrong kind or out of its range."""
    try:
        composed = hydra.compose(
            name, [each for each in overrides if not each.startswith("hydra.")]
        )
        config = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error, overrides)) from None
    for word in (
        reversed(overrides) if getattr(composed, "model", None) and config.model.init else ()
    ):
        key, value = word.split("=", 1)
        group = (
            OmegaConf.load(FOLDER / f"model/{value.strip(QUOTES)}.yaml") if key == "model" else {}
        )
        parts = {*group} - {"zero_init"} | {key.removeprefix("model.")}
        for part in sorted(parts & vars(config.model).keys()):
            asked, has = (
                composed.model[part],
                getattr(config.model, part),
            )  # a start from weights has their shape
            if asked is not None and asked != has:
                raise UserError(
                    f"{word}: model.init={config.model.init} has model.{part}={has}; leave {word} out"
                )
    return config


def explain(error: Exception, overrides: list[str]) -> str:
    """One line with the key, the value and the kind of value it takes."""
    cause = error
    while cause.__cause__ is not None and not getattr(cause, "full_key", None):
        cause = cause.__cause__
    key, text = getattr(cause, "full_key", None), str(cause).splitlines()[0]
    word = next((word for word in reversed(overrides) if key and word.startswith(f"{key}=")), None)
    kind = next((rule for kind, rule in VALUE_KINDS.items() if text.endswith(f"to {kind}")), None)
    if found := re.match(r"While dereferencing interpolation '\$\{(.+?)\}'", text):
        return f"{found[1]}=null: needed here ({key} is taken from it); set {found[1]}"
    if word and kind:
        return f"{word}: {key} takes {kind}"
    if word and text.endswith("is not a ListConfig, list or tuple."):
        return f"{word}: {key} takes a list, as in {key}=[{word.split('=', 1)[1]}]"
    return f"{word or key or ' '.join(overrides)}: {text}"
