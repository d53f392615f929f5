"""The command line of every script: Hydra composes the configuration, plain dataclasses leave it.

main("train", run, Config)    # run(config), a Config made of conf/train.yaml and the overrides

A user's mistake ends as one line on stderr and exit status 2. All jobs of a sweep are composed
before the first one starts.
"""

import os
import re
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from engine import UserError, check_choice, first_line, nearest
from engine.run_dir import flatten

FOLDER = Path(__file__).parent.parent / "conf"
MAX_JOBS_CHECKED = 1000

# Keys (their last part) whose values are paths; a ~ at their beginning is the user's home.
PATH_KEYS = {"path", "run_dir", "resume", "cache_dir", "init", "out", "prompts", "tokenizer"}
LITERAL_KEYS = {"prompt", *PATH_KEYS}  # taken to the letter, whatever Hydra makes of them
# `${` and the backslashes before it; of a path not that of an environment variable, ${oc.env:NAME}
DOLLAR_BRACE = re.compile(r"(\\*)\$\{")
DOLLAR_BRACE_IN_PATH = re.compile(DOLLAR_BRACE.pattern + r"(?!oc\.env:)")
IN_QUOTES = re.compile(r"""'[^']*'|"[^"]*\"""")
# A value of a sweep, which a comma ends: strings in quotes, where a comma is text, and other text
SWEEP_VALUE = re.compile(rf"(?:{IN_QUOTES.pattern}|[^,])+")
SWEEP_FUNCTION = re.compile(r"(choice|glob|shuffle|sort|tag)\(")

# Ours by nanoGPT's names
NANOGPT_KEYS = {
    "learning_rate": "optim.lr",
    "max_iters": "max_steps",
    "eval_interval": "eval_every",
    "out_dir": "run_dir",
    "init_from": "model.init",
    "dataset": "data.path",
    "gradient_accumulation_steps": "micro_batch_size",
    "warmup_iters": "optim.warmup_steps",
    "dropout": "model.dropout",
    "decay_lr": "optim.schedule",
    "num_samples": "n",
    "start": "prompt",
}


def main(name: str, run: Callable, schema: type) -> None:
    """Runs `run(config)` once, or for each job of a sweep, as sys.argv asks; config is a `schema`.

    Exits with status 2 after a user's mistake and with 130 after Ctrl-C.
    """
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    arguments = get_args_parser().parse_intermixed_args()
    sweep = arguments.multirun

    with report_user_errors(rank):
        if sweep and (world_size > 1 or "WANDB_SWEEP_ID" in os.environ):
            raise UserError(
                "-m: torchrun and wandb agent run one job each; start them anew for each"
            )
        if sweep and arguments.cfg:
            raise UserError("--cfg: prints the configuration of one job; leave -m out")
        overrides = [in_hydra_grammar(override, sweep) for override in arguments.overrides]
        check_jobs(name, overrides, sweep, is_complete=not (arguments.help or arguments.cfg))

    # Hydra's parser takes the overrides in one piece only.
    flags = [word for word in sys.argv[1:] if word not in arguments.overrides]
    sys.argv[1:] = flags + overrides

    def run_job(composed):
        with report_user_errors(rank):
            config = to_schema(composed, HydraConfig.get().overrides.task)
            if sweep:  # its jobs are not the one run that the environment names
                os.environ.pop("WANDB_RUN_ID", None)
            if hasattr(config, "experiment"):
                config.experiment = HydraConfig.get().runtime.choices["experiment"]
            if sweep and hasattr(config, "run_dir"):
                config.run_dir = HydraConfig.get().runtime.output_dir
                if config.baseline == "auto":  # report.py compares the jobs with one another
                    config.baseline = "off"
                if config.wandb.name is None:
                    config.wandb.name = "/".join(Path(config.run_dir).parts[-2:])
            run(config)

    hydra.main(version_base="1.3", config_path=str(FOLDER), config_name=name)(run_job)()
    if world_size > 1:
        # Everything is saved. At the interpreter's own exit torch's threads aborted a rank in 3
        # runs of 26.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


@contextmanager
def report_user_errors(rank: int = 0):
    """Turns a UserError, or an OSError, into one line on stderr and exit status 2.

    An OSError names its file (not found, no permission; checkpoint.name_in_errors: disk full). A
    bug keeps its traceback.
    """
    try:
        yield
    except (UserError, OSError) as error:
        prefix = "error" if rank == 0 else f"error on rank {rank}"
        print(f"{prefix}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped at once; what was saved stays", file=sys.stderr, flush=True)
        sys.exit(130)


