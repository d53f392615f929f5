"""Text to tokens to batches; teachers to sparse targets."""

from data.batches import Batch, Batches, Blocks, Prefetch, held_out
from data.corpora import DataConfig
from data.tokenizer import Tokenizer
from data.tokens import Tokens, prepare

__all__ = [
    "Batch",
    "Batches",
    "Blocks",
    "DataConfig",
    "Prefetch",
    "Tokenizer",
    "Tokens",
    "held_out",
    "prepare",
]
