"""A whole training step of ours against plain PyTorch in nanoGPT's manner, interleaved in one process. One command:

python -m tests.bench_train                                              # gpt2_124m's shapes on a GPU, 5 micro-batches of 12
python -m tests.bench_train model.n_layer=2 model.n_embd=64 model.n_head=2 model.block_size=128 batch_size=4 micro_batch_size=2
python -m tests.bench_train --out results/train_gpu.csv --rounds 10      # appends the rows

Plain PyTorch: the same transformer, whole logits, F.cross_entropy, autocast, one compiled forward, fused AdamW, a loss that is
read every tenth step. Both see the same random tokens and must agree on a first loss; then `steps` steps of each take turns.
Reported: tokens/s, MFU, peak memory (a GPU's), and plain's time over ours, which should be 1.25 or more.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import hydra
import numpy as np
import torch
import torch.nn.functional as F
from hydra.core.config_store import ConfigStore

import train
from conf import cli
from conf.schema import Config
from data import prepare
from engine import ranks as processes
from engine.optim import OptimConfig, make_optimizers
from kernels.bench import facts, record
from model import GPT


class Plain:
    """nanoGPT's loop: logits [B,T,V] whole, their cross-entropy, clipping, fused AdamW."""

    def __init__(self, config: Config, vocab_size: int, device: torch.device, autocast):
        torch.manual_seed(config.seed)
        self.config, self.device, self.autocast = config, device, autocast
        self.micro = config.micro_batch_size or config.batch_size
        self.model = GPT(config.model, config.model.vocab_size or vocab_size).to(device)
        (self.optimizer,) = make_optimizers(self.model, OptimConfig(lr=config.optim.lr))
        self.loss = torch.compile(self.forward) if device.type == "cuda" else self.forward
        self.steps = 0

    def forward(self, ids, labels):
        return F.cross_entropy(self.model(ids).flatten(0, 1), labels.flatten())

    @torch.no_grad()
    def held_loss(self, batch) -> float:
        parts = zip(batch.ids.split(self.micro), batch.labels.split(self.micro), strict=True)
        with self.autocast():
            return statistics.fmean(self.forward(*(part.to(self.device) for part in pair)).item() for pair in parts)

    def step(self, batch) -> None:
        rounds = self.config.batch_size // self.micro
        for place in range(rounds):
            rows = slice(place * self.micro, (place + 1) * self.micro)
            ids, labels = (part[rows].to(self.device, non_blocking=True) for part in (batch.ids, batch.labels))
            with self.autocast():
                loss = self.loss(ids, labels) / rounds
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        if self.steps % 10 == 0:
            loss.item()


def timed(call, batches, device: torch.device) -> tuple[float, float]:
    """Seconds a step and the peak GiB of these steps."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for batch in batches:
        call(batch)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / len(batches), processes.memory_bytes(device) / 2**30


def ours(trainer: train.Trainer):
    """train.py's step; the row of the one before is read once this one is queued, as in Trainer.fit."""
    waiting = []

    def step(batch) -> None:
        made = trainer.update(batch)
        if waiting:
            waiting.pop()()
        waiting.append(made)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="steps of each in a round")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit")
    options = parser.parse_args()
    ConfigStore.instance().store(name="train_schema", node=Config)
    with tempfile.TemporaryDirectory() as scratch, hydra.initialize_config_dir(str(cli.FOLDER), version_base="1.3"):
        np.random.default_rng(0).integers(50257, size=2**22, dtype=np.uint16).tofile(Path(scratch) / "train.bin")
        np.random.default_rng(1).integers(50257, size=2**16, dtype=np.uint16).tofile(Path(scratch) / "val.bin")
        words = ["experiment=gpt2_124m", "batch_size=60", f"data.path={scratch}", "data.tokenizer=ids", "data.vocab_size=50257"]
        words += [f"data.cache_dir={scratch}", f"run_dir={scratch}/run", "micro_batch_size=12", *options.overrides]
        config = cli.compose("train", words)
        device = processes.pick_device(config.device, 0)
        tokens = prepare(config.data, say=lambda line: None)
        torch.set_float32_matmul_precision("high")
        trainer = train.Trainer(config, processes.Ranks(device=device), tokens)
        plain = Plain(config, tokens.vocab_size, device, trainer.autocast)
        calls = {"plain": plain.step, "ours": ours(trainer)}
        batches = [trainer.batches.batch(step) for step in range(options.steps)]
        if device.type == "cuda":
            batches = [batch.pinned() for batch in batches]
        first, theirs = trainer.update(batches[0])()["loss"], plain.held_loss(batches[0])
        assert abs(first - theirs) < 0.02 * theirs, f"different models: loss {first} against {theirs}"
        for call in calls.values():  # compile, and choose algorithms
            timed(call, batches[:2], device)
        found = {name: [] for name in calls}
        for _ in range(options.rounds):
            for name, call in calls.items():
                found[name].append(timed(call, batches, device))
    peak = processes.peak_flops(device)
    flops = trainer.student.flops_per_token(config.model.block_size)
    rows, base = [], statistics.median(seconds for seconds, _ in found["plain"])
    for name, times in found.items():
        seconds = sorted(each for each, _ in times)
        median, rate = statistics.median(seconds), trainer.step_tokens / statistics.median(seconds)
        mfu = rate * flops / peak if peak else float("nan")
        row = {"case": name, "parameters": trainer.student.num_params(), "tokens_a_step": trainer.step_tokens}
        row |= {"ms": median * 1e3, "ms_low": seconds[0] * 1e3, "ms_high": seconds[-1] * 1e3, "tokens_per_s": rate}
        rows.append(row | {"mfu": mfu, "peak_gib": max(peak for _, peak in times), "speedup": base / median})
        print(
            f"{name:6} {median * 1e3:9.1f} ms ({seconds[0] * 1e3:.1f}-{seconds[-1] * 1e3:.1f})  {rate:12,.0f} tokens/s",
            end="  ",
        )
        print(f"MFU {mfu:.1%}  peak {rows[-1]['peak_gib']:.2f} GiB  {base / median:.3f} x plain")
    if options.out:
        record(options.out, [row | facts(device, options.commit) for row in rows])


if __name__ == "__main__":
    main()
