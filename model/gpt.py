"""GPT-2, exactly: learned positions, pre-LayerNorm, GELU (tanh), biases, an output head tied to the token embedding.

B sequences, T positions, D = n_embd, H heads, V vocabulary, L layers.
Source: Radford et al. 2019; the layout and names follow Hugging Face's GPT2LMHeadModel, so that weights pass both ways.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from engine import UserError, check_range


@dataclass
class ModelConfig:
    """The transformer's shape; its vocabulary comes from the tokenizer."""

    n_layer: int = 2  # transformer blocks
    n_head: int = 2  # attention heads a block
    n_embd: int = 64  # width, a multiple of n_head
    block_size: int = 128  # context, in tokens
    dropout: float = 0.0  # on embeddings, attention weights and residual branches, 0..1

    def __post_init__(self):
        for key in ("n_layer", "n_head", "n_embd", "block_size"):
            check_range(f"model.{key}", getattr(self, key), low=1)
        check_range("model.dropout", self.dropout, low=0, below=1)
        if self.n_embd % self.n_head:
            raise UserError(f"model.n_embd={self.n_embd}: must be a multiple of model.n_head={self.n_head}")


class Cache:
    """Keys and values of the positions read so far, in buffers of the full context."""

    def __init__(self, config: ModelConfig, batch: int, like: torch.Tensor):
        shape = (config.n_layer, batch, config.n_head, config.block_size, config.n_embd // config.n_head)
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)  # [L,B,H,T,D/H]
        self.length = 0

    def extend(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends [B,H,T,D/H] after the positions held; returns all keys and values of that layer."""
        end = self.length + key.shape[2]
        self.keys[layer, :, :, self.length : end], self.values[layer, :, :, self.length : end] = key, value
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: torch.Tensor, cache: Cache | None, layer: int) -> torch.Tensor:
        B, T, D = x.shape
        query, key, value = (part.view(B, T, self.heads, -1).transpose(1, 2) for part in self.c_attn(x).split(D, dim=2))
        mask = None
        if cache is not None:
            key, value = cache.extend(layer, key, value)  # [B,H,S,D/H], S = positions held and new
            if cache.length and T > 1:  # new positions see all old ones and, among themselves, the earlier
                mask = torch.ones(T, key.shape[2], dtype=torch.bool, device=x.device).tril(cache.length)
        causal = T > 1 and mask is None
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(config.n_embd), Attention(config)
        self.ln_2, self.mlp = nn.LayerNorm(config.n_embd), MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, cache: Cache | None, layer: int) -> torch.Tensor:
        x = x + self.drop(self.attn(self.ln_1(x), cache, layer))
        return x + self.drop(self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    """Token ids [B,T] to logits [B,T,V]. Losses take `hidden` and `head_weight` instead, so that logits never exist whole."""

    def __init__(self, config: ModelConfig, vocab_size: int):
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.wte = nn.Embedding(vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, param in self.named_parameters():
            if name.endswith("c_proj.weight"):  # 2L branches add up on the residual stream
                nn.init.normal_(param, std=0.02 / math.sqrt(2 * config.n_layer))
            elif param.dim() == 2:
                nn.init.normal_(param, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(param)

    @property
    def head_weight(self) -> torch.Tensor:
        """[V,D], the token embedding itself."""
        return self.wte.weight

    def hidden(self, ids: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """ids [B,T] -> hidden states after the final norm [B,T,D]; with a cache the T positions follow those it holds."""
        start, T = (cache.length if cache is not None else 0), ids.shape[1]
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} positions: the model reads at most block_size={self.config.block_size}")
        positions = torch.arange(start, start + T, device=ids.device)
        x = self.drop(self.wte(ids) + self.wpe(positions))  # [B,T,D]
        for layer, block in enumerate(self.h):
            x = block(x, cache, layer)
        if cache is not None:
            cache.length += T
        return self.ln_f(x)

    def forward(self, ids: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """ids [B,T] -> logits [B,T,V]. Raises ValueError past block_size positions."""
        return F.linear(self.hidden(ids, cache), self.head_weight)

    def new_cache(self, batch: int) -> Cache:
        return Cache(self.config, batch, self.wte.weight.detach())

    @torch.no_grad()
    def generate(
        self,
        ids: torch.Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
        stop: int | None = None,
    ) -> Iterator[torch.Tensor]:
        """Yields the next token of each sequence, [B], up to max_new_tokens times.

        Args: ids [B,T] the prompt, T >= 1; temperature 0 takes the likeliest token; top_k and top_p cut the distribution before
        the draw (nucleus sampling: Holtzman et al. 2020); generator a CPU generator; stop ends once every sequence drew it.
        When the context is full, the last half of it is read again at fresh positions, as if the text began there.
        """
        was_training = self.training
        self.eval()
        size, done = self.config.block_size, torch.zeros(len(ids), dtype=torch.bool)
        window, cache = ids[:, -size:], self.new_cache(len(ids))
        fresh = window
        try:
            for _ in range(max_new_tokens):
                if cache.length + fresh.shape[1] > size:
                    window = window[:, -(size // 2 or 1) :]
                    fresh, cache = window, self.new_cache(len(ids))
                logits = F.linear(self.hidden(fresh, cache)[:, -1], self.head_weight)  # [B,V]
                token = draw(logits.float().cpu(), temperature, top_k, top_p, generator)
                yield token
                if stop is not None:
                    done |= token == stop
                    if done.all():
                        return
                fresh = token[:, None].to(ids.device)
                window = torch.cat([window, fresh], dim=1)[:, -size:]
        finally:
            self.train(was_training)

    def num_params(self) -> int:
        """Parameters, the tied head counted once (GPT-2 small: 124,439,808)."""
        return sum(param.numel() for param in self.parameters())

    def flops_per_token(self, T: int) -> int:
        """Training FLOPs a token at context T: 6 a weight that multiplies, plus 12 L D T of attention.

        The head multiplies and counts; embedding look-ups, biases and norms do not. A forward pass is a third.
        Source: Kaplan et al. 2020, PaLM (Chowdhery et al. 2022) appendix B, without the causal halving.
        """
        config = self.config
        weights = 12 * config.n_layer * config.n_embd**2 + self.vocab_size * config.n_embd
        return 6 * weights + 12 * config.n_layer * config.n_embd * T

    def save_pretrained(self, folder: Path) -> None:
        """Writes config.json and model.safetensors as transformers' GPT2LMHeadModel does."""
        from model.hf import save

        save(self, Path(folder))

    @classmethod
    def from_pretrained(cls, path: str | Path, key: str = "path") -> "GPT":
        """The model at a RUN, a CHECKPOINT or a Hugging Face folder, on the CPU, in the dtype it was stored in.

        Raises UserError naming `key`: nothing there, corrupt, or a feature that this transformer lacks.
        """
        from model.hf import load

        return load(path, key)


def draw(
    logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float, generator: torch.Generator | None
) -> torch.Tensor:
    """logits [B,V] -> token ids [B]; see GPT.generate."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    probs = logits.softmax(dim=-1)
    if top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True)
        outside = ordered.cumsum(dim=-1) - ordered >= top_p  # the token that crosses top_p stays
        probs = probs.masked_fill(outside.scatter(1, order, outside), 0.0)
    return torch.multinomial(probs, 1, generator=generator)[:, 0]
