"""A checkpoint against held-out text and, where given, against its teacher.

python eval.py path=runs/demo
python eval.py path=runs/demo teacher.path=runs/big
python eval.py path=gpt2/ data=text data.path=book.txt data.tokenizer=gpt2
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING
from rich.console import Console
from rich.table import Column, Table

from data import DataConfig, Tokens, held_out, prepare
from data.batches import IGNORE
from data.corpora import run_block_size, run_config, run_data
from data.tokenizer import read_by_model
from engine import UserError, check_choice, check_ranges
from engine.checkpoint import manifest, resolve
from engine.cli import main
from engine.ranks import open_device
from model.metrics import evaluate
from teachers.online import load_model

LABELS = {
    "val_loss": "held-out loss, nats a token",
    "perplexity": "perplexity a token",
    "bits_per_byte": "bits a byte of text (comparable across tokenizers)",
    "val_ece": "calibration error (ECE, 15 bins)",
    "val_kl": "KL from the teacher, nats",
    "val_acceptance": "acceptance 1 - TV(teacher, student)",
    "val_agreement": "top-1 agreement with the teacher",
    "tokens": "held-out tokens averaged over",
}
MAX_BLOCK_SIZE = 1024  # unless asked for: a context of 100,000 takes more memory than anybody means


@dataclass
class AgainstConfig:
    path: str | None = None  # RUN | CHECKPOINT | HUGGING_FACE_FOLDER of the teacher to compare with


@dataclass
class EvalConfig:
    """What to measure, and on what."""

    path: str = MISSING  # RUN | CHECKPOINT | HUGGING_FACE_FOLDER
    teacher: AgainstConfig = field(default_factory=AgainstConfig)
    # unset: the text that the run at `path` held out; data=text is read whole, unless
    # data.val_fraction says otherwise
    data: DataConfig | None = None
    block_size: int | None = None  # context, in tokens; unset: the run's, else the model's to 1,024
    tokens: int | None = None  # held-out tokens to read; unset: all
    batch_size: int = 8  # sequences a forward pass
    device: str = "auto"  # auto | cpu | cuda | mps

    def __post_init__(self):
        check_ranges(self, "batch_size block_size tokens", low=1)
        check_choice("device", self.device, ("auto", "cpu", "cuda", "mps"))

    def resolve(self, overrides: list[str]) -> None:
        """A text that the user gave is measured whole; overrides: the KEY=VALUE that they wrote."""
        is_set = any(override.startswith("data.val_fraction=") for override in overrides)
        if self.data is not None and self.data.name == "text" and not is_set:
            self.data.val_fraction = 1.0


def choose_data(config: EvalConfig, folder: Path) -> DataConfig:
    """The text to measure on, read by the model's own tokenizer unless the user named another."""
    data = config.data
    if data is None:
        return run_data(config.path, folder, "path")
    if data.name == "text" and data.val_fraction == 1:
        warn_of_training_text(config.path, folder, data.path)
    data = read_by_model(data, folder, "path")
    if data.tokenizer == "bpe":
        raise UserError(
            f"path={config.path}: has no tokenizer; set data.tokenizer to the one that it reads"
        )
    return data


def warn_of_changed_text(path: str, folder: Path, tokens: Tokens) -> None:
    """Says where the text of the run at `path` is no longer what it was trained on."""
    recorded = manifest(folder).get("fingerprints", {}).get("tokens", tokens.fingerprint)
    if recorded != tokens.fingerprint:
        print(f"data: the text of {path} has changed since; other documents may be held out")


def warn_of_training_text(path: str, folder: Path, text: str) -> None:
    """Says where the `text` to be measured whole is what the run at `path` learnt from."""
    run = run_config(folder)
    trained_on = None if run is None else run.data.path
    if trained_on is not None and Path(trained_on).resolve() == Path(text).resolve():
        print(f"data: {path} was trained on most of it; leave data out for the rest")


def measure(config: EvalConfig) -> dict[str, float]:
    """All measures by name; see LABELS."""
    folder = resolve(config.path)
    device = open_device(config.device)

    # The text, the model that reads it, and its teacher
    tokens = prepare(choose_data(config, folder))
    if config.data is None:
        warn_of_changed_text(config.path, folder, tokens)
    teacher_path = config.teacher.path
    model = load_model(folder, tokens, key="path", partner=teacher_path).to(device)
    teacher = None
    if teacher_path is not None:
        teacher = load_model(teacher_path, tokens, partner=config.path).to(device)
        teacher.limit_vocabulary(model.vocab_size)

    # The context: no longer than either reads
    asked = config.block_size or run_block_size(folder) or MAX_BLOCK_SIZE
    longest = (teacher or model).config.block_size
    block_size = min(asked, model.config.block_size, longest)
    tokens.check_length(block_size, splits=("val",), key="block_size")

    # The measures
    blocks = tokens.blocks("val", block_size)
    max_tokens = config.tokens or len(blocks) * block_size
    measures = evaluate(model, held_out(blocks, config.batch_size, max_tokens), teacher)
    measures["perplexity"] = math.exp(measures["val_loss"])
    if tokens.val_bytes is not None:  # None where only ids are known
        bits_per_token = measures["val_loss"] / math.log(2)
        num_tokens = len(tokens.val)
        if blocks.to_the_end:
            num_tokens -= 1  # the first is no label; all others were measured
        measures["bits_per_byte"] = bits_per_token * num_tokens / tokens.val_bytes
    batches = held_out(blocks, config.batch_size, max_tokens)  # read again rather than kept
    measures["tokens"] = sum(int((batch.labels != IGNORE).sum()) for batch in batches)
    return measures


def run(config: EvalConfig) -> None:
    measures = measure(config)
    title = " against ".join(filter(None, [config.path, config.teacher.path]))
    table = Table("measure", Column("value", justify="right"), title=title)
    for name, label in LABELS.items():
        if name in measures:
            table.add_row(f"{label} ({name})", f"{round(measures[name], 4):,}")
    Console().print(table)


if __name__ == "__main__":
    main("eval", run, EvalConfig)
