"""One transformer with switches: GPT-2, Llama, Qwen2 and Qwen3 exactly, and conf/model/modern.yaml.

    model = GPT.from_pretrained("runs/demo")  # or GPT(ModelConfig(n_layer=6), vocab_size=50304)
    logits = model(ids)                       # [B,T] -> [B,T,V]

B  sequences                      D  n_embd, the width
T  positions of this call         H  query heads of E dimensions
S  positions that are attended    G  key/value heads, a divisor of H
V  possible tokens                L  blocks

Sources: Radford et al. 2019 (GPT-2), Su et al. 2021 (RoPE), Zhang and Sennrich 2019 (RMSNorm),
Shazeer 2020 (SwiGLU), Ainslie et al. 2023 (grouped-query attention), So et al. 2021 (ReLU^2),
Henry et al. 2020 (QK-norm).
"""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.utils.checkpoint import checkpoint

from engine import UserError
from engine.checkpoint import resolve
from model import hf
from model.config import ModelConfig


class KVCache:
    """Keys and values of the positions that a model has read, so that it need not read them again.

    Args: batch_size: B. size: positions that there is room for, at most the model's block_size.
    """

    def __init__(self, model: "GPT", batch_size: int, size: int):
        config = model.config
        shape = (config.n_layer, 2, batch_size, config.n_kv_head, size, config.head_dim)
        self.layers = model.head_weight.new_zeros(shape)  # [L,2,B,G,size,E]
        self.length = 0  # positions held

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Appends [B,G,T,E] to what `layer` holds; returns all its keys and values, [B,G,S,E]."""
        held = self.layers[layer, :, :, :, : self.length + key.shape[2]]  # [2,B,G,S,E]
        held[:, :, :, self.length :] = torch.stack([key, value])
        return held.unbind()


Rope = tuple[Tensor, Tensor]  # cosines and sines, [T,E/2] or [B,1,T,E/2]


def yarn_unscaled(config: ModelConfig, index: Tensor) -> Tensor:
    """YaRN's share [E/2] of each frequency that is left as it is; index: [E/2] from 0."""
    E = config.head_dim
    scaling = config.rope_scaling
    original = scaling["original_max_position_embeddings"]

    def dimension(turns: float) -> float:
        """Where the frequency makes this many turns within the original context."""
        return E * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    # Those with more turns than beta_fast are kept, those with fewer than beta_slow divided.
    low = dimension(scaling["beta_fast"])
    high = dimension(scaling["beta_slow"])
    if scaling["truncate"]:
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, E - 1)
    if low == high:
        high += 0.001
    divided = (index - low) / (high - low)
    return 1 - divided.clamp(0, 1)


def rope_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """[E/2] radians a position in fp32, scaled as config.rope_scaling says."""
    E = config.head_dim
    dimensions = torch.arange(0, E, 2, dtype=torch.float32, device=device)
    exponents = dimensions / E  # [E/2] from 0 towards 1
    frequency = config.rope_theta**-exponents  # [E/2]
    scaling = config.rope_scaling
    if scaling is None:
        return frequency

    # Each is divided by the factor, but for its unscaled share, which is left as it is.
    factor = scaling["factor"]
    if scaling["rope_type"] == "linear":
        return frequency / factor
    if scaling["rope_type"] == "yarn":
        unscaled = yarn_unscaled(config, dimensions / 2)  # [E/2]
    else:
        low = scaling["low_freq_factor"]
        high = scaling["high_freq_factor"]
        original = scaling["original_max_position_embeddings"]
        turns = original * frequency / (2 * math.pi)  # within the context it was first trained on
        unscaled = (turns - low) / (high - low)
        unscaled = unscaled.clamp(0, 1)  # [E/2]
    return frequency * (unscaled + (1 - unscaled) / factor)


