"""Every YAML composes and builds; every mistake on the command line is one line."""

import dataclasses
import math
import sys
from pathlib import Path

import hydra
import pytest
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

import train
from conf.schema import Config
from engine import UserError, cli
from engine.logger import read_metrics
from engine.optim import make_optimizers
from engine.run_dir import flatten
from model import GPT
from model.hf import family

FOLDER = Path(cli.FOLDER)


@pytest.fixture(autouse=True)
def stored():
    ConfigStore.instance().store(name="train_schema", node=Config)


def compose(*overrides):
    with hydra.initialize_config_dir(str(FOLDER), version_base="1.3"):
        return cli.compose("train", list(overrides))


OPTIONS = [
    (file.parent.name, file.stem)
    for file in sorted(FOLDER.glob("*/*.yaml"))
    if file.parent.name != "sweep"
]


@pytest.mark.parametrize("group, option", OPTIONS, ids=lambda value: value)
def test_every_yaml_composes(group, option):
    extra = {"teacher=none": ["loss=ce"], "data=text": ["data.path=x"], "data=bin": ["data.path=x"]}
    extra["teacher=cache"] = ["teacher.path=x"]
    extra |= {f"experiment={name}": ["data.path=x"] for name in ("shakespeare_char", "gpt2_124m")}
    extra["experiment=distil_llama"] = ["data.path=x", "teacher.path=y"]
    config = compose(f"{group}={option}", *extra.get(f"{group}={option}", []))
    assert isinstance(config, Config)


BUILT = {
    "experiment=shakespeare_char": (65, 0.9e6, 768),
    "experiment=gpt2_124m": (50257, 124.5e6, 491520),
    "experiment=distil_llama": (128256, 86e6, 262144),
    "model=modern model.n_layer=12": (50304, 124e6, 2**19),
    "model=modern model.mlp=relu2": (65, 0.83e6, 8192),
    "model=llama": (65, 0.85e6, 8192),
    "model=nanogpt": (65, 0.83e6, 8192),
}


@pytest.mark.parametrize("words", BUILT)
def test_recipes_build_the_models_that_they_promise(words):
    """Parameters within 5% of the number, tokens a step exactly, on no device at all."""
    vocab_size, parameters, tokens = BUILT[words]
    extra = ["data.path=x"] if words.startswith("experiment") else []
    config = compose(*words.split(), *extra, *(["teacher.path=y"] if "distil" in words else []))
    with torch.device("meta"):
        model = GPT(config.model, config.model.vocab_size or vocab_size)
    assert model.num_params() == pytest.approx(parameters, rel=0.05)
    assert config.batch_size * config.model.block_size == tokens
    parts = make_optimizers(model, config.optim)
    assert len(parts) == (2 if config.optim.name == "muon" else 1)


def test_a_distilled_llama_reads_its_teachers_tokens():
    config = compose("experiment=distil_llama", "data.path=x", "teacher.path=some/folder")
    assert config.data.tokenizer == "some/folder" and family(config.model) == "llama"
    assert (
        family(compose("model=modern").model) == "qwen3"
    )  # a modern student is one that transformers loads


def test_a_distilled_llama_without_a_teacher_says_which_key():
    with pytest.raises(
        UserError,
        match=r"^teacher.path=null: needed here \(data.tokenizer is taken from it\); set teacher.path$",
    ):
        compose("experiment=distil_llama", "data.path=x")


def test_keys_that_a_start_from_a_model_would_leave_dead_are_refused(tmp_path):
    GPT(compose("model=modern", "model.n_layer=3", "model.n_embd=32").model, 400).save_pretrained(
        tmp_path / "m"
    )
    start = f"model.init={tmp_path}/m"
    for words, rule in (
        (
            ["model.n_layer=7"],
            r"^model.n_layer=7: model.init=.*/m has model.n_layer=3; leave model.n_layer=7 out$",
        ),
        (
            ["model.n_layer=3", "model.n_embd=64"],
            r"^model.n_embd=64: .* has model.n_embd=32; leave model.n_embd=64 out$",
        ),
        (["model=gpt2"], r"^model=gpt2: .* has model.n_embd=32; leave model=gpt2 out$"),
        (["model.qk_norm=false"], r"^model.qk_norm=false: .* has model.qk_norm=True"),
        (["model.vocab_size=412"], r"^model.vocab_size=412: .* has 400 rows"),
    ):
        with pytest.raises(UserError, match=rule):
            compose(start, *words)
    same = compose(
        start, "model=modern", "model.n_layer=3", "model.block_size=64", "model.dropout=0.1"
    )
    assert (same.model.n_layer, same.model.n_embd, same.model.block_size, same.model.dropout) == (
        3,
        32,
        64,
        0.1,
    )
    llama = compose(
        "experiment=distil_llama", "data.path=x", "teacher.path=y", start
    )  # its own shape gives way
    assert (llama.model.n_layer, llama.model.qk_norm, llama.model.block_size) == (3, True, 1024)


def test_a_divergence_that_a_tail_does_not_take_names_both():
    rule = "loss.divergence=tv with loss.tail=truncate: loss.tail=truncate takes forward_kl only; set loss.tail=ghost"
    with pytest.raises(UserError, match=f"^{rule}$"):
        check("loss.divergence=tv", "loss.tail=truncate")


def test_every_float_in_yaml_is_a_float():
    for file in FOLDER.rglob("*.yaml"):
        for key, value in flatten(OmegaConf.to_container(OmegaConf.load(file)) or {}).items():
            assert not (isinstance(value, str) and value[:1].isdigit() and "e" in value), (
                f"{file}: {key}={value}"
            )


