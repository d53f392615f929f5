"""Equal work by us, TRL (its GKD trainer), DistillKit and transformers' Trainer, on a CPU.

python -m tests.bench_peers --distillkit CHECKOUT --out results/peers_cpu.csv   # 12 minutes
python -m tests.bench_peers --tiny --rounds 1                                   # a rehearsal

Four arms, each from the same weights on the same ids, B x T tokens a step, in fp32 with AdamW:
  cross-entropy    the text's next token
  online           KL to every token's probability under a teacher that runs beside (GKD: lmbda=0)
  offline          KL to the recorded K likeliest tokens and one outcome for all others
  teacher          a teacher's forward pass to its logits: what an online step costs besides

Ours is `python train.py` itself, with its checkpoint, evaluation and sample; peers run their own
trainers, without any of these and with bf16, gradient checkpointing and shuffling switched off.
Every tool is a process of its own, started anew in each round. A first loss that differs from a
plain fp64 reference stops the program. Peers score T-1 tokens of a sequence, where the text's own
next token is the label; we score T. DistillKit scores all T in offline too.

A peer that is not installed gets a row that says so. DistillKit is a checkout of
github.com/arcee-ai/DistillKit; its pins (trl 0.25) need not be met.
"""

import argparse
import functools
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from data import Batches
from data.batches import Blocks
from kernels.bench import facts, record
from model import GPT, ModelConfig
from teachers.cache import Cache
from teachers.cached import recorded_blocks

ROOT = Path(__file__).parent.parent
TOLERANCE = 2e-4  # of a first loss, relative and in nats: peers print four decimals


@dataclass(frozen=True)
class Size:
    """Of the models and of a step."""

    vocab_size: int
    teacher: dict  # ModelConfig's keys
    student: dict
    B: int  # sequences a step
    T: int  # tokens of a sequence
    K: int  # recorded entries a token
    steps: int  # of a process; the first warms up


LLAMA = {"norm": "rmsnorm", "mlp": "swiglu", "bias": "none", "rope_theta": 1e5}
# SmolLM2-135M's shape into 6.7M parameters
FULL = Size(
    vocab_size=49152,
    teacher={"n_layer": 30, "n_embd": 576, "n_head": 9, "n_kv_head": 3, "n_inner": 1536},
    student={"n_layer": 2, "n_embd": 128, "n_head": 4},
    B=4,
    T=256,
    K=64,
    steps=5,
)
TINY = Size(
    vocab_size=512,
    teacher={"n_layer": 2, "n_embd": 64, "n_head": 2},
    student={"n_layer": 1, "n_embd": 32, "n_head": 1},
    B=2,
    T=32,
    K=8,
    steps=4,
)


@dataclass(frozen=True)
class Case:
    """A tool at work in an arm."""

    arm: str
    tool: str
    needs: str  # the package that must be there
    reference: str  # the key in reference.json of the first loss that it claims to compute
    objective: str

    @property
    def name(self) -> str:
        return f"{self.arm}, {self.tool}"

    @property
    def is_ours(self) -> bool:
        return self.tool == "ours"


CASES = (
    Case("cross-entropy", "ours", "torch", "ce_T", "cross-entropy"),
    Case("cross-entropy", "Trainer", "transformers", "ce", "cross-entropy, T-1 labels"),
    Case("online", "ours", "torch", "kl_T", "KL(teacher, student), all tokens"),
    Case("online", "TRL GKD", "trl", "kl", "the same, T-1 positions"),
    Case("offline", "ours", "torch", "ghost", "KL on K entries and one for the rest"),
    Case("offline", "DistillKit", "distillkit", "ghost_distillkit", "the same, of its own codes"),
    Case("teacher", "ours", "torch", "teacher_ce", "forward pass to the logits"),
    Case("teacher", "transformers", "transformers", "teacher_ce", "forward pass to the logits"),
)


# What all tools share: models, text, caches