def rope_tables(config: ModelConfig, positions: Tensor) -> Rope:
    """Cosines and sines, in fp32, of the angles at positions [T] or [B,T]."""
    frequency = rope_frequencies(config, positions.device)  # [E/2]
    angles = positions.float()[..., None] * frequency  # [T,E/2] or [B,T,E/2]
    if positions.dim() == 2:
        angles = angles[:, None]  # [B,1,T,E/2]: the same for every head
    cos = angles.cos()
    sin = angles.sin()
    if config.rope_scaling is not None and config.rope_scaling["rope_type"] == "yarn":
        # Larger queries and keys: sharper attention over the longer context
        cos = cos * config.rope_scaling["attention_factor"]
        sin = sin * config.rope_scaling["attention_factor"]
    return cos, sin


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """Rotates x [B,H,T,E]: its first half against its second, which is Hugging Face's layout."""
    cos, sin = (table.to(x.dtype) for table in rope)
    first, second = x.chunk(2, dim=-1)  # [B,H,T,E/2] each
    new_first = first * cos - second * sin
    new_second = second * cos + first * sin
    return torch.cat([new_first, new_second], dim=-1)


def needs_repeated_heads(
    query: Tensor,
    mask: Tensor | None,
) -> bool:
    """Whether attention wants a key head for each head of query [B,H,T,E], where there are fewer.

    On CUDA flash attention takes grouped heads, but no mask, no fp32 and at most 256 dimensions a
    head. The memory-efficient kernel takes all three, but in torch 2.13 no groups: it needs the
    heads repeated. Left grouped, such a call falls back to the "math" kernel, which holds all
    scores [B,H,T,S]. (cuDNN's kernel takes groups and a mask, but only some GPUs prefer it.)
    """
    flash = mask is None and query.dtype != torch.float32 and query.shape[-1] <= 256
    return query.device.type == "cuda" and not flash


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    function=F.scaled_dot_product_attention,
):
    """Attention of query [B,H,T,E] to keys and values [B,G,S,E]: [B,H,T,E].

    function: what is called, attention itself or the question which kernel it would take.
    """
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1 and needs_repeated_heads(query, mask):
        key = key.repeat_interleave(repeats, dim=1)  # [B,H,S,E]
        value = value.repeat_interleave(repeats, dim=1)  # [B,H,S,E]
    return function(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout_p,
        is_causal=mask is None and query.shape[2] > 1,
        enable_gqa=key.shape[1] != query.shape[1],
    )


def attention_kernel(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    masked: bool,
) -> str:
    """PyTorch's kernel for training a model of this shape: flash, efficient, cudnn or math.

    masked: the blocks hold several documents, so that attention has a mask.
    """
    config = config.resolved()
    T = config.block_size
    shape = (1, config.n_head, T, config.head_dim)
    query = torch.empty(shape, device=device, dtype=dtype, requires_grad=True)
    key = query[:, : config.n_kv_head]
    mask = None
    if masked:
        mask = torch.ones(1, 1, T, T, device=device, dtype=torch.bool)
    # torch.backends.cuda says which kernels could run. Only this call knows which one is preferred.
    choice = attend(query, key, key, mask, config.dropout, torch._fused_sdp_choice)
    return SDPBackend(choice).name.removesuffix("_ATTENTION").lower()


def softcap(logits: Tensor, cap: float | None) -> Tensor:
    """Logits bent into -cap..cap, small ones left nearly as they are (Gemma 2, 2024)."""
    if cap is None:
        return logits
    return cap * torch.tanh(logits / cap)


def make_norm(config: ModelConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.n_embd, eps=config.norm_eps)
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias == "all")


