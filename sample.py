"""Text from a checkpoint, streamed to the terminal.

python sample.py path=runs/demo prompt="def " n=3 max_new_tokens=200 temperature=0.8 top_k=50 seed=0
python sample.py path=runs/tuned prompt="What is two and two?" chat=true
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from data.tokenizer import Tokenizer, load_tokenizer
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
    chat: bool = False  # the prompt is a user's turn, put as fine-tuning puts it
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


def encode_prompt(tokenizer: Tokenizer, config: SampleConfig, block_size: int) -> list[int]:
    """The prompt as documents begin in training; UserError where the model cannot read it."""
    if config.prompt and tokenizer.name == "ids":
        rule = "the model's data were ids alone (data.tokenizer=ids), which read no text"
        fix = "leave prompt out, or train with the tokenizer that made them"
        raise UserError(f"prompt={config.prompt!r}: {rule}; {fix}")
    start = [] if tokenizer.bos is None else [tokenizer.bos]
    prompt = tokenizer.encode(config.prompt) if config.prompt else []
    if config.chat:
        # Everything before the first token of an answer
        turns = (("user", config.prompt), ("assistant", "answer"))
        ids, mask = tokenizer.encode_row(turns)[0]
        start = []
        prompt = ids[: mask.index(1)]
    room = block_size - len(start)
    if len(prompt) > room:
        raise UserError(f"prompt: {len(prompt)} tokens, the model reads at most {room}; shorten it")
    return (start + prompt) or [0]


def generate_texts(
    model: GPT, tokenizer: Tokenizer, config: SampleConfig, write: Callable[[str], object]
) -> list[str]:
    """Writes each text piece by piece as it is made, and returns them; <|endoftext|> ends one."""
    prompt = encode_prompt(tokenizer, config, model.config.block_size)
    ids = torch.tensor([prompt], device=model.head_weight.device)  # [1,T]
    generator = torch.Generator().manual_seed(config.seed)
    texts = []
    for number in range(config.n):
        if number > 0:
            write("\n---\n")
        text = config.prompt + ("\n" if config.chat else "")
        write(text)
        decode = tokenizer.stream()
        tokens = model.generate(
            ids,
            config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            generator=generator,
        )
        for token in tokens:
            if int(token) == tokenizer.eot:
                break
            piece = decode(token)
            write(piece)
            text += piece
        texts.append(text)
    write("\n")
    return texts


def sample_text(path: str, tokenizer: Tokenizer) -> str:
    """The beginning of a text by the model at `path`, to look at after training."""
    config = SampleConfig(max_new_tokens=100)
    return generate_texts(GPT.from_pretrained(path), tokenizer, config, write=lambda piece: None)[0]


def run(config: SampleConfig) -> None:
    if config.path is None:
        rule = "sample.py needs path=RUN, a checkpoint or a Hugging Face folder"
        raise UserError(f"path=null: {rule}")
    folder = resolve(config.path)
    model = GPT.from_pretrained(folder).to(open_device(config.device))
    tokenizer = load_tokenizer(folder)
    generate_texts(model, tokenizer, config, partial(print, end="", flush=True))


if __name__ == "__main__":
    main("sample", run, SampleConfig)