def make_models_and_text(folder: Path, size: Size) -> None:
    """A teacher, a student and random tokens with Zipf's frequencies."""
    torch.manual_seed(0)
    for name in ("teacher", "student"):
        shape = getattr(size, name)
        config = ModelConfig(**LLAMA, **shape, block_size=size.T).resolved()
        config.vocab_size = size.vocab_size
        model = GPT(config, size.vocab_size)
        if name == "teacher":  # its logits spread as those of a trained model
            model.ln_f.weight.data.mul_(4)
        model.save_pretrained(folder / name)

    shares = 1 / np.arange(1, size.vocab_size + 1)
    shares /= shares.sum()
    random = np.random.default_rng(0)
    counts = {"train": size.steps * size.B, "val": size.B}
    for split, num_blocks in counts.items():
        tokens = random.choice(size.vocab_size, num_blocks * size.T + 1, p=shares)
        tokens.astype(np.uint16).tofile(folder / f"{split}.bin")


def make_batches(folder: Path, size: Size) -> Batches:
    """Those that train.py reads: one epoch, seed 0."""
    tokens = np.fromfile(folder / "train.bin", np.uint16)
    return Batches(Blocks(tokens, size.T), size.B, seed=0)


def read_recorded(folder: Path, size: Size) -> tuple[Tensor, Tensor]:
    """ids and log_probs [blocks,T,K] of our cache, in the order in which train.py reads them."""
    cache = Cache(folder / "cache")
    num_blocks = size.steps * size.B
    slots = np.argsort(recorded_blocks("train", num_blocks, cache.spec))
    batches = make_batches(folder, size)
    order = torch.cat([batches.batch(step).blocks for step in range(size.steps)])
    output = cache.read("train", slots[order.numpy()])
    shape = (num_blocks, size.T, size.K)
    return torch.tensor(output.ids).view(shape).long(), torch.tensor(output.log_probs).view(shape)


def peer_rows(folder: Path, size: Size):
    """The text as a data set of datasets: a row a sequence, in train.py's order."""
    from datasets import Dataset

    batches = make_batches(folder, size)
    ids = torch.cat([batches.batch(step).ids for step in range(size.steps)]).tolist()
    ones = [[1] * size.T for _ in ids]
    return Dataset.from_dict({"input_ids": ids, "attention_mask": ones, "labels": ids})