def in_hydra_grammar(override: str, sweep: bool) -> str:
    """The same in Hydra's words: null for W&B's None, quotes around what is taken to the letter."""
    key, equals, value = override.partition("=")
    name = key.split(".")[-1]
    if name not in LITERAL_KEYS or not equals:
        return f"{key}=null" if value == "None" else override

    if not sweep:
        return f"{key}={literal(name, value)}"
    if SWEEP_FUNCTION.match(value):
        return override
    values = SWEEP_VALUE.findall(value) or [value]
    if key == "run_dir" and literal(name, value) != "null":
        if len(values) > 1:
            raise UserError(
                f"{override}: with -m it is one folder, in which each job has its own; give one"
                " (in quotes where it has a comma)"
            )
        key = "hydra.sweep.dir"
        values = [os.path.expanduser(value.strip("'\""))]
    return f"{key}={','.join(literal(name, each) for each in values)}"


def literal(name: str, value: str) -> str:
    """`value` in Hydra's grammar, so that it arrives as it was typed.

    Of a path: null for nothing, null or None; and quotes around all of it are left out, because
    Hydra's own grammar asks for them.
    """
    dollar_brace = DOLLAR_BRACE
    if name in PATH_KEYS:
        dollar_brace = DOLLAR_BRACE_IN_PATH
        if value in ("", "None", "null"):
            return "null"
        if IN_QUOTES.fullmatch(value):
            value = value[1:-1]
    escaped = dollar_brace.sub(lambda match: match[1] * 2 + r"\${", value)
    return QuotedString(escaped, Quote.single).with_quotes()


def check_jobs(name: str, overrides: list[str], sweep: bool, is_complete: bool = True) -> None:
    """Composes every job that `overrides` ask for; UserError for the first mistake.

    is_complete: required keys have to be there too, and what is derived from files.
    """
    try:
        with hydra.initialize_config_dir(str(FOLDER), version_base="1.3"):
            for job in split_jobs(overrides, sweep):
                compose(name, job, is_complete)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error)) from None


def split_jobs(overrides: list[str], sweep: bool) -> list[list[str]]:
    """The overrides of each job (of the first 1,000), split by Hydra's own sweeper."""
    loader = GlobalHydra.instance().config_loader()
    parsed = OverridesParser.create(loader).parse_overrides(overrides)
    for override in parsed:
        text = override.input_line
        if text[0] in "+~":
            raise UserError(f"{text}: keys are neither added nor removed; write KEY=VALUE")
        if override.is_interval_sweep():
            raise UserError(f"{text}: not a sweep of -m; list values (0.1,0.2), or use range(1,5)")
        if override.is_sweep_override() and not sweep:
            raise UserError(f"{text}: several values are a sweep; put -m before, or quote them")
    return BasicSweeper.split_arguments(parsed, MAX_JOBS_CHECKED)[0]


def compose(name: str, overrides: list[str], is_complete: bool = True):
    """The configuration of one job. Hydra's own errors say which key or value does not fit."""
    loader = GlobalHydra.instance().config_loader()
    for override in overrides:
        key, value = override.split("=", 1)
        options = loader.get_group_options(key)
        if options:
            check_choice(key, value, options)
    try:
        composed = hydra.compose(name, overrides)
    except AssertionError:  # OmegaConf's, for a key below null
        raise UserError(
            f"{' '.join(overrides)}: a key of a group that is not set; set the group too: data=text"
        ) from None
    return to_schema(composed, overrides) if is_complete else composed


def to_schema(composed, overrides: list[str]):
    """The dataclass that Hydra's `composed` describes, with what its `resolve` derives."""
    config = OmegaConf.to_object(composed)
    expand_home(config)
    if hasattr(config, "resolve"):
        config.resolve(overrides)
    return config


def expand_home(config) -> None:
    """Replaces a ~ or ~user at the beginning of each path of a dataclass."""
    for name, value in vars(config).items():
        if is_dataclass(value):
            expand_home(value)
        elif name in PATH_KEYS and value is not None:
            setattr(config, name, os.path.expanduser(value))


def explain(error: Exception) -> str:
    """One line of Hydra's or OmegaConf's error, with the nearest key where there is no such key."""
    if isinstance(error, OverrideParseException):
        return f"{error.override}: write KEY=VALUE, special characters in quotes"
    cause = error.__cause__ or error
    if not isinstance(cause, OmegaConfBaseException):
        return first_line(cause)
    if isinstance(cause, MissingMandatoryValue):
        return f"{cause.full_key} is not set; write {cause.full_key}=VALUE"
    message = f"{cause.full_key}: {first_line(cause)}"
    if not isinstance(cause, ConfigAttributeError):
        return message

    known = OmegaConf.to_container(cause.parent_node._get_root())
    del known["hydra"]
    keys = sorted([*known, *flatten(known)], key=len, reverse=True)
    by_last_part = {key.split(".")[-1]: key for key in keys}  # the shortest of those that end alike
    last_part = cause.full_key.split(".")[-1]
    if NANOGPT_KEYS.get(last_part) in keys:
        return f"{message}; did you mean {NANOGPT_KEYS[last_part]}?"
    return message + (nearest(cause.full_key, keys) or nearest(last_part, by_last_part))
