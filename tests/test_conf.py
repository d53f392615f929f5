"""Every YAML file composes and builds what it promises, the W&B sweep files too."""

import contextlib
import dataclasses
import inspect
import itertools
import math
import re
import typing
from pathlib import Path

import hydra
import pytest
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from wandb import wandb_agent
from wandb.apis.public.sweeps import _validate_config_and_fill_distribution
from wandb.sdk.launch.sweeps.utils import load_sweep_config

import train
from conf.schema import Config
from data import DataConfig
from data.tokenizer import make_tokenizer
from engine import UserError, cli
from engine.logger import read_metrics
from engine.optim import make_optimizers
from engine.run_dir import flatten
from eval import EvalConfig
from model import GPT
from model.hf import family
from sample import SampleConfig
from teachers.capture import CaptureConfig
from tests.command_line import start
from tests.recording import cache_spec, save_manifest

OPTIONS = [
    f"{file.parent.name}={file.stem}"
    for file in sorted(cli.FOLDER.glob("*/*.yaml"))
    if file.parent.name != "sweep"
]
SWEEPS = {file.stem: load_sweep_config(str(file)) for file in cli.FOLDER.glob("sweep/*.yaml")}


def compose(*overrides):
    ConfigStore.instance().store(name="train_schema", node=Config)
    with hydra.initialize_config_dir(str(cli.FOLDER), version_base="1.3"):
        return cli.compose("train", list(overrides))


