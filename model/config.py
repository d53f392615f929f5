"""The shape and kind of a transformer, as a user writes it and with every size filled in."""

import math
from copy import copy
from dataclasses import dataclass
from typing import Any

from engine import UserError, check_choice, check_range, check_ranges

# RoPE stretched to a longer context than the model was first trained on, and what each kind takes,
# by the names in config.json: numbers, None where there is no default. (The key model.rope_scaling
# is of type Any because OmegaConf merges nothing into a dict that may be null.)
ROPE_SCALINGS = {
    "linear": {"factor": None},  # Chen et al. 2023
    "llama3": {  # Grattafiori et al. 2024
        "factor": None,
        "low_freq_factor": None,
        "high_freq_factor": None,
        "original_max_position_embeddings": None,
    },
    "yarn": {  # Peng et al. 2023
        "factor": None,
        "original_max_position_embeddings": None,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": True,  # whole dimensions
        "attention_factor": None,  # the paper's, from the factor
    },
}
SIZES = "n_layer n_head n_embd block_size n_kv_head head_dim n_inner vocab_size"


@dataclass
class ModelConfig:
    """A transformer's shape and kind. Unset sizes follow from n_layer, the dial: see `resolved`."""

    n_layer: int = 2  # transformer blocks
    n_head: int | None = None  # attention heads; unset: of 64 dimensions each (32 below width 256)
    n_embd: int | None = None  # width, a multiple of n_head; unset: 64 a layer (32 up to 4 layers)
    block_size: int = 128  # context, in tokens
    dropout: float = 0.0  # on embeddings, attention weights and residual branches, 0..1
    n_kv_head: int | None = None  # key/value heads, a divisor of n_head; unset: n_head
    head_dim: int | None = None  # dimensions a head; unset: n_embd / n_head
    n_inner: int | None = None  # the MLP's width; unset: 4 n_embd (swiglu: 8/3, rounded up to 64s)
    norm: str = "layernorm"  # layernorm | rmsnorm
    norm_eps: float = 1.0e-5  # added to the variance
    rope_theta: float | None = None  # RoPE's longest wavelength / 2 pi; unset: learned positions
    rope_scaling: Any = None  # {rope_type: linear | llama3 | yarn, factor: 4, ...}; unset: none
    mlp: str = "gelu"  # gelu (its tanh form, GPT-2's) | gelu_exact | swiglu | relu2
    bias: str = "all"  # which linear layers have one: all | qkv | none
    qk_norm: bool = False  # RMSNorm on each head's queries and keys
    tied: bool = True  # the output head is the token embedding
    zero_init: bool = False  # blocks start as the identity; std 1/sqrt(fan-in) instead of 0.02
    logit_softcap: float | None = None  # c: logits z become c * tanh(z / c); null: as they are
    vocab_size: int | None = None  # rows of the embedding, at least the tokenizer's; unset: as many
    init: str | None = None  # RUN | CHECKPOINT | HUGGING_FACE_FOLDER to start from, in its shape

    def __post_init__(self):
        check_ranges(self, SIZES, "model.", low=1)
        check_ranges(self, "dropout", "model.", low=0, below=1)
        check_ranges(self, "norm_eps", "model.", low=0)
        check_ranges(self, "rope_theta logit_softcap", "model.", above=0)
        check_choice("model.norm", self.norm, ("layernorm", "rmsnorm"))
        check_choice("model.mlp", self.mlp, ("gelu", "gelu_exact", "swiglu", "relu2"))
        check_choice("model.bias", self.bias, ("all", "qkv", "none"))

        shape = self.resolved()
        heads = f"model.n_head={shape.n_head}"
        if self.head_dim is None and shape.n_embd % shape.n_head:
            raise UserError(f"model.n_embd={shape.n_embd}: must be a multiple of {heads}")
        if shape.n_head % shape.n_kv_head:
            raise UserError(f"model.n_kv_head={shape.n_kv_head}: must divide {heads}")
        if self.rope_theta is not None and shape.head_dim % 2:
            raise UserError(f"model.head_dim={shape.head_dim}: must be even with model.rope_theta")
        if self.rope_scaling is not None:
            if self.rope_theta is None and self.init is None:
                raise UserError("model.rope_theta=null: model.rope_scaling needs it; try 10000")
            self.rope_scaling = complete_rope_scaling(self.rope_scaling)

    def resolved(self) -> "ModelConfig":
        """A copy in which every size is set, but for vocab_size, which is the tokenizer's."""
        config = copy(self)
        width_per_layer = 32 if self.n_layer <= 4 else 64
        config.n_embd = self.n_embd or width_per_layer * self.n_layer
        usual_head_dim = 64 if config.n_embd >= 256 else 32
        config.n_head = self.n_head or max(1, config.n_embd // usual_head_dim)
        config.n_kv_head = self.n_kv_head or config.n_head
        config.head_dim = self.head_dim or config.n_embd // config.n_head
        usual_n_inner = 4 * config.n_embd
        if self.mlp == "swiglu":
            usual_n_inner = 64 * math.ceil(config.n_embd / 24)
        config.n_inner = self.n_inner or usual_n_inner
        return config


def complete_rope_scaling(given: dict) -> dict:
    """`given` with the defaults of its kind; llama3 is meant where it names none.

    Raises: UserError for a key or a value that this kind does not take.
    """
    where = "model.rope_scaling"
    if not isinstance(given, dict):
        raise UserError(f"{where}={given}: give {{rope_type: yarn, factor: 4, ...}}, or null")
    kind = given.get("rope_type", "llama3")
    check_choice(f"{where}.rope_type", kind, tuple(ROPE_SCALINGS))
    defaults = ROPE_SCALINGS[kind]
    scaling = {"rope_type": kind, **defaults, **given}
    for key, default in defaults.items():
        value = scaling[key]
        if key == "attention_factor" and value is None:
            scaling[key] = 1 + 0.1 * max(0.0, math.log(scaling["factor"]))
        elif not isinstance(value, int | float):
            raise UserError(f"{where}.{key}={value}: rope_type={kind} needs a number")
        elif default is not True:
            check_range(f"{where}.{key}", value, above=0)
    unknown = scaling.keys() - defaults.keys() - {"rope_type"}
    if unknown:
        key = min(unknown)
        rule = f"rope_type={kind} takes {', '.join(defaults)}"
        raise UserError(f"{where}.{key}={scaling[key]}: {rule}")
    return scaling
