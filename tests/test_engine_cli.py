"""The command line: what it takes and refuses, and what a sweep's jobs are given."""

import contextlib
import os
import re
from dataclasses import asdict

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from conf.schema import Config
from engine import UserError, cli
from engine.run_dir import fixed, flatten
from sample import SampleConfig
from tests.command_line import error_line, start


@pytest.fixture
def configs(monkeypatch, tmp_path):
    """configs(WORD, ...): what `python train.py WORD ...` runs with, a Config for each job."""
    monkeypatch.chdir(tmp_path)

    def collect(*words):
        jobs = []
        start(monkeypatch, "train", jobs.append, Config, words)
        return jobs

    return collect


@pytest.fixture
def refusal(monkeypatch, capsys):
    """refusal(WORD, ...): the line with which `python train.py WORD ...` refuses before any job."""

    def refused(*words):
        return error_line(monkeypatch, capsys, "train", forbidden, Config, words)

    def forbidden(config):
        pytest.fail("a job started")

    return refused


REFUSED = {
    "optim.lrr=1": r"optim.lrr: Key 'lrr' not in 'OptimConfig'; did you mean optim.lr\?",
    "teacher.model.n_layr=1": r"did you mean teacher.model.n_layer\?",
    "weight_decy=1": r"did you mean optim.weight_decay\?",
    "model.layers=1": r"did you mean model.n_layer\?",
    "lr=1": r"did you mean optim.lr\?",
    "learning_rate=1": r"did you mean optim.lr\?",
    "optim.learning_rate=1": r"did you mean optim.lr\?",
    "max_iters=1": r"did you mean max_steps\?",
    "optm=muon": r"did you mean optim\?",
    "loss=topk": r"loss=topk: loss is one of ce, topk_kl; did you mean topk_kl\?",
    "loss=null": r"loss=null: loss is one of ce, topk_kl",
    "experiment=None": r"experiment=null: experiment is one of .*toy",
    "optim.lr=abc": r"optim.lr: Value 'abc' .* could not be converted to Float",
    "max_steps=1.5": r"max_steps: Value '1.5' .* could not be converted to Integer",
    "max_steps=0": r"max_steps=0: max_steps must be at least 1",
    "+optim.foo=1": r"\+optim.foo=1: keys are neither added nor removed",
    "~max_steps": r"~max_steps: keys are neither added nor removed",
    "max_steps": r"max_steps: write KEY=VALUE",
    "wandb.name=a(b": r"wandb.name=a\(b: write KEY=VALUE, special characters in quotes",
    "optim.lr=0.1,0.2": r"optim.lr=0.1,0.2: several values are a sweep; put -m before",
    "seed=range(3)": r"seed=range\(3\): several values are a sweep; put -m before",
    "-m optim.lr=1e-3,abc": r"optim.lr: Value 'abc'",
    "-m loss.tail=smooth,gost": r"loss.tail=gost: .*; did you mean ghost\?",
    "-m loss=ce,topk": r"loss=topk: loss is one of",
    "-m model.init=null,nobody": r"model.init=nobody: no such folder",
    "-m optim.lr=interval(0,1)": r"optim.lr=interval\(0,1\): not a sweep of -m; list values",
    "optim.lr=interval(0,1)": r"optim.lr=interval\(0,1\): not a sweep of -m; list values",
    "-m run_dir=a,b": r"run_dir=a,b: with -m it is one folder, in which each job has its own;",
    "-m seed=0,1 --cfg job": r"--cfg: prints the configuration of one job; leave -m out",
    "data=text data.path=": r"data.path=null: data=text needs data.path",
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_mistake_is_one_line_before_the_first_job(words, refusal):
    assert re.search(f"^error: .*{REFUSED[words]}", refusal(*words.split()))


TAKEN = {
    "micro_batch_size=None": ("micro_batch_size", None),
    "optim.lr=1e-05": ("optim.lr", 1e-5),
    "wandb.tags=[a,b]": ("wandb.tags", ["a", "b"]),
    "run_dir=null": ("run_dir", None),
    "run_dir='a, b'": ("run_dir", "a, b"),
} | {
    f"data.path={path}": ("data.path", path)
    for path in ("a, b", "it's", "x=(1)", "sp ace ", "a\\b", "a\\'b\\", "$x", "[a]", "01", 'a"b')
}

# Texts that Hydra's grammar, or OmegaConf's, would take for something else.
LITERAL = (
    '"Hi," she said',
    "it's 'quoted' \"twice\"",
    "'in quotes'x",
    "echo ${f}",
    "price: ${",
    "\\${a} \\\\${b}",
    "ends in a backslash\\",
    "C:\\\\doubled\\",
    "{a: [1, 2]} = (b)",
    "a,b=c",
    "+x ~y",
    "range(3)",
    "héllo 世界 🙂",
    "two\nlines\t",
    " ",
    "true",
    "-1e3",
)
NO_PATHS = ("None", "null", "", '"whole"', "~", "~/x", "${oc.env:HOME}")


@pytest.mark.parametrize("word", TAKEN)
def test_values_are_read_as_they_are_meant(word, configs):
    key, value = TAKEN[word]
    (config,) = configs("data=text", "data.path=x", word)
    for name in key.split("."):
        config = getattr(config, name)
    assert config == value


def in_omegaconf(word):
    """The value that `word` gives to a key, by way of Hydra's and OmegaConf's grammars."""
    (parsed,) = OverridesParser.create().parse_overrides([word])
    config = OmegaConf.create({"value": ""})
    OmegaConf.update(config, "value", parsed.value())
    return config.value


def test_a_prompt_is_taken_as_it_is_typed(monkeypatch):
    for prompt in (*LITERAL, *NO_PATHS):
        assert in_omegaconf(cli.in_hydra_grammar(f"prompt={prompt}", sweep=False)) == prompt

    # through the real command line, some of the trouble at once
    for prompt in ('"Hi," she ${f} {said}, "it\'s"\\\\\\', "price: ${", "null"):
        jobs = []
        start(monkeypatch, "sample", jobs.append, SampleConfig, ["path=x", f"prompt={prompt}"])
        assert jobs[0].prompt == prompt


PATH_KEYS = "data.path run_dir resume teacher.path data.cache_dir data.tokenizer data.prompts"
HOMES = {
    "~/x": "/home/me/x",
    "~": "/home/me",
    "~root/x": "/root/x",
    "~nobody-here/x": "~nobody-here/x",
    "a/~/b": "a/~/b",
    "'~/in quotes'": "/home/me/in quotes",
    "${oc.env:NAME}/${f}": "env/${f}",
}


def test_a_path_is_taken_as_it_is_typed_but_for_the_home(configs, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("NAME", "env")
    keys = PATH_KEYS.split()
    cases = [*HOMES.items(), *((text, text) for text in LITERAL)]
    for first in range(0, len(cases), len(keys)):
        meant = dict(zip(keys, cases[first : first + len(keys)], strict=False))
        words = [f"{key}={typed}" for key, (typed, _) in meant.items()]
        (config,) = configs("data=written", *words)
        flat = flatten(asdict(config))
        for key, (typed, path) in meant.items():
            assert flat[key] == path, f"{key}={typed}"

    for nothing in ("null", "None", ""):
        keys = ("data.path", "run_dir", "teacher.path", "data.prompts")
        (config,) = configs("data=written", *(f"{key}={nothing}" for key in keys))
        flat = flatten(asdict(config))
        assert [flat[key] for key in keys] == [None] * 4


def test_paths_of_sweeps(configs, monkeypatch):
    """A comma outside quotes separates values; the folder of all jobs is one."""
    monkeypatch.setenv("HOME", "home")
    jobs = configs("-m", "data=text", "data.path=~/a,'b, c',d e,\"~/${f}\"", "run_dir=~/r")
    assert [job.data.path for job in jobs] == ["home/a", "b, c", "d e", "home/${f}"]
    assert [os.path.relpath(job.run_dir) for job in jobs] == [f"home/r/{job}" for job in range(4)]
    jobs = configs("-m", "data=text", "data.path=choice(a,b)", "run_dir='of a, b'")
    assert [job.data.path for job in jobs] == ["a", "b"]
    assert os.path.relpath(jobs[0].run_dir) == "of a, b/0"
    (job,) = configs("-m", "run_dir=null")
    assert os.path.relpath(job.run_dir).startswith("runs/")


def test_a_word_given_twice_means_the_last(configs):
    words = ("optim.lr=1", "optim.lr=2", "loss=ce", "loss=topk_kl", "data=text")
    (config,) = configs(*words, "data.path=a", "data.path=b")
    assert (config.optim.lr, config.loss.name, config.data.path) == (2.0, "topk_kl", "b")


def test_jobs_of_a_sweep_are_not_the_one_run_of_the_environment(configs, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "one")
    configs("seed=1")
    assert os.environ["WANDB_RUN_ID"] == "one"
    configs("-m", "seed=0,1")
    assert "WANDB_RUN_ID" not in os.environ


def test_a_sweeps_jobs_are_runs_of_their_own(configs):
    """-m may stand anywhere; report.py compares the jobs, so that none needs a baseline."""
    words = ("seed=0,1", "-m", "run_dir=runs/many")
    jobs = configs(*words)
    assert [job.seed for job in jobs] == [0, 1]
    assert [os.path.relpath(job.run_dir) for job in jobs] == ["runs/many/0", "runs/many/1"]
    assert [job.wandb.name for job in jobs] == ["many/0", "many/1"]
    assert [job.baseline for job in jobs] == ["off", "off"]

    jobs = configs("-m", "data=text", "data.path=a,b")
    assert [job.data.path for job in jobs] == ["a", "b"]

    jobs = configs(*words, "baseline=on", "wandb.name=mine")
    assert [(job.baseline, job.wandb.name) for job in jobs] == [("on", "mine")] * 2


@pytest.mark.parametrize("name, value", [("WORLD_SIZE", "2"), ("WANDB_SWEEP_ID", "swept")])
def test_where_sweeps_are_refused(name, value, refusal, monkeypatch):
    monkeypatch.setenv(name, value)
    assert refusal("-m", "seed=0,1").startswith("error: -m: torchrun and wandb agent run one job")


def test_cfg_job_prints_the_configuration(configs, capsys):
    assert configs("optim.lr=0.5", "--cfg", "job") == []
    assert OmegaConf.create(capsys.readouterr().out).optim.lr == 0.5


@pytest.mark.parametrize("words", [("--help",), ("--cfg", "job")])
def test_what_only_prints_needs_no_required_key(words, monkeypatch, capsys):
    with contextlib.suppress(SystemExit):  # which --help ends with
        start(monkeypatch, "sample", pytest.fail, SampleConfig, words)
    assert "path: ???" in capsys.readouterr().out


def raising(error):
    def run(config):
        raise error

    return run


def test_how_a_run_ends(monkeypatch, capsys):
    """A user's error names the rank; Ctrl-C leaves with 130; a bug keeps its type."""
    monkeypatch.setenv("RANK", "1")
    for error in (UserError("why"), OSError("why")):
        line = error_line(monkeypatch, capsys, "train", raising(error), Config, [])
        assert line == "error on rank 1: why"

    with pytest.raises(SystemExit) as caught:
        start(monkeypatch, "train", raising(KeyboardInterrupt()), Config, [])
    assert caught.value.code == 130

    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="a bug"):
        start(monkeypatch, "train", raising(ValueError("a bug")), Config, [])


def test_a_rank_leaves_before_torchs_threads_can_abort_it(configs, monkeypatch):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    configs()
    assert codes == []
    monkeypatch.setenv("WORLD_SIZE", "2")
    configs()
    assert codes == [0]


def test_a_run_records_which_experiment_it_was_started_with(configs):
    """Each job of a sweep its own; it is no part of what a run learns from."""
    jobs = configs("experiment=taught") + configs("loss=ce")
    jobs += configs("-m", "experiment=plain,taught", "max_steps=7")
    assert [job.experiment for job in jobs] == ["taught", None, "plain", "taught"]
    assert "experiment" not in fixed(asdict(jobs[0]))
