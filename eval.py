"""A checkpoint against held-out text and, where given, against its teacher.

python eval.py path=runs/demo
python eval.py path=runs/demo teacher.path=runs/big
python eval.py path=gpt2/ data=text data.path=book.txt data.tokenizer=gpt2
"""

import math
from dataclasses import dataclass, field

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Column, Table

from data import DataConfig, held_out, prepare
from data.batches import IGNORE
from data.corpora import run_block_size, run_data
from data.tokenizer import Tokenizer, given_tokenizer, make_tokenizer
from engine import UserError, check_choice, check_ranges
from engine.checkpoint import resolve
from engine.cli import FOLDER, main
from engine.ranks import open_device
from model.metrics import evaluate
from teachers.online import check_teacher_vocabulary, load_model

EXPLAINED = {
    "val_loss": "held-out loss, nats a token",
    "perplexity": "perplexity a token",
    "bits_per_byte": "bits a byte of text (comparable across tokenizers)",
    "val_ece": "calibration error (ECE, 15 bins)",
    "val_kl": "KL from the teacher, nats",
    "val_acceptance": "acceptance 1 - TV(teacher, student)",
    "val_agreement": "top-1 agreement with the teacher",
    "tokens": "held-out tokens averaged over",
}

LONGEST = 1024  # models of 100,000 positions would ask for more memory than anybody means


@dataclass
class AgainstConfig:
    path: str | None = None  # RUN | CHECKPOINT | HUGGING_FACE_FOLDER of the teacher to compare with


@dataclass
class EvalConfig:
    """What to measure, and on what."""

    path: str | None = None  # RUN | CHECKPOINT | HUGGING_FACE_FOLDER
    teacher: AgainstConfig = field(default_factory=AgainstConfig)
    data: DataConfig | None = None  # unset: the text that the run at `path` held out
    block_size: int | None = (
        None  # context, in tokens; unset: the run's, else the model's, 1,024 at most
    )
    tokens: int | None = None  # held-out tokens to read; unset: all
    batch_size: int = 8  # sequences a forward pass
    device: str = "auto"  # auto | cpu | cuda | mps

    def __post_init__(self):
        check_ranges(self, "batch_size block_size tokens", low=1)
        check_choice("device", self.device, ("auto", "cpu", "cuda", "mps"))


def measure(config: EvalConfig) -> dict[str, float]:
    """All measures by name; see EXPLAINED."""
    if config.path is None:
        raise UserError("path=null: eval.py needs path=RUN, a checkpoint or a Hugging Face folder")
    folder = resolve(config.path)
    device = open_device(config.device)
    data = config.data or run_data(config.path, folder, "path")
    if config.data is not None and (
        own := Tokenizer.find(folder)
    ):  # whatever the text, the model reads it by its own
        usual = OmegaConf.load(FOLDER / f"data/{data.name}.yaml").get("tokenizer")
        if data.tokenizer not in (usual, "bpe"):
            asked = given_tokenizer(data.tokenizer) or make_tokenizer(
                data.tokenizer, data.vocab_size, []
            )
            if asked.vocabulary != own.vocabulary:
                rule = f"{config.path} reads text by its own tokenizer, {own.name}; leave data.tokenizer out"
                raise UserError(f"data.tokenizer={data.tokenizer}: {rule}")
        data.tokenizer = str(folder)
    tokens = prepare(data)
    model = load_model(folder, tokens, key="path").to(device)
    teacher, block_size = (
        None,
        min(model.config.block_size, config.block_size or run_block_size(folder) or LONGEST),
    )
    if config.teacher.path is not None:
        fix = f"give a teacher of the tokenizer of path={config.path}"
        teacher = load_model(config.teacher.path, tokens, key="teacher.path", fix=fix).to(device)
        check_teacher_vocabulary(teacher, config.teacher.path, model)
        block_size = min(block_size, teacher.config.block_size)
    tokens.check_length(block_size)
    blocks = tokens.blocks("val", block_size)
    most = config.tokens or len(blocks) * block_size
    kept = []

    def counted():
        for batch in held_out(blocks, block_size, config.batch_size, most):
            kept.append(int((batch.labels != IGNORE).sum()))
            yield batch

    found = evaluate(model, counted(), teacher)
    found["perplexity"] = math.exp(found["val_loss"])
    if (
        tokens.val_bytes is not None
    ):  # else only ids are known; by the held-out text's own tokens a byte
        found["bits_per_byte"] = (
            found["val_loss"] / math.log(2) * len(tokens.val) / tokens.val_bytes
        )
    return found | {"tokens": sum(kept)}


def run(config: EvalConfig) -> None:
    found = measure(config)
    title = f"{config.path}" + (f" against {config.teacher.path}" if config.teacher.path else "")
    table = Table("measure", Column("value", justify="right"), title=title)
    for name, text in EXPLAINED.items():
        if found.get(name) is not None:
            table.add_row(
                f"{text} ({name})", f"{found[name]:,}" if name == "tokens" else f"{found[name]:.4f}"
            )
    Console().print(table)


if __name__ == "__main__":
    main("eval", run, EvalConfig)
