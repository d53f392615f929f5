"""One transformer with switches: GPT-2 exactly, the Llama, Qwen2 and Qwen3 kinds, and conf/model/modern.yaml.

B sequences, T positions, S positions held, D = n_embd, H heads of E dimensions, G key/value heads, V vocabulary, L layers.
Sources: Radford et al. 2019 (GPT-2), Su et al. 2021 (RoPE), Zhang and Sennrich 2019 (RMSNorm), Shazeer 2020 (SwiGLU),
Ainslie et al. 2023 (grouped-query attention), So et al. 2021 (ReLU^2), Henry et al. 2020 (QK-norm).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend
from torch.utils.checkpoint import checkpoint

from engine import UserError, check_choice, check_ranges


@dataclass
class ModelConfig:
    """The transformer's shape and kind. What is unset is derived, mostly from n_layer, the one dial."""

    n_layer: int = 2  # transformer blocks
    n_head: int | None = (
        None  # attention heads a block; unset: of 64 dimensions each (32 below width 256)
    )
    n_embd: int | None = None  # width, a multiple of n_head; unset: 64 a layer (32 up to 4 layers)
    block_size: int = 128  # context, in tokens
    dropout: float = 0.0  # on embeddings, attention weights and residual branches, 0..1
    n_kv_head: int | None = None  # key/value heads, a divisor of n_head; unset: n_head
    head_dim: int | None = None  # dimensions a head; unset: n_embd / n_head
    n_inner: int | None = (
        None  # the MLP's width; unset: 4 n_embd (swiglu: 8/3 n_embd, up to a multiple of 64)
    )
    norm: str = "layernorm"  # layernorm | rmsnorm
    norm_eps: float = 1.0e-5  # added to the variance
    rope_theta: float | None = (
        None  # RoPE's longest wavelength is 2 pi times this; unset: learned positions
    )
    rope_scaling: dict[str, float] | None = (
        None  # Llama 3's stretch: the four numbers of SCALING, null = none
    )
    mlp: str = "gelu"  # gelu (its tanh form, GPT-2's) | gelu_exact | swiglu | relu2
    bias: str = "all"  # which linear layers have one: all | qkv | none
    qk_norm: bool = False  # RMSNorm on each head's queries and keys
    tied: bool = True  # the output head is the token embedding
    zero_init: bool = (
        False  # blocks start as the identity, and matrices at 1/sqrt(fan-in) instead of GPT-2's .02
    )
    vocab_size: int | None = (
        None  # rows of the embedding, at least the tokenizer's; unset: the tokenizer's
    )
    init: str | None = (
        None  # RUN | CHECKPOINT | HUGGING_FACE_FOLDER to start from, in its shape (not its block_size, dropout)
    )

    def __post_init__(self):
        check_ranges(
            self,
            "n_layer n_head n_embd block_size n_kv_head head_dim n_inner vocab_size",
            "model.",
            low=1,
        )
        check_ranges(self, "dropout", "model.", low=0, below=1)
        check_ranges(self, "norm_eps", "model.", low=0)
        check_ranges(self, "rope_theta", "model.", above=0)
        check_choice("model.norm", self.norm, ("layernorm", "rmsnorm"))
        check_choice("model.mlp", self.mlp, ("gelu", "gelu_exact", "swiglu", "relu2"))
        check_choice("model.bias", self.bias, ("all", "qkv", "none"))
        self.width = (
            self.n_embd or (32 if self.n_layer <= 4 else 64) * self.n_layer
        )  # these five: what is unset, derived
        self.heads = self.n_head or max(1, self.width // (64 if self.width >= 256 else 32))
        self.kv_heads = self.n_kv_head or self.heads
        self.head_size = self.head_dim or self.width // self.heads
        self.inner = self.n_inner or (
            64 * math.ceil(self.width / 24) if self.mlp == "swiglu" else 4 * self.width
        )
        if self.head_dim is None and self.width % self.heads:
            raise UserError(
                f"model.n_embd={self.width}: must be a multiple of model.n_head={self.heads}"
            )
        if self.heads % self.kv_heads:
            raise UserError(
                f"model.n_kv_head={self.n_kv_head}: must divide model.n_head={self.heads}; set either"
            )
        if self.rope_theta is not None and self.head_size % 2:
            raise UserError(
                f"model.head_dim={self.head_size}: model.rope_theta turns pairs of dimensions, it must be even"
            )
        if self.rope_scaling is not None and set(self.rope_scaling) != set(SCALING):
            raise UserError(
                f"model.rope_scaling={self.rope_scaling}: its keys are {', '.join(SCALING)}"
            )


SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


class Cache:
    """Keys and values of the positions that a model read so far of `batch` sequences; room for `size` (unset: block_size)."""

    def __init__(self, model: "GPT", batch: int, size: int | None = None):
        config, like = model.config, model.head_weight.detach()
        shape = (
            config.n_layer,
            batch,
            config.kv_heads,
            size or config.block_size,
            config.head_size,
        )
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)  # [L,B,G,size,E]
        self.length = 0

    def extend(
        self, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends [B,G,T,E] after the positions held; returns all keys and values of that layer."""
        end = self.length + key.shape[2]
        self.keys[layer, :, :, self.length : end], self.values[layer, :, :, self.length : end] = (
            key,
            value,
        )
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


def rope_table(config: ModelConfig, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of each position's angles, [...,E/2] fp32. Llama 3's scaling stretches long wavelengths only."""
    steps = (
        torch.arange(0, config.head_size, 2, dtype=torch.float32, device=positions.device)
        / config.head_size
    )
    speed = config.rope_theta**-steps  # [E/2] radians a position
    if config.rope_scaling is not None:
        factor, low, high, original = (config.rope_scaling[name] for name in SCALING)
        share = ((original * speed / (2 * math.pi) - low) / (high - low)).clamp(
            0, 1
        )  # 1 = short wavelength, left alone
        speed = speed * (share + (1 - share) / factor)
    angles = positions.float()[..., None] * speed
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """x [B,H,T,E], its first half against its second as Hugging Face's layout has it."""
    cos, sin = (part.to(x.dtype) for part in rope)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def make_norm(config: ModelConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.n_embd, eps=config.norm_eps)
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias == "all")