class Attention(nn.Module):
    """x [B,T,D] -> [B,T,D]. mask, rope and cache: see GPT.hidden, which makes them."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config = config
        self.layer = layer
        D = config.n_embd
        E = config.head_dim
        self.heads = [config.n_head, config.n_kv_head, config.n_kv_head]  # query, key, value
        self.c_attn = nn.Linear(D, sum(self.heads) * E, bias=config.bias != "none")
        self.c_proj = nn.Linear(config.n_head * E, D, bias=config.bias == "all")
        self.q_norm = nn.Identity()
        self.k_norm = nn.Identity()
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(E, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(E, eps=config.norm_eps)

    def forward(self, x: Tensor, mask=None, rope=None, cache=None) -> Tensor:
        heads = self.c_attn(x).unflatten(2, (-1, self.config.head_dim))  # [B,T,H+2G,E]
        heads = heads.transpose(1, 2)  # [B,H+2G,T,E]
        query, key, value = heads.split(self.heads, dim=1)  # [B,H,T,E], 2 of [B,G,T,E]
        query = self.q_norm(query)
        key = self.k_norm(key)
        if rope is not None:
            query = apply_rope(query, rope)
            key = apply_rope(key, rope)
        query = query.to(value.dtype)  # autocast runs norms in fp32
        key = key.to(value.dtype)

        if cache is not None:
            key, value = cache.extend(self.layer, key, value)  # [B,G,S,E]
        dropout_p = self.config.dropout if self.training else 0.0
        y = attend(query, key, value, mask, dropout_p)  # [B,H,T,E]
        y = y.transpose(1, 2).flatten(2)  # [B,T,H*E]
        return self.c_proj(y)


class MLP(nn.Module):
    """x [B,T,D] -> [B,T,D], each position alone."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.kind = config.mlp
        D = config.n_embd
        has_bias = config.bias == "all"
        # SwiGLU has two matrices in c_fc, the gate above the other.
        rows = 2 * config.n_inner if config.mlp == "swiglu" else config.n_inner
        self.c_fc = nn.Linear(D, rows, bias=has_bias)
        self.c_proj = nn.Linear(config.n_inner, D, bias=has_bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)  # [B,T,n_inner], twice that for swiglu
        if self.kind == "swiglu":
            gate, up = x.chunk(2, dim=-1)  # [B,T,n_inner] each
            x = F.silu(gate) * up
        elif self.kind == "relu2":
            x = F.relu(x).square()
        elif self.kind == "gelu":
            x = F.gelu(x, approximate="tanh")
        else:
            x = F.gelu(x)
        return self.c_proj(x)