def test_schema_is_small_and_every_key_is_explained():
    assert len(flatten(dataclasses.asdict(Config()))) <= 80
    sources = {}
    for kind in (
        Config,
        *(
            field.default_factory
            for field in dataclasses.fields(Config)
            if isinstance(field.default_factory, type)
        ),
    ):
        lines = Path(sys.modules[kind.__module__].__file__).read_text().splitlines()
        for field in dataclasses.fields(kind):
            if not dataclasses.is_dataclass(field.default_factory):
                found = [line for line in lines if line.startswith(f"    {field.name}: ")]
                assert any("  # " in line for line in found), (
                    f"{kind.__name__}.{field.name} has no comment"
                )
                sources[field.name] = True
    assert sources


def test_experiment_values_are_not_lost():
    """Defaults list: the experiment comes after _self_, or its own values would be silently overwritten."""
    defaults = list(OmegaConf.load(FOLDER / "train.yaml").defaults)[
        :-1
    ]  # the last one is Hydra's own
    assert (
        defaults[-1] == {"experiment": None}
        and defaults[-2] == "_self_"
        and defaults[0] == "train_schema"
    )


def check(*words):
    cli.check("train", [cli.fix(word, sweep="," in word) for word in words], Config)


MISTAKES = {
    "optim.lrr=1": r"no such key; did you mean optim.lr\?",
    "weight_decy=1": r"no such key; did you mean optim.weight_decay\?",
    "n_layr=1": r"no such key; did you mean model.n_layer\?",
    "loss=topk": r"loss is one of ce, topk_kl; did you mean topk_kl\?",
    "optim.lr=abc": r"optim.lr takes a number such as 3.0e-4",
    "max_steps=1.5": r"max_steps takes a whole number",
    "max_steps=0": r"max_steps must be at least 1",
    "+optim.foo=1": r"neither added nor removed",
    "~optim.lr": r"neither added nor removed",
    "loss.tail=gost": r"loss.tail is one of ghost, .*did you mean ghost\?",
    "max_steps": r"overrides are KEY=VALUE",
    "loss.kl_weight=2": r"loss.kl_weight must be at most 1",
    "loss.tail=smooth,gost": r"loss.tail=gost",
    "optim.lr=1e-3,abc": r"optim.lr=abc: optim.lr takes a number",
    "wandb.name=a(b": r"not a valid override",
}


@pytest.mark.parametrize("word", MISTAKES)
def test_mistakes_are_one_line(word):
    with pytest.raises(UserError, match=MISTAKES[word]) as caught:
        check(word)
    assert "\n" not in str(caught.value)


def test_teacher_none_needs_cross_entropy():
    with pytest.raises(UserError, match="teacher=none: loss=topk_kl needs a teacher"):
        check("teacher=none")
    check("teacher=none", "loss=ce")


def test_what_sweeps_write_is_read():
    assert compose(cli.fix("micro_batch_size=None", sweep=False)).micro_batch_size is None
    assert compose("optim.lr=1e-5").optim.lr == 1e-5
    check("loss=ce,topk_kl", "loss.temperature=1,2", "seed=0,1,2")  # one schema for all losses


def test_sweeps_under_torchrun_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "seed=0,1"])
    with pytest.raises(SystemExit) as caught:
        cli.main("train", lambda config: None, Config)
    assert caught.value.code == 2 and "sweeps and torchrun do not mix" in capsys.readouterr().err


def test_run_dir_of_a_sweep_is_its_folder():
    assert cli.fix("run_dir=x", sweep=True) == "hydra.sweep.dir=x"
    assert cli.fix("run_dir=x", sweep=False) == "run_dir='x'"


@pytest.mark.parametrize("path", ["a, b", "it's", "x=(1)", "sp ace ", "a\\b", "$x"])
def test_paths_and_prompts_are_taken_to_the_letter(path):
    assert compose("data=text", cli.fix(f"data.path={path}", sweep=False)).data.path == path


def test_cfg_job_prints_every_key(monkeypatch, capsys):
    hydra.core.global_hydra.GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", ["train.py", "--cfg", "job", "optim.lr=0.5"])
    cli.main("train", lambda config: pytest.fail("ran"), Config)
    shown = OmegaConf.create(capsys.readouterr().out)
    assert shown.optim.lr == 0.5 and set(flatten(OmegaConf.to_container(shown))) == cli.keys(Config)


def test_nanogpts_example_runs_in_small(tmp_path, monkeypatch):
    """nanoGPT's example on another text, in fewer steps: characters are learned."""
    monkeypatch.chdir(tmp_path)
    text = (FOLDER.parent / "README.md").read_text()
    Path("input.txt").write_text(text)
    hydra.core.global_hydra.GlobalHydra.instance().clear()
    words = [
        "experiment=shakespeare_char",
        "data.path=input.txt",
        "run_dir=run",
        "device=cpu",
        "max_steps=30",
        "eval_every=15",
    ]
    monkeypatch.setattr(
        sys, "argv", ["train.py", *words, "optim.warmup_steps=5", "eval_tokens=2048"]
    )
    cli.main("train", train.run, Config)
    rows = read_metrics(Path("run"))
    assert rows[0]["loss"] == pytest.approx(math.log(len(set(text))), rel=0.05)
    assert rows[-1]["step"] == 30 and rows[-1]["val_loss"] < 0.85 * rows[0]["loss"]