def read_as_groups(query: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether a fused kernel takes fewer key/value heads than query heads [B,H,T,E] as they are.

    On CUDA flash attention does, but it takes no mask, no fp32 and at most 256 dimensions a head.
    The memory-efficient kernel takes all three, but in torch 2.13 no groups: it needs the heads
    repeated. Left grouped, such a call falls back to the "math" kernel, which holds all scores
    [B,H,T,S]. (cuDNN's kernel takes groups and a mask, but only some GPUs prefer it.)
    """
    if query.device.type != "cuda":
        return True
    return mask is None and query.dtype != torch.float32 and query.shape[-1] <= 256


def match_heads(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [B,G,S,E] as attention for query [B,H,T,E] takes them: the same, or [B,H,S,E]."""
    repeats = query.shape[1] // key.shape[1]
    if repeats == 1 or read_as_groups(query, mask):
        return key, value
    return key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)


def attention_kernel(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    masked: bool,
) -> str:
    """PyTorch's kernel for training a model of this shape: flash, efficient, cudnn or math.

    masked: the blocks hold several documents, so that attention has a mask.
    """
    T, E = config.block_size, config.head_size
    query = torch.empty(1, config.heads, T, E, device=device, dtype=dtype, requires_grad=True)
    key = torch.empty(1, config.kv_heads, T, E, device=device, dtype=dtype, requires_grad=True)
    mask = None
    if masked:
        mask = torch.ones(1, 1, T, T, device=device, dtype=torch.bool)
    key, value = match_heads(query, key, key, mask)
    # torch.backends.cuda says which kernels could run. Only this call knows which one PyTorch prefers.
    choice = torch._fused_sdp_choice(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=config.dropout,
        is_causal=mask is None,
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return SDPBackend(choice).name.removesuffix("_ATTENTION").lower()


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, E = config, config.head_size
        self.sizes = [config.n_head * E, config.kv_heads * E, config.kv_heads * E]
        self.c_attn = nn.Linear(config.n_embd, sum(self.sizes), bias=config.bias != "none")
        self.c_proj = nn.Linear(self.sizes[0], config.n_embd, bias=config.bias == "all")
        norm = partial(nn.RMSNorm, E, eps=config.norm_eps) if config.qk_norm else nn.Identity
        self.q_norm, self.k_norm = norm(), norm()

    def forward(self, x: torch.Tensor, layer: int, mask, rope, cache: Cache | None) -> torch.Tensor:
        B, T, _ = x.shape
        parts = self.c_attn(x).split(self.sizes, dim=2)  # [B,T,H*E], [B,T,G*E] twice
        query, key, value = (
            part.view(B, T, -1, self.config.head_size).transpose(1, 2) for part in parts
        )  # [B,H,T,E], ...
        query, key = self.q_norm(query), self.k_norm(key)
        if rope is not None:
            query, key = rotate(query, rope), rotate(key, rope)
        if query.dtype != value.dtype:  # autocast runs norms in fp32
            query, key = query.to(value.dtype), key.to(value.dtype)
        if cache is not None:
            key, value = cache.extend(layer, key, value)  # [B,G,S,E], S = positions held and new
        key, value = match_heads(query, key, value, mask)
        y = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.config.dropout if self.training else 0.0,
            is_causal=T > 1 and mask is None,
            enable_gqa=key.shape[1] != query.shape[1],
        )
        return self.c_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.kind, bias = config.mlp, config.bias == "all"
        self.c_fc = nn.Linear(
            config.n_embd, config.inner * (2 if config.mlp == "swiglu" else 1), bias=bias
        )
        self.c_proj = nn.Linear(config.inner, config.n_embd, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.c_fc(x)
        if self.kind == "swiglu":
            gate, up = x.chunk(2, dim=-1)
            return self.c_proj(F.silu(gate) * up)
        if self.kind == "relu2":
            return self.c_proj(F.relu(x).square())
        return self.c_proj(F.gelu(x, approximate="tanh" if self.kind == "gelu" else "none"))


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.ln_1, self.attn = make_norm(config), Attention(config)
        self.ln_2, self.mlp = make_norm(config), MLP(config)

    def forward(self, x: torch.Tensor, *place) -> torch.Tensor:
        x = x + F.dropout(self.attn(self.ln_1(x), *place), self.config.dropout, self.training)
        return x + F.dropout(self.mlp(self.ln_2(x)), self.config.dropout, self.training)


class GPT(nn.Module):
    """Token ids [B,T] to logits [B,T,V]. Losses take `hidden` and `head_weight` instead, so that logits never exist whole.

    Set `checkpointing` to keep each block's input alone and compute the block again in the backward pass.
    """

    def __init__(self, config: ModelConfig, vocab_size: int):
        super().__init__()
        config = replace(config, n_embd=config.width, n_head=config.heads)
        self.config, self.vocab_size, self.checkpointing = config, vocab_size, False
        self.wte = nn.Embedding(vocab_size, config.n_embd)
        self.wpe = (
            nn.Embedding(config.block_size, config.n_embd) if config.rope_theta is None else None
        )
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = make_norm(config)
        self.lm_head = None if config.tied else nn.Linear(config.n_embd, vocab_size, bias=False)
        for name, param in self.named_parameters():
            if name.endswith("c_proj.weight"):  # 2L branches add up on the residual stream
                nn.init.normal_(
                    param, std=0.0 if config.zero_init else 0.02 / math.sqrt(2 * config.n_layer)
                )
            elif param.dim() == 2:
                matrix = config.zero_init and name.startswith("h.")
                nn.init.normal_(param, std=param.shape[1] ** -0.5 if matrix else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(param)

    @property
    def head_weight(self) -> torch.Tensor:
        """[V,D], the token embedding itself where the head is tied."""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    def set_dropout(self, dropout: float) -> None:
        self.config.dropout = dropout  # every module holds this one config

    def place(self, T: int, cache: Cache | None, documents: torch.Tensor | None) -> tuple:
        """Where the T new positions stand: their numbers [T] or [B,T], and for every block mask and rope.

        mask: [T,S] or [B,1,T,T], True = seen; None: causal. rope: cosines and sines, [T,E/2] or [B,1,T,E/2]; None: learned.
        """
        start, device, mask = (
            (cache.length if cache is not None else 0),
            self.wte.weight.device,
            None,
        )
        if start + T > self.config.block_size:
            raise ValueError(
                f"{start + T} positions: the model reads at most block_size={self.config.block_size}"
            )
        positions = torch.arange(start, start + T, device=device)
        if documents is not None:
            first = torch.ones_like(documents, dtype=torch.bool)
            first[:, 1:] = documents[:, 1:] != documents[:, :-1]
            mask = (documents[:, :, None] == documents[:, None, :]).tril()[:, None]  # [B,1,T,T]
            positions = (
                positions - (positions * first).cummax(dim=1).values
            )  # [B,T], from 0 in each document
        elif start and T > 1:  # new positions see all old ones and, among themselves, the earlier
            mask = torch.ones(T, start + T, dtype=torch.bool, device=device).tril(start)
        wanted = self.config.rope_theta is not None
        rope = (
            rope_table(self.config, positions if documents is None else positions[:, None])
            if wanted
            else None
        )
        return positions, mask, rope

    def hidden(
        self, ids: torch.Tensor, cache: Cache | None = None, documents: torch.Tensor | None = None
    ) -> torch.Tensor:
        """ids [B,T] -> hidden states after the final norm [B,T,D]; with a cache the T positions follow those it holds.

        With `documents` [B,T] (numbers that change where a document ends; no cache then) no position sees another document's
        and positions count from each document's own start.
        """
        positions, mask, rope = self.place(ids.shape[1], cache, documents)
        x = self.wte(ids) if self.wpe is None else self.wte(ids) + self.wpe(positions)  # [B,T,D]
        x = F.dropout(x, self.config.dropout, self.training)
        for layer, block in enumerate(self.h):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, layer, mask, rope, cache, use_reentrant=False)
            else:
                x = block(x, layer, mask, rope, cache)
        if cache is not None:
            cache.length += ids.shape[1]
        return self.ln_f(x)

    def forward(self, ids: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """ids [B,T] -> logits [B,T,V]. Raises ValueError past block_size positions."""
        return F.linear(self.hidden(ids, cache), self.head_weight)

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
        room = min(size, ids.shape[1] + max_new_tokens)
        text, fresh, cache = ids, ids[:, -size:], Cache(self, len(ids), room)
        try:
            for _ in range(max_new_tokens):
                if cache.length + fresh.shape[1] > size:
                    fresh, cache = text[:, -(size // 2 or 1) :], Cache(self, len(ids), room)
                logits = F.linear(self.hidden(fresh, cache)[:, -1], self.head_weight)  # [B,V]
                token = draw(logits.float().cpu(), temperature, top_k, top_p, generator)
                yield token
                if stop is not None:
                    done |= token == stop
                    if done.all():
                        return
                fresh = token[:, None].to(ids.device)
                text = torch.cat([text, fresh], dim=1)[:, -size:]
        finally:
            self.train(was_training)

    def num_params(self) -> int:
        """Parameters, the tied head counted once (GPT-2 small: 124,439,808)."""
        return sum(param.numel() for param in self.parameters())

    def flops_per_token(self, T: int) -> int:
        """Training FLOPs a token at context T: 6 a weight that multiplies, plus 12 L H E T of attention.

        The head multiplies and counts; embedding look-ups, biases and norms do not. A forward pass is a third.
        Source: Kaplan et al. 2020, PaLM (Chowdhery et al. 2022) appendix B, without the causal halving.
        """
        config = self.config
        weights = (
            sum(param.numel() for param in self.h.parameters() if param.dim() == 2)
            + self.head_weight.numel()
        )
        return 6 * weights + 12 * config.n_layer * config.n_head * config.head_size * T

    def save_pretrained(self, folder: Path, bos: int | None = None, eos: int | None = None) -> None:
        """Writes config.json and model.safetensors as transformers does for a model of this kind (see model/hf.py).

        `bos` and `eos` are the tokens that begin and end a text.
        """
        from model.hf import save

        save(self, Path(folder), bos, eos)

    @classmethod
    def from_pretrained(cls, path: str | Path, key: str = "path") -> "GPT":
        """The model at a RUN, a CHECKPOINT or a Hugging Face folder, on the CPU, in the dtype it was stored in.

        Raises UserError naming `key`: nothing there, corrupt, or a feature that this transformer lacks.
        """
        from model.hf import load

        return load(path, key)


def draw(
    logits: torch.Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float,
    generator: torch.Generator | None,
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