class Block(nn.Module):
    """One layer: attention and MLP, each added to the residual stream x [B,T,D]."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config = config
        self.ln_1 = make_norm(config)
        self.attn = Attention(config, layer)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, *context) -> Tensor:
        dropout = self.config.dropout
        branch = self.attn(self.ln_1(x), *context)
        x = x + F.dropout(branch, dropout, self.training)
        branch = self.mlp(self.ln_2(x))
        return x + F.dropout(branch, dropout, self.training)


class GPT(nn.Module):
    """Token ids [B,T] to logits [B,T,V].

    The losses take `hidden` and `head_weight` instead, and never materialise the logits. Set
    `checkpointing` to keep only each block's input and compute the block again in backward.
    """

    def __init__(self, config: ModelConfig, vocab_size: int):
        super().__init__()
        config = config.resolved()  # our own copy: build_student writes to it
        self.config = config
        self.vocab_size = vocab_size  # possible tokens; see limit_vocabulary
        self.eos: list[int] = []  # the tokens that end a text, as the model's folder says
        self.checkpointing = False
        self.wte = nn.Embedding(vocab_size, config.n_embd)
        self.wpe = None
        if config.rope_theta is None:
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = make_norm(config)
        self.lm_head = None
        if not config.tied:
            self.lm_head = nn.Linear(config.n_embd, vocab_size, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        """GPT-2's initialisation; with zero_init every block starts as the identity."""
        config = self.config
        for name, param in self.named_parameters():
            std = 0.02
            if name.endswith("c_proj.weight"):  # 2L branches add up on the residual stream
                std = 0.0 if config.zero_init else 0.02 / math.sqrt(2 * config.n_layer)
            elif config.zero_init and name.startswith("h."):
                std = param.shape[-1] ** -0.5
            if param.dim() == 2:
                nn.init.normal_(param, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(param)

    def limit_vocabulary(self, vocab_size: int) -> "GPT":
        """Makes the first `vocab_size` tokens the only possible ones; returns the model.

        Further rows of the embedding and the head are padding, or tokens of another tokenizer:
        they have probability zero, and gradient zero from the head. A checkpoint keeps them.
        """
        self.vocab_size = min(self.vocab_size, vocab_size)
        return self

    @property
    def head_weight(self) -> Tensor:
        """[V,D]: the rows of possible tokens, of the token embedding where the head is tied."""
        head = self.wte if self.lm_head is None else self.lm_head
        if self.vocab_size < len(head.weight):
            return head.weight[: self.vocab_size]
        return head.weight

    def hidden(
        self,
        ids: Tensor,
        cache: KVCache | None = None,
        document_ids: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, [B,T,D].

        Args:
            ids: [B,T] tokens.
            cache: the T positions follow those that it holds, and are added to it. Where it holds
                any, T is 1.
            document_ids: [B,T] whole numbers, another for each document. No position sees another
                document, and positions count from each document's start. Not with a cache.

        Raises: ValueError past block_size positions.
        """
        T = ids.shape[1]
        start = cache.length if cache is not None else 0
        if start + T > self.config.block_size:
            limit = self.config.block_size
            raise ValueError(f"{start + T} positions: the model reads at most block_size={limit}")
        assert start == 0 or T == 1

        # Where the tokens stand and what they see. No mask: all positions up to their own.
        positions = torch.arange(start, start + T, device=ids.device)  # [T]
        mask = None
        if document_ids is not None:
            same_document = document_ids[:, :, None] == document_ids[:, None, :]  # [B,T,T]
            mask = same_document.tril()[:, None]  # [B,1,T,T]
            positions = mask.sum(dim=-1)[:, 0] - 1  # [B,T]: how many a position sees before it

        x = self.wte(ids)  # [B,T,D]
        rope = None
        if self.wpe is not None:
            x = x + self.wpe(positions)
        else:
            rope = rope_tables(self.config, positions)
        x = F.dropout(x, self.config.dropout, self.training)

        context = (mask, rope, cache)
        for block in self.h:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, *context, use_reentrant=False)
            else:
                x = block(x, *context)
        if cache is not None:
            cache.length += T
        return self.ln_f(x)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B,T] -> logits [B,T,V]; see `hidden`."""
        return self.logits(self.hidden(ids))

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [...,D] -> logits [...,V]."""
        return softcap(F.linear(hidden, self.head_weight), self.config.logit_softcap)

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        stop: int | list[int] | None = None,
        **sampling,
    ) -> Iterator[Tensor]:
        """Yields the next token of each sequence, [B] on the CPU, up to max_new_tokens times.

        When the context is full, its last half is read again, as if the text began there.

        Args:
            ids: [B,T] the prompts, T >= 1.
            stop: a token or several; generation ends once every sequence has drawn one of them.
                None: the model's own, `eos`.
            sampling: temperature, top_k, top_p, generator; see `sample_next`.
        """
        was_training = self.training
        self.eval()
        B, T = ids.shape
        block_size = self.config.block_size
        room = min(block_size, T + max_new_tokens)
        cache = KVCache(self, B, room)
        text = ids[:, -block_size:]  # [B,S]
        if stop is None:
            stop = self.eos
        stop = torch.tensor(stop, dtype=torch.long).flatten()
        stopped = torch.zeros(B, dtype=torch.bool)
        try:
            for _ in range(max_new_tokens):
                if text.shape[1] > block_size:
                    cache = KVCache(self, B, room)
                    text = text[:, -max(1, block_size // 2) :]
                unread = text[:, cache.length :]
                last_hidden = self.hidden(unread, cache)[:, -1]  # [B,D]
                logits = self.logits(last_hidden)  # [B,V]
                token = sample_next(logits.float().cpu(), **sampling)
                yield token
                stopped |= torch.isin(token, stop)
                if stopped.all():
                    return
                column = token[:, None].to(ids.device)  # [B,1]
                text = torch.cat([text, column], dim=1)
        finally:
            self.train(was_training)

    def num_params(self) -> int:
        """Parameters, the tied head counted once (GPT-2 small: 124,439,808)."""
        return sum(param.numel() for param in self.parameters())

    def flops_per_token(self, T: int) -> int:
        """Training FLOPs a token at context T: 6 a weight that multiplies, plus 12 L H E T.

        The second term is attention's, without the causal halving. The head multiplies and counts;
        embedding look-ups, biases and norms do not. A forward pass is a third.
        Source: Kaplan et al. 2020; PaLM (Chowdhery et al. 2022), appendix B.
        """
        config = self.config
        weights = self.head_weight.numel()
        weights += sum(param.numel() for param in self.h.parameters() if param.dim() == 2)
        attention = 12 * config.n_layer * config.n_head * config.head_dim * T
        return 6 * weights + attention

    def save_pretrained(
        self,
        folder: Path,
        bos: int | None = None,
        eos: int | list[int] | None = None,
    ) -> None:
        """Writes a Hugging Face folder; see model/hf.py.

        Args: bos, eos: the tokens that begin and end a text, of the latter perhaps several; no
            eos: the model's own.
        """
        eos = self.eos if eos is None else eos
        hf.save(Path(folder), self.config, self.state_dict(), bos, eos, self.vocab_size)

    @classmethod
    def from_pretrained(cls, path: str | Path, key: str = "path") -> "GPT":
        """The model at a RUN, a CHECKPOINT or a Hugging Face folder, on the CPU, in its own dtype.

        Raises: UserError naming `key`: nothing there, corrupt, or a feature that this model lacks.
        """
        where = f"{key}={path}"
        folder = resolve(path, key)
        config = hf.read_model_config(folder, where)
        with torch.device("meta"):
            model = cls(config, config.vocab_size)
        weights = hf.read_weights(folder, where, config, like=model.state_dict())
        model.load_state_dict(weights, assign=True)
        model.eos = hf.read_end_tokens(folder, where)
        return model


def build_student(config: ModelConfig, vocab_size: int) -> GPT:
    """A new model, or in fp32 the one at config.init.

    Args: vocab_size: tokens of the tokenizer; the model may have more rows.
    Raises: UserError where the model has too few rows or its context is too short.
    """
    if config.init is None:
        rows = config.vocab_size or vocab_size
        if rows < vocab_size:
            rule = f"the tokenizer has {vocab_size} tokens; set as many or more, or null"
            raise UserError(f"model.vocab_size={rows}: {rule}")
        return GPT(config, rows)

    student = GPT.from_pretrained(config.init, key="model.init").float()
    student.config.dropout = config.dropout  # every module holds this one config
    longest = student.config.block_size
    if longest < config.block_size:
        rule = f"{config.init} reads at most {longest} tokens; set that or less"
        raise UserError(f"model.block_size={config.block_size}: {rule}")
    return student


def sample_next(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws the next tokens [B] from logits [B,V].

    Args:
        temperature: divides the logits; 0 (or nearly) takes the likeliest token.
        top_k: draw among the k likeliest; None: all.
        top_p: draw among the likeliest that hold this much probability (Holtzman et al. 2020).
        generator: of the logits' device; None: torch's own.
    """
    if temperature < 1e-30:  # a float divided by it could be infinite
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kth_largest = logits.topk(top_k).values[:, -1:]  # [B,1]
        logits = logits.masked_fill(logits < kth_largest, -math.inf)
    probs = logits.softmax(dim=-1)
    if top_p < 1:
        sorted_probs, order = probs.sort(dim=-1, descending=True)
        mass_before = sorted_probs.cumsum(dim=-1) - sorted_probs
        outside = mass_before >= top_p  # the token that crosses top_p stays
        outside[:, 0] = False  # however small top_p is
        probs = probs.masked_fill(outside.scatter(1, order, outside), 0.0)
    return torch.multinomial(probs, 1, generator=generator)[:, 0]
