"""Text from a checkpoint, streamed to the terminal.

python sample.py path=runs/demo prompt="def " n=3 max_new_tokens=200 temperature=0.8 top_k=50 seed=0
python sample.py path=runs/tuned prompt="What is two and two?" chat=true
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from omegaconf import MISSING

from data.tokenizer import Tokenizer, load_tokenizer
from engine import UserError, check_choice, check_ranges
from engine.checkpoint import resolve
from engine.cli import main
from engine.ranks import open_device
from model import GPT


@dataclass
class SampleConfig:
    """What to write."""

    path: str = MISSING  # RUN | CHECKPOINT | HUGGING_FACE_FOLDER
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
    """The prompt as documents begin in training; UserError where it is longer than block_size."""
    prompt = [] if tokenizer.bos is None else [tokenizer.bos]
    if config.chat:
        prompt = tokenizer.encode_question(config.prompt)
    elif config.prompt:
        prompt += tokenizer.encode(config.prompt)
    if len(prompt) > block_size:
        raise UserError(
            f"prompt: {len(prompt)} tokens, the model reads at most {block_size}; shorten"
        )
    return prompt or [0]


def generate_texts(model: GPT, tokenizer: Tokenizer, config: SampleConfig) -> Iterator[str]:
    """Yields the texts piece by piece, with `---` between them; any end token ends one."""
    prompt = encode_prompt(tokenizer, config, model.config.block_size)
    tokenizer.check_prompt(prompt, model.vocab_size, "prompt")
    ids = torch.tensor([prompt], device=model.head_weight.device)  # [1,T]
    stop = tokenizer.end_tokens(model.eos)
    if config.chat and tokenizer.end_of_turn is not None:
        stop = [*stop, tokenizer.end_of_turn]
    generator = torch.Generator().manual_seed(config.seed)
    for number in range(config.n):
        if number > 0:
            yield "\n---\n"
        yield config.prompt
        if config.chat:
            yield "\n"
        decode = tokenizer.stream()
        tokens = model.generate(
            ids,
            config.max_new_tokens,
            stop=stop,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            generator=generator,
        )
        for token in tokens:
            if int(token) not in stop:
                yield decode(token)


def sample_text(path: str, tokenizer: Tokenizer) -> str:
    """The beginning of a text by the model at `path`, to look at after training."""
    model = GPT.from_pretrained(path).limit_vocabulary(tokenizer.vocab_size)
    return "".join(generate_texts(model, tokenizer, SampleConfig(max_new_tokens=100)))


def run(config: SampleConfig) -> None:
    folder = resolve(config.path)
    device = open_device(config.device)
    tokenizer = load_tokenizer(folder)
    model = GPT.from_pretrained(folder).limit_vocabulary(tokenizer.vocab_size).to(device)
    for piece in generate_texts(model, tokenizer, config):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main("sample", run, SampleConfig)