def distillkit_codes(size: Size):
    """The compression that DistillKit's README recommends, for K entries."""
    from distillkit.compression.config import DistributionQuantizationConfig

    return DistributionQuantizationConfig(
        d=size.vocab_size,
        k=size.K,
        exact_k=min(16, size.K // 2),
        exact_dtype="bfloat16",
        polynomial_terms=[0, 1, 2, 3, 4, "sqrt"],
        term_dtype="float32",
        residual_bins=[],
        delta_encoding=False,
        error_diffusion=False,
    )


def make_distillkit_cache(folder: Path, size: Size) -> None:
    """Our cache's entries in DistillKit's codes, as a data set on disk."""
    from datasets import Features, List, Value
    from distillkit.compression import LogprobCompressor

    compressor = LogprobCompressor(config=distillkit_codes(size))
    codes = compressor.compress_from_sparse(*read_recorded(folder, size))
    rows = peer_rows(folder, size)
    for name, values in codes.items():  # [blocks,T,bytes]
        values = values.to(torch.uint8)
        feature = Features({name: List(List(Value("uint8")))})
        rows = rows.add_column(name, values.tolist(), feature=feature[name])
    rows.save_to_disk(folder / "distillkit")


# The reference


def ghost_kl(logits: Tensor, ids: Tensor, log_probs: Tensor) -> Tensor:
    """Mean KL over the K entries and one outcome for all others.

    Args: logits [B,T,V] of the student; ids, log_probs [B,T,K] of the teacher.
    """
    student = logits.log_softmax(-1).gather(-1, ids)  # [B,T,K]
    log_probs = log_probs.double()
    kl = (log_probs.exp() * (log_probs - student)).sum(-1)
    tail = 1 - log_probs.exp().sum(-1)  # [B,T]
    student_tail = 1 - student.exp().sum(-1)
    return (kl + tail * (tail / student_tail).log()).mean()


def make_reference(folder: Path, size: Size, has_distillkit: bool) -> None:
    """First losses in fp64, in plain PyTorch, from whole logits."""
    batch = make_batches(folder, size).batch(0)
    with torch.no_grad():
        student = GPT.from_pretrained(folder / "student")(batch.ids).double()  # [B,T,V]
        teacher = GPT.from_pretrained(folder / "teacher")(batch.ids).double()

    losses = F.cross_entropy(student.flatten(0, 1), batch.labels.flatten(), reduction="none")
    losses = losses.view(size.B, size.T)
    teacher_ce = F.cross_entropy(teacher[:, :-1].flatten(0, 1), batch.labels[:, :-1].flatten())
    log_t = teacher.log_softmax(-1)
    kl = (log_t.exp() * (log_t - student.log_softmax(-1))).sum(-1)  # [B,T]
    ids, log_probs = read_recorded(folder, size)
    reference = {
        "ce": losses[:, :-1].mean(),
        "ce_T": losses.mean(),
        "kl": kl[:, :-1].mean(),
        "kl_T": kl.mean(),
        "ghost": ghost_kl(student, ids[: size.B], log_probs[: size.B]),
        "teacher_ce": teacher_ce,
    }
    if has_distillkit:
        from datasets import load_from_disk
        from distillkit.compression import LogprobCompressor

        rows = load_from_disk(folder / "distillkit").with_format("torch")[: size.B]
        codes = LogprobCompressor(config=distillkit_codes(size))
        reference["ghost_distillkit"] = ghost_kl(student, *codes.decompress_to_sparse(rows))
    reference = {name: value.item() for name, value in reference.items()}
    (folder / "reference.json").write_text(json.dumps(reference))


# Peers at work: each writes the losses and the seconds of its steps


def trainer_arguments(folder: Path, size: Size) -> dict:
    return {
        "output_dir": str(folder / "peer"),
        "per_device_train_batch_size": size.B,
        "max_steps": size.steps,
        "learning_rate": 5e-5,
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
    }


def load_with_transformers(path: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def make_tokenizer(size: Size):
    """TRL wants one, and nothing is tokenized."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"<{number}>": number for number in range(size.vocab_size)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<0>"))
    names = {"pad_token": "<0>", "eos_token": "<0>", "unk_token": "<0>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def time_trainer(trainer) -> dict:
    """Runs a transformers Trainer; seconds from the end of one step to the end of the next."""
    from transformers import TrainerCallback

    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

    trainer.add_callback(Clock())
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {"loss": losses[0], "seconds": np.diff(ends).tolist()}


def run_trainer(folder: Path, size: Size) -> dict:
    from transformers import Trainer, TrainingArguments, default_data_collator

    return time_trainer(
        Trainer(
            load_with_transformers(folder / "student"),
            TrainingArguments(**trainer_arguments(folder, size)),
            train_dataset=peer_rows(folder, size),
            data_collator=default_data_collator,
        )
    )


def run_gkd(folder: Path, size: Size) -> dict:
    from transformers import default_data_collator
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    arguments = GKDConfig(
        **trainer_arguments(folder, size),
        lmbda=0.0,
        beta=0.0,
        max_length=size.T,
    )
    return time_trainer(
        GKDTrainer(
            load_with_transformers(folder / "student"),
            load_with_transformers(folder / "teacher"),
            arguments,
            train_dataset=peer_rows(folder, size),
            data_collator=default_data_collator,
            processing_class=make_tokenizer(size),
        )
    )


def run_distillkit(folder: Path, size: Size) -> dict:
    from datasets import load_from_disk
    from distillkit.compression import LogprobCompressor
    from distillkit.configuration import DistillationRunConfig
    from distillkit.main import collate_packed_batch
    from distillkit.signals import OfflineSignalSource
    from distillkit.trainer import DistillationTrainer
    from trl import SFTConfig

    loss = {
        "function": "kl",
        "weight": 1.0,
        "temperature": 1.0,
        "missing_probability_handling": "symmetric_uniform",
    }
    codes = distillkit_codes(size)
    config = DistillationRunConfig(
        model=str(folder / "student"),
        dataset={"train_dataset": {"disk_path": str(folder / "distillkit")}, "prepacked": True},
        teacher={"kind": "dataset", "logprob_compressor": codes.model_dump()},
        sequence_length=size.T,
        output_path=str(folder / "peer"),
        loss_functions=[loss],
    )
    arguments = SFTConfig(
        **trainer_arguments(folder, size),
        max_length=size.T,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    return time_trainer(
        DistillationTrainer(
            model=load_with_transformers(folder / "student"),
            config=config,
            signal_source=OfflineSignalSource(LogprobCompressor(config=codes), size.vocab_size),
            true_vocab_size=size.vocab_size,
            train_dataset=load_from_disk(folder / "distillkit"),
            args=arguments,
            data_collator=collate_packed_batch,
            processing_class=make_tokenizer(size),
        )
    )


def time_forward(forward: Callable[[Tensor], Tensor], folder: Path, size: Size) -> dict:
    """forward: ids [B,T] to logits [B,T,V]."""
    batch = make_batches(folder, size).batch(0)
    seconds = []
    with torch.no_grad():
        for _ in range(size.steps):
            start = time.perf_counter()
            logits = forward(batch.ids)
            seconds.append(time.perf_counter() - start)
    labels = batch.labels[:, :-1].flatten()
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels)
    return {"loss": loss.item(), "seconds": seconds[1:]}


def run_our_teacher(folder: Path, size: Size) -> dict:
    model = GPT.from_pretrained(folder / "teacher").eval()
    return time_forward(model, folder, size)


def run_their_teacher(folder: Path, size: Size) -> dict:
    model = load_with_transformers(folder / "teacher").eval()
    return time_forward(lambda ids: model(ids).logits, folder, size)


WORKERS = {
    "cross-entropy, Trainer": run_trainer,
    "online, TRL GKD": run_gkd,
    "offline, DistillKit": run_distillkit,
    "teacher, ours": run_our_teacher,
    "teacher, transformers": run_their_teacher,
}


def run_part(part: str, folder: Path, size: Size) -> None:
    """What a process of this program does."""
    if part == "models and text":
        make_models_and_text(folder, size)
    elif part == "DistillKit's cache":
        make_distillkit_cache(folder, size)
    elif part == "reference":
        make_reference(folder, size, (folder / "distillkit").exists())
    else:
        result = WORKERS[part](folder, size)
        (folder / "result.json").write_text(json.dumps(result))


# Ours at work


def data_words(folder: Path, size: Size) -> list[str]:
    """The text, as a command line of ours has it."""
    return [
        "data=bin",
        f"data.path={folder}",
        "data.tokenizer=ids",
        f"data.vocab_size={size.vocab_size}",
        f"data.cache_dir={folder / 'tokens'}",
        f"eval_tokens={size.B * size.T}",
        "device=cpu",
        "dtype=float32",
    ]


def capture_words(folder: Path, size: Size) -> list[str]:
    return [
        "-m",
        "teachers.capture",
        f"teacher.path={folder / 'teacher'}",
        "access=topk",
        f"access.k={size.K}",
        f"block_size={size.T}",
        f"batch_size={size.B}",
        f"out={folder / 'cache'}",
        *data_words(folder, size),
    ]


def train_words(arm: str, folder: Path, size: Size) -> list[str]:
    own = {
        "cross-entropy": ["loss=ce", "teacher=none"],
        "online": ["teacher=online", f"teacher.path={folder / 'teacher'}", "access=full"],
        "offline": ["teacher=cache", f"teacher.path={folder / 'cache'}", f"access.k={size.K}"],
    }
    return [
        "train.py",
        f"model.init={folder / 'student'}",
        f"model.block_size={size.T}",
        f"batch_size={size.B}",
        f"max_steps={size.steps}",
        f"eval_every={size.steps}",
        "optim.schedule=constant",
        "optim.warmup_steps=0",
        "baseline=off",
        "resume=never",
        f"run_dir={folder / 'run'}",
        *own[arm],
        *data_words(folder, size),
    ]


def read_run(folder: Path, size: Size) -> dict:
    """The first loss and the seconds of the other steps, from metrics.jsonl."""
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    seconds = [size.B * size.T / row["tokens_per_s"] for row in rows if "tokens_per_s" in row]
    return {"loss": rows[0]["loss"], "seconds": seconds[1:]}


# Measuring


def tool_version(case: Case, checkout: Path | None) -> str:
    """Of a peer's package; a checkout's commit."""
    if case.is_ours:
        return ""  # the row's commit
    if case.tool == "DistillKit" and checkout:
        command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return f"{case.needs} {metadata.version(case.needs)}"


def start_process(words: list[str], folder: Path, paths: list[str]) -> float:
    """Runs `python WORDS` to its end; returns its peak resident memory in MiB.

    A child starts with the peak of the process that it is forked from, so this one stays small.
    """
    environment = os.environ | {
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *paths]),
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
    }
    log = folder / "log.txt"
    with open(log, "w") as stream:
        process = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, env=environment, stdout=stream, stderr=stream
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{words}: exit status {process.returncode}\n{log.read_text()[-3000:]}")
    return usage.ru_maxrss / 2**10


def check_loss(case: Case, loss: float, reference: float) -> None:
    """ValueError where a tool does not compute what its row says."""
    if not abs(loss - reference) <= TOLERANCE * max(1, abs(reference)):
        raise ValueError(f"{case.name}: first loss {loss:.6f}, the reference has {reference:.6f}")


def measure(case: Case, folder: Path, size: Size, start: Callable) -> dict:
    """One process: the median of its steps' seconds, its peak in MiB, its first loss."""
    if case.name in WORKERS:
        peak_mib = start(["-m", "tests.bench_peers", "--part", case.name])
        result = json.loads((folder / "result.json").read_text())
    else:
        shutil.rmtree(folder / "run", ignore_errors=True)
        peak_mib = start(train_words(case.arm, folder, size))
        result = read_run(folder, size)
    seconds = statistics.median(result["seconds"])
    return {"loss": result["loss"], "seconds": seconds, "peak_mib": peak_mib}


def cache_bytes(folder: Path, size: Size) -> dict[str, float]:
    """Bytes a token of the recorded entries, by the case that reads them."""
    ours = Cache(folder / "cache").spec.row.itemsize
    sizes = {"offline, ours": ours}
    if (folder / "distillkit").exists():
        sizes["offline, DistillKit"] = distillkit_codes(size).total_bits() / 8
    return sizes


# The table


def median_ratio(theirs: list[float], ours: list[float]) -> float:
    """Of measurements paired by round."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def make_rows(
    rounds: dict[str, list[dict]],
    caches: dict[str, float],
    versions: dict[str, str],
) -> list[dict]:
    """A row of the CSV for each case.

    Args:
        rounds: what `measure` gave in each round, by the case's name; absent: not installed.
        caches, versions: see cache_bytes and tool_version, by the case's name.

    The student's seconds are those of a step without the tool's teacher: of an online step, less
    the teacher's forward pass in the same round. A ratio is the peer's number over ours.
    """
    rows = []
    for case in CASES:
        row = {"arm": case.arm, "tool": case.tool, "objective": case.objective}
        if case.name not in rounds:
            rows.append(row | {"note": f"{case.needs} is not installed"})
            continue
        ours = columns(rounds, f"{case.arm}, ours")
        mine = columns(rounds, case.name)
        if case.arm == "online":
            subtract_teacher(rounds, "teacher, ours", ours)
            teacher = "teacher, ours" if case.is_ours else "teacher, transformers"
            subtract_teacher(rounds, teacher, mine)

        row["version"] = versions[case.name]
        row["rounds"] = len(mine["seconds"])
        row["first_loss"] = mine["loss"][0]
        for name in ("seconds", "student_seconds", "peak_mib"):
            row[name] = statistics.median(mine[name])
            row[f"{name}_ratio"] = median_ratio(mine[name], ours[name])
        row["seconds_low"] = min(mine["seconds"])
        row["seconds_high"] = max(mine["seconds"])
        if case.name in caches:
            row["cache_bytes"] = caches[case.name]
            row["cache_bytes_ratio"] = caches[case.name] / caches["offline, ours"]
        rows.append(row)
    return rows


def columns(rounds: dict[str, list[dict]], name: str) -> dict[str, list[float]]:
    """Measurements of a case by what they measure, in the order of the rounds."""
    measurements = rounds[name]
    lists = {key: [each[key] for each in measurements] for key in measurements[0]}
    return lists | {"student_seconds": lists["seconds"]}


def subtract_teacher(rounds: dict, teacher: str, lists: dict) -> None:
    pairs = zip(lists["seconds"], columns(rounds, teacher)["seconds"], strict=True)
    lists["student_seconds"] = [step - forward for step, forward in pairs]


TABLE = {  # column -> heading, format
    "seconds": ("s a step", "{:.3f}"),
    "seconds_ratio": ("x ours", "{:.2f}"),
    "student_seconds": ("without the teacher", "{:.3f}"),
    "student_seconds_ratio": ("x ours", "{:.2f}"),
    "peak_mib": ("peak MiB", "{:,.0f}"),
    "peak_mib_ratio": ("x ours", "{:.2f}"),
    "cache_bytes": ("cache, bytes a token", "{:.0f}"),
    "cache_bytes_ratio": ("x ours", "{:.2f}"),
}


def table_lines(rows: list[dict]) -> list[list[str]]:
    """The rows as cells, under their headings; a peer that is not there has a note alone."""
    lines = [["arm", "tool", *(heading for heading, _ in TABLE.values()), "note"]]
    for row in rows:
        cells = [row["arm"], row["tool"]]
        for key, (_, form) in TABLE.items():
            cells.append(form.format(row[key]) if key in row else "")
        lines.append([*cells, row.get("note", "")])
    return lines


def show(rows: list[dict]) -> None:
    headings, *lines = table_lines(rows)
    table = Table(box=SIMPLE)
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="left" if place < 2 else "right")
    for line in lines:
        table.add_row(*line)
    console = Console(width=max(140, Console().width))
    console.print(table, "x ours: the peer's number over ours, median of pairs; above 1 we win")


def bench(options: argparse.Namespace, folder: Path, size: Size) -> list[dict]:
    """All of it; returns the rows."""
    paths = [str(options.distillkit.resolve())] if options.distillkit else []
    sys.path += paths
    start_words = functools.partial(start_process, folder=folder, paths=paths)

    def start(words: list[str]) -> float:
        flags = ["--folder", str(folder), *(["--tiny"] if options.tiny else [])]
        return start_words(words + flags if "tests.bench_peers" in words else words)

    def start_part(part: str) -> float:
        return start(["-m", "tests.bench_peers", "--part", part])

    cases = [case for case in CASES if importlib.util.find_spec(case.needs)]
    start_part("models and text")
    start(capture_words(folder, size))
    if any(case.tool == "DistillKit" for case in cases):
        start_part("DistillKit's cache")
    start_part("reference")
    reference = json.loads((folder / "reference.json").read_text())

    rounds = {case.name: [] for case in cases}
    for number in range(options.rounds):
        for case in cases:
            measurement = measure(case, folder, size, start)
            check_loss(case, measurement["loss"], reference[case.reference])
            rounds[case.name].append(measurement)
            line = "round {}: {}: {seconds:.3f} s, {peak_mib:,.0f} MiB, first loss {loss:.5f}"
            print(line.format(number + 1, case.name, **measurement), flush=True)
    versions = {case.name: tool_version(case, options.distillkit) for case in cases}
    return make_rows(rounds, cache_bytes(folder, size), versions)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a rehearsal")
    parser.add_argument("--distillkit", type=Path, help="a checkout of DistillKit")
    parser.add_argument("--out", type=Path, help="a CSV file that the rows are appended to")
    parser.add_argument("--commit", help="where there is no git to ask")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = TINY if options.tiny else FULL
    if options.part:
        return run_part(options.part, options.folder, size)

    with tempfile.TemporaryDirectory() as folder:
        rows = bench(options, Path(folder), size)
    show(rows)
    if options.out:
        about = facts(torch.device("cpu"), options.commit)
        record(options.out, [row | about for row in rows])


if __name__ == "__main__":
    main()
