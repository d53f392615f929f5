"""Text from a checkpoint, streamed to the terminal.

python sample.py path=runs/demo prompt="def " n=3 max_new_tokens=200 temperature=0.8 top_k=50 seed=0
python sample.py path=runs/tuned prompt="What is two and two?" chat=true
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from data.tokenizer import Tokenizer, read_tokenizer
from engine import UserError, check_choice, check_ranges
from engine.checkpoint import resolve
from engine.cli import main
from engine.ranks import open_device
from model import GPT


@dataclass
class SampleConfig:
    """What to write."""

    path: str | None = None  # RUN | CHECKPOINT | HUGGING_FACE_FOLDER
    prompt: str = ""  # how each text begins; empty: as a document does
    chat: bool = False  # the prompt is a user's turn, put as fine-tuning puts it (by the tokenizer's chat template, if any)
    n: int = 1  # texts
    max_new_tokens: int = 200  # tokens a text, at most
    temperature: float = 0.8  # 0 takes the likeliest token
    top_k: int | None = 50  # draw among the k likeliest; null = all
    top_p: float = 1.0  # draw among the likeliest that hold this much probability
    seed: int = 0  # same seed, same texts
    device: str = "auto"  # auto | cpu | cuda | mps

    def __post_init__(self):
        check_ranges(self, "n max_new_tokens top_k", low=1)
        check_ranges(self, "temperature seed", low=0)
        check_ranges(self, "top_p", above=0, high=1)
        check_choice("device", self.device, ("auto", "cpu", "cuda", "mps"))


def generate_texts(
    model: GPT, tokenizer: Tokenizer, config: SampleConfig, write: Callable[[str], object]
) -> list[str]:
    """Writes each text piece by piece as it is made, and returns them; a text ends at <|endoftext|>."""
    if config.prompt and tokenizer.name == "ids":
        rule = "the model's data were ids alone (data.tokenizer=ids), which read no text"
        raise UserError(
            f"prompt={config.prompt!r}: {rule}; leave prompt out, or train with the tokenizer that made them"
        )
    start = [] if tokenizer.bos is None else [tokenizer.bos]
    prompt = tokenizer.encode(config.prompt) if config.prompt else []
    if config.chat:  # all that comes before the answer's first token
        ids, mask = tokenizer.encode_row((("user", config.prompt), ("assistant", "answer")))[0]
        start, prompt = [], ids[: mask.index(1)]
    room = model.config.block_size - len(start)
    if len(prompt) > room:
        raise UserError(f"prompt: {len(prompt)} tokens, the model reads at most {room}; shorten it")
    ids = torch.tensor([(start + prompt) or [0]], device=model.head_weight.device)  # [1,T]
    generator = torch.Generator().manual_seed(config.seed)
    options = {
        "temperature": config.temperature,
        "top_k": config.top_k,
        "top_p": config.top_p,
        "generator": generator,
    }
    texts = []
    for number in range(config.n):
        show, pieces = tokenizer.stream(), [config.prompt + ("\n" if config.chat else "")]
        write(("\n---\n" if number else "") + pieces[0])
        for token in model.generate(ids, config.max_new_tokens, stop=tokenizer.eot, **options):
            if int(token) == tokenizer.eot:
                break
            pieces.append(show(token))
            write(pieces[-1])
        texts.append("".join(pieces))
    write("\n")
    return texts


def taste(path: str, tokenizer: Tokenizer) -> str:
    """A hundred tokens of a model, to look at."""
    start, generator = torch.tensor([[tokenizer.bos or 0]]), torch.Generator().manual_seed(0)
    drawn = GPT.from_pretrained(path).generate(
        start, 100, temperature=0.8, top_k=50, generator=generator
    )
    return tokenizer.decode([int(token) for token in drawn])


def run(config: SampleConfig) -> None:
    if config.path is None:
        raise UserError(
            "path=null: sample.py needs path=RUN, a checkpoint or a Hugging Face folder"
        )
    folder = resolve(config.path)
    model = GPT.from_pretrained(folder).to(open_device(config.device))
    tokenizer = read_tokenizer(folder, "path")
    generate_texts(
        model, tokenizer, config, lambda text: (sys.stdout.write(text), sys.stdout.flush())
    )


if __name__ == "__main__":
    main("sample", run, SampleConfig)