# What an option needs beside it.
NEEDED = {
    "teacher=none": ["loss=ce"],
    "teacher=cache": ["teacher.path=cache"],
    "data=text": ["data.path=x"],
    "data=bin": ["data.path=x"],
    "experiment=shakespeare_char": ["data.path=x"],
    "experiment=gpt2_124m": ["data.path=x"],
    "experiment=distil_llama": ["data.path=x", "teacher.path=y", "data.tokenizer=bytes"],
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_yaml_composes(option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_manifest("cache", cache_spec())
    assert isinstance(compose(option, *NEEDED.get(option, [])), Config)


@pytest.mark.parametrize(
    "words, vocab_size, parameters, step_tokens",
    [
        ("experiment=shakespeare_char", 65, 0.9e6, 768),
        ("experiment=gpt2_124m", 50257, 124.5e6, 491520),
        ("experiment=distil_llama", 128256, 86e6, 262144),
        ("model=modern model.n_layer=12", 50304, 124e6, 2**19),
        ("model=modern model.mlp=relu2", 65, 0.83e6, 8192),
        ("model=llama", 65, 0.85e6, 8192),
        ("model=nanogpt", 65, 0.83e6, 8192),
    ],
)
def test_recipes_build_the_models_that_they_promise(words, vocab_size, parameters, step_tokens):
    """Parameters within 5% of the number, tokens a step exactly, on no device at all."""
    words = words.split()
    config = compose(*words, *NEEDED.get(words[0], []))
    with torch.device("meta"):
        model = GPT(config.model, config.model.vocab_size or vocab_size)
    assert model.num_params() == pytest.approx(parameters, rel=0.05)
    assert config.batch_size * config.model.block_size == step_tokens
    assert len(make_optimizers(model, config.optim)) == 1 + (config.optim.name == "muon")


def test_students_are_of_families_that_transformers_loads():
    config = compose(
        "experiment=distil_llama", "data.path=x", "teacher.path=y", "data.tokenizer=bytes"
    )
    assert family(config.model) == "llama"
    assert family(compose("model=modern").model) == "qwen3"


@pytest.mark.parametrize(
    "layers, block_size, lr, tokens", [(2, 128, 3e-3, 2048), (12, 1024, 6e-4, 2**19)]
)
def test_learning_rate_and_batch_follow_from_the_width(layers, block_size, lr, tokens):
    """The demo's and GPT-2's own recipes; what is given stays."""
    words = [f"model.n_layer={layers}", f"model.block_size={block_size}"]
    config = compose(*words)
    assert config.optim.lr == lr
    assert config.batch_size * block_size == tokens
    given = compose(*words, "optim.lr=0.5", "batch_size=3")
    assert (given.optim.lr, given.batch_size) == (0.5, 3)


@pytest.fixture
def started(tmp_path):
    """A model of 3 layers and width 32 in modern's computation, but for two choices of its own."""
    words = ["model.n_layer=3", "model.n_embd=32", "model.tied=false", "model.zero_init=false"]
    config = compose("model=modern", *words).model
    GPT(config, 400).save_pretrained(tmp_path / "m")
    return f"model.init={tmp_path}/m"


def test_a_start_from_a_model_has_its_shape(started):
    words = ["model=modern", "model.n_layer=3", "model.block_size=64", "model.dropout=0.1"]
    config = compose(started, *words)
    model = config.model
    assert (model.n_layer, model.n_embd, model.vocab_size) == (3, 32, 400)
    assert (model.block_size, model.dropout) == (64, 0.1)
    assert config.optim.lr == 5e-5
    assert config.batch_size == compose("model.n_embd=32", "model.block_size=64").batch_size
    assert dataclasses.replace(config, seed=1).model == model

    # An experiment's shape gives way, but for its block_size.
    llama = compose("experiment=distil_llama", "data.path=x", "teacher.path=y", started).model
    assert (llama.n_layer, llama.qk_norm, llama.block_size) == (3, True, 1024)


@pytest.mark.parametrize(
    "words, tokenizer",
    [
        ("data=text data.path=t model.init={m}", "{m}"),
        ("data=text data.path=t teacher.path={m}", "{m}"),
        ("data=text data.path=t teacher.path={m} data.tokenizer=char", "char"),
        ("data=text data.path=t", "bpe"),
        ("data=bin data.path=t teacher.path={m}", "gpt2"),  # its ids are made already
    ],
)
def test_a_text_is_read_by_the_models_own_tokenizer(words, tokenizer, started, tmp_path):
    model = started.removeprefix("model.init=")
    make_tokenizer("bytes").save(model)
    config = compose(*words.format(m=model).split())
    assert config.data.tokenizer == tokenizer.format(m=model)


@pytest.mark.parametrize(
    "words, actual",
    [
        ("model.n_layer=7", "model.n_layer=3"),
        ("model.n_layer=3 model.n_embd=64", "model.n_embd=32"),
        ("model=gpt2", "model.n_layer=3"),
        ("model.qk_norm=false", "model.qk_norm=True"),
    ],
)
def test_a_shape_that_a_start_does_not_have_is_refused(started, words, actual):
    word = words.split()[-1]
    rule = f"^{word}: {started} has {actual}; leave {word} out$"
    with pytest.raises(UserError, match=rule):
        compose(started, *words.split())


@pytest.mark.parametrize(
    "words, message",
    [
        ("teacher=none", "teacher=none: loss=topk_kl needs a teacher; .*loss=ce"),
        ("loss.divergence=tv loss.tail=truncate", "loss.divergence=tv with loss.tail=truncate: .*"),
        ("access=sampled loss.tail=ghost", "loss.tail=ghost: .* take truncate alone; .*"),
        ("access=text loss.temperature=2", "loss.temperature=2.0: access=text .* 1.0 alone; .*"),
        ("access=text loss.divergence=tv", "loss.divergence=tv: .* forward_kl alone; .*topk"),
        ("baseline=no", "baseline=no: baseline is one of auto, on, off"),
        ("keep=0", "keep=0: keep must be at least 1"),
    ],
)
def test_settings_that_do_not_go_together(words, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        compose(*words.split())


@pytest.mark.parametrize(
    "recorded, words, access, tail",
    [
        ("topk", "", ("topk", 6, 12, 3), "ghost"),
        ("topk", "loss.tail=smooth access.k=4", ("topk", 4, 12, 3), "smooth"),
        ("topk", "access=greedy access.seed=5", ("greedy", 6, 12, 5), "truncate"),
        ("sampled", "", ("sampled", 32, 4, 3), "truncate"),
        ("sampled", "access=text", ("text", 32, 4, 3), "truncate"),
        ("unbiased", "", ("unbiased", 6, 12, 3), "truncate"),
        ("unbiased", "access=topk", ("topk", 6, 12, 3), "ghost"),
        ("stratified", "access.n=2", ("stratified", 6, 2, 3), "truncate"),
        ("full", "", ("full", 32, 12, 3), "ghost"),
        ("full", "access=topk", ("topk", 32, 12, 3), "ghost"),
        ("full", "access=unbiased access.k=7", ("unbiased", 7, 12, 3), "truncate"),
        ("topk", "experiment=distil_llama data.path=x", ("topk", 64, 12, 3), "ghost"),
    ],
)
def test_what_is_not_set_is_what_a_cache_holds(recorded, words, access, tail, tmp_path):
    save_manifest(tmp_path / "cache", cache_spec(recorded, seed=3))
    words = ["teacher=cache", f"teacher.path={tmp_path}/cache", *words.split()]
    for resolved in (compose(*words), dataclasses.replace(compose(*words), seed=1)):
        found = resolved.access
        assert (found.kind, found.k, found.n, found.seed) == access
        assert resolved.loss.tail == tail
        assert (resolved.model.block_size, resolved.eval_tokens) == (8, 24)
    given = compose(*words, "model.block_size=16", "eval_tokens=8")
    assert (given.model.block_size, given.eval_tokens) == (16, 8)
    with pytest.raises(UserError, match="^cache nowhere: manifest.json is missing"):
        compose("teacher=cache", "teacher.path=nowhere")


def test_a_loss_that_a_caches_access_does_not_have(tmp_path):
    save_manifest(tmp_path / "cache", cache_spec("sampled"))
    words = ["teacher=cache", f"teacher.path={tmp_path}/cache"]
    message = "loss.tail=ghost: access=sampled .* truncate alone; leave loss.tail out$"
    with pytest.raises(UserError, match=message):
        compose(*words, "loss.tail=ghost")


@pytest.mark.parametrize(
    "words, access",
    [
        ("", ("topk", 32, 12)),
        ("access=unbiased", ("unbiased", 20, 12)),
        ("access=stratified", ("stratified", 32, 4)),
        ("access=sampled access.n=3", ("sampled", 32, 3)),
        ("access.k=4", ("topk", 4, 12)),
    ],
)
def test_the_usual_access(words, access):
    found = compose(*words.split()).access
    assert (found.kind, found.k, found.n, found.seed) == (*access, 0)


SCHEMAS = {
    Config: {},
    SampleConfig: {"path": "x"},
    EvalConfig: {"path": "x", "data": DataConfig()},
    CaptureConfig: {"out": "x", "data": DataConfig()},
}


def numeric_keys(schema, prefix=""):
    """The dotted keys of all numbers of a dataclass, and the type of each."""
    keys = {}
    for name, hint in typing.get_type_hints(schema).items():
        if typing.get_origin(hint) in (list, dict):
            continue
        kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None)]
        if dataclasses.is_dataclass(kinds[0]):
            keys |= numeric_keys(kinds[0], f"{prefix}{name}.")
        elif kinds[0] in (int, float):
            keys[prefix + name] = kinds[0]
    return keys


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_number_is_taken_or_refused_in_one_line(schema):
    """No number, however odd, is a traceback later because nobody looked at it."""
    keys = numeric_keys(schema)
    assert len(keys) >= 5
    for key, kind in keys.items():
        values = (
            [10**20, -(10**20), -1, 0] if kind is int else [math.inf, -math.inf, math.nan, -1.0]
        )
        for value in (*values, 0):
            config = OmegaConf.structured(schema(**SCHEMAS[schema]))
            OmegaConf.update(config, key, value)
            if abs(value) < 2:
                with contextlib.suppress(UserError):
                    cli.to_schema(config, [])
            elif (key, value) == ("optim.grad_clip", math.inf):  # as good as 0
                cli.to_schema(config, [])
            else:
                with pytest.raises(UserError, match=f"^{key}=.* must be [^\n]*$"):
                    cli.to_schema(config, [])


def test_the_tail_is_set_where_it_is_free():
    for words, tail in (
        ([], "ghost"),
        (["loss.tail=smooth"], "smooth"),
        (["access=sampled"], "truncate"),
        (["access=sampled", "loss=ce", "teacher=none", "loss.tail=ghost"], "truncate"),
    ):
        config = compose(*words)
        assert config.loss.tail == tail
        assert dataclasses.replace(config, seed=1).loss.tail == tail


def test_schema_is_small_and_every_key_is_explained():
    config = Config()
    keys = flatten(dataclasses.asdict(config))
    del keys["experiment"]  # no value of its own: the record of the group that was chosen
    assert len(keys) <= 81
    kinds = {type(value) for value in vars(config).values() if dataclasses.is_dataclass(value)}
    for kind in (Config, *kinds):
        source = inspect.getsource(kind)
        for field in dataclasses.fields(kind):
            beside = rf"\n    {field.name}: (.*\(\n)?.*  # "
            above = rf"\n    # .*\n    {field.name}: "
            explained = re.search(f"{beside}|{above}", source)
            nested = dataclasses.is_dataclass(field.default_factory)
            assert nested or explained, f"{kind.__name__}.{field.name} has no comment"


def test_an_experiment_comes_after_the_files_own_values():
    assert compose("experiment=taught", "max_steps=7").max_steps == 7
    defaults = list(OmegaConf.load(cli.FOLDER / "train.yaml").defaults)
    assert defaults.index("_self_") < defaults.index({"experiment": None})


def points(sweep):
    """The grid, a dict of its keys' values at each point."""
    parameters = sweep["parameters"]
    axes = [parameter["values"] for parameter in parameters.values()]
    return [dict(zip(parameters, values, strict=True)) for values in itertools.product(*axes)]


@pytest.fixture
def agent_words(tmp_path, monkeypatch):
    """agent_words(sweep, run_id, point): the words with which W&B's own agent starts a run."""
    commands = []

    class Recorder:
        def __init__(self, command, env, forward_signals):
            commands.append(command)
            monkeypatch.setenv("WANDB_RUN_ID", env["WANDB_RUN_ID"])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(wandb_agent, "AgentProcess", Recorder)
    monkeypatch.setenv("WANDB_SWEEP_ID", "swept")
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_DIR"):  # the agent sets them
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def run(sweep, run_id, point):
        agent = wandb_agent.Agent(api=None, queue=None, sweep_id="swept")
        agent._sweep_command = list(sweep["command"])
        args = {key: {"value": value} for key, value in point.items()}
        program = sweep["program"]
        agent._command_run({"type": "run", "run_id": run_id, "program": program, "args": args})
        assert commands[-1][:3] == ["/usr/bin/env", "python", "train.py"]
        return [cli.in_hydra_grammar(word, sweep=False) for word in commands[-1][3:]]

    return run


@pytest.mark.parametrize("name, size", [("temperature_tail", 15), ("lr_kl_weight", 20)])
def test_every_point_of_a_sweep_is_a_run_that_train_takes(name, size, agent_words):
    sweep = SWEEPS[name]
    assert _validate_config_and_fill_distribution(sweep) == sweep
    assert sweep["metric"] == {"name": "val_loss", "goal": "minimize"}
    assert len(points(sweep)) == size

    names = set()
    for place, point in enumerate(points(sweep)):
        # W&B's server makes a 2.0 a 2.
        sent = dict(point)
        for key, value in point.items():
            if place % 2 and isinstance(value, float) and value.is_integer():
                sent[key] = int(value)
        config = compose(*agent_words(sweep, f"run{place}", sent))
        flat = flatten(dataclasses.asdict(config))
        assert {key: repr(flat[key]) for key in point} == {key: repr(point[key]) for key in point}
        assert (config.wandb.mode, config.wandb.group, config.baseline) == ("online", name, "off")
        assert config.run_dir == f"runs/sweep-swept/run{place}"
        names.add(config.wandb.name)
    assert len(names) == size

    stop = sweep.get("early_terminate")
    if stop is not None:  # hyperband counts evaluations: it asks once, half way
        assert 2 * stop["min_iter"] == config.max_steps // config.eval_every


def test_nanogpts_example_runs_in_small(tmp_path, monkeypatch):
    """nanoGPT's input.txt, and fewer steps: characters are learned."""
    monkeypatch.chdir(tmp_path)
    text = (cli.FOLDER.parent / "README.md").read_text()
    Path("input.txt").write_text(text)
    words = ["experiment=shakespeare_char", "data.path=input.txt", "run_dir=run", "device=cpu"]
    words += ["max_steps=30", "eval_every=15", "optim.warmup_steps=5", "eval_tokens=2048"]
    start(monkeypatch, "train", train.run, Config, words)
    rows = read_metrics(Path("run"))
    assert rows[0]["loss"] == pytest.approx(math.log(len(set(text))), rel=0.05)
    assert rows[-1]["step"] == 30
    assert rows[-1]["val_loss"] < 0.85 * rows[0]["loss"]
