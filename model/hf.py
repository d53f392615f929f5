"""Hugging Face folders of gpt2, llama, qwen2 and qwen3, read and written. Our checkpoints are such.

A folder holds config.json and model.safetensors (or shards with an index). A model that no family
computes (with ReLU^2, say) is written under our own names, as model_type nanodistill.

This file works on configurations and state dicts alone; GPT.from_pretrained and GPT.save_pretrained
in model/gpt.py are what to call.
"""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine import UserError
from engine.checkpoint import resolve
from model.config import ROPE_SCALING_KEYS, ModelConfig

Tensors = dict[str, Tensor]

# The fields of ModelConfig that make a family. Its other fields are free.
LLAMA = {"norm": "rmsnorm", "mlp": "swiglu", "bias": "none", "qk_norm": False}
FAMILIES = {
    "gpt2": {"norm": "layernorm", "mlp": "gelu", "bias": "all", "qk_norm": False},
    "llama": LLAMA,
    "qwen2": LLAMA | {"bias": "qkv"},
    "qwen3": LLAMA | {"qk_norm": True},
}

# Keys of config.json that change what is computed, and the values that we compute, the default
# first. Of a list each element must be one of them.
ALLOWED = {
    "model_type": (*FAMILIES, "nanodistill"),
    "quantization_config": (None,),
    "activation_function": ("gelu_new",),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "layer_types": ("full_attention", None),
    "partial_rotary_factor": (1.0,),
    "rope_type": ("default", "llama3"),
}

# Fields of ModelConfig by their names in config.json.
GPT2_KEYS = {
    "vocab_size": "vocab_size",
    "tied": "tie_word_embeddings",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "n_inner": "n_inner",
    "block_size": "n_positions",
    "norm_eps": "layer_norm_epsilon",
    "dropout": "resid_pdrop",
}
LLAMA_KEYS = {
    "vocab_size": "vocab_size",
    "tied": "tie_word_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_embd": "hidden_size",
    "n_inner": "intermediate_size",
    "block_size": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "n_kv_head": "num_key_value_heads",
    "head_dim": "head_dim",
    "dropout": "attention_dropout",
    "rope_theta": "rope_theta",
}
# Their values where config.json lacks the key or has null. A key that is not here is required.
GPT2_DEFAULTS = {"tied": True, "n_inner": None, "norm_eps": 1e-5, "dropout": 0.0}
LLAMA_DEFAULTS = {
    "tied": False,
    "norm_eps": 1e-6,
    "n_kv_head": None,
    "head_dim": None,
    "dropout": 0.0,
    "rope_theta": 10000.0,
}

# Llama's modules by ours. Where there are several, ours has their rows one below the other.
LLAMA_MODULES = {
    "wte": ["embed_tokens"],
    "ln_1": ["input_layernorm"],
    "attn.c_attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.q_norm": ["self_attn.q_norm"],
    "attn.k_norm": ["self_attn.k_norm"],
    "attn.c_proj": ["self_attn.o_proj"],
    "ln_2": ["post_attention_layernorm"],
    "mlp.c_fc": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.c_proj": ["mlp.down_proj"],
    "ln_f": ["norm"],
    "lm_head": ["lm_head"],
}
# GPT-2's Conv1D stores [in, out], torch's Linear [out, in].
TRANSPOSED = re.compile(r"(c_attn|c_proj|c_fc)\.weight$")
# Old folders have these among the weights.
BUFFERS = re.compile(r"(\.attn\.(masked_)?bias|rotary_emb\.inv_freq)$")


def family(config: ModelConfig) -> str:
    """The model_type that computes what `config` says, or nanodistill."""
    config = config.resolved()
    standard_heads = config.n_kv_head == config.n_head == config.n_embd / config.head_dim
    for name, fields in FAMILIES.items():
        is_gpt2 = name == "gpt2"
        same_fields = fields.items() <= vars(config).items()
        same_positions = is_gpt2 == (config.rope_theta is None)
        if same_fields and same_positions and (standard_heads or not is_gpt2):
            return name
    return "nanodistill"


def to_hugging_face(config: ModelConfig, name: str, tensor: Tensor) -> Tensors:
    """One of our tensors under their names (without `transformer.`, `model.`), turned or split."""
    model_type = family(config)
    if model_type == "nanodistill":
        return {name: tensor}
    if model_type == "gpt2":
        return {name: tensor.T if TRANSPOSED.search(name) else tensor}

    # h.3.mlp.c_fc.weight -> layers.3.mlp.gate_proj.weight and layers.3.mlp.up_proj.weight
    module, _, leaf = name.rpartition(".")
    block = ""
    if module.startswith("h."):
        _, layer, module = module.split(".", 2)
        block = f"layers.{layer}."
    names = [f"{block}{theirs}.{leaf}" for theirs in LLAMA_MODULES[module]]
    rows = len(tensor) // len(names)
    if module == "attn.c_attn":
        kv_rows = config.n_kv_head * config.head_dim
        rows = [config.n_head * config.head_dim, kv_rows, kv_rows]
    return dict(zip(names, tensor.split(rows), strict=True))


def describe(config: ModelConfig, weight: Tensor, bos: int | None, eos: int | None) -> dict:
    """config.json as `read_model_config` and transformers read it; weight: the embedding [V,D]."""
    model_type = family(config)
    config = replace(config, vocab_size=len(weight), init=None)
    description = {
        "model_type": model_type,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "bos_token_id": bos,
        "eos_token_id": eos,
    }
    if model_type == "nanodistill":
        return description | {"vocab_size": config.vocab_size, "config": asdict(config)}

    keys = GPT2_KEYS if model_type == "gpt2" else LLAMA_KEYS
    for ours, theirs in keys.items():
        description[theirs] = getattr(config, ours)
    if model_type == "gpt2":
        description["architectures"] = ["GPT2LMHeadModel"]
        description["n_ctx"] = config.block_size
        description["embd_pdrop"] = config.dropout
        description["attn_pdrop"] = config.dropout
        return description

    description["architectures"] = [f"{model_type.title()}ForCausalLM"]
    if config.rope_scaling is not None:
        scaling = {"rope_type": "llama3", **config.rope_scaling}
        original = "original_max_position_embeddings"
        scaling[original] = int(scaling[original])  # transformers wants a whole number
        description["rope_scaling"] = scaling  # every version of transformers reads this form
    return description


def save(
    folder: Path,
    config: ModelConfig,
    state: Tensors,
    bos: int | None = None,
    eos: int | None = None,
) -> None:
    """Writes what transformers' AutoModelForCausalLM.from_pretrained reads, in the weights' dtype.

    Args:
        config: a resolved one.
        state: our state dict.
        bos, eos: the tokens that begin and end a text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    description = describe(config, state["wte.weight"], bos, eos)
    (folder / "config.json").write_text(json.dumps(description, indent=1))

    prefixes = {"gpt2": "transformer.", "nanodistill": ""}
    prefix = prefixes.get(description["model_type"], "model.")
    tensors = {}
    for name, param in state.items():
        for theirs, tensor in to_hugging_face(config, name, param).items():
            full_name = theirs if theirs == "lm_head.weight" else prefix + theirs
            tensors[full_name] = tensor.detach().cpu().contiguous()
    temporary = folder / ".model.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(folder / "model.safetensors")

    # Another model's shards
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    for shard in folder.glob("model-*.safetensors"):
        shard.unlink()


def read_json(path: Path, where: str) -> dict:
    try:
        return {**json.loads(path.read_text())}
    except (OSError, ValueError, TypeError) as error:
        rule = f"{path.name} is not JSON of keys and values ({error}); fetch the folder again"
        raise UserError(f"{where}: {rule}") from None


def check_allowed(description: dict) -> None:
    """UserError for a key of config.json whose value would change what is computed."""
    for key, allowed in ALLOWED.items():
        values = description.get(key, allowed[0])
        for value in values if isinstance(values, list) else [values]:
            if value not in allowed:
                known = ", ".join(map(str, allowed))
                raise UserError(f"{key}={value} is not supported; this version reads {known}")


def parse_description(description: dict) -> ModelConfig:
    """config.json as a configuration, vocab_size included. KeyError for a key that is missing."""
    # RoPE's keys are in rope_parameters, or in rope_scaling in older folders.
    rope = description.get("rope_parameters") or description.get("rope_scaling") or {}
    description = {**description, **rope}
    description.setdefault("rope_type", description.get("type", "default"))
    check_allowed(description)

    model_type = description["model_type"]
    if model_type == "nanodistill":
        fields = description["config"] | {"vocab_size": description["vocab_size"]}
        return ModelConfig(**fields)

    keys = LLAMA_KEYS
    fields = FAMILIES[model_type] | LLAMA_DEFAULTS
    if model_type == "gpt2":
        keys = GPT2_KEYS
        fields = FAMILIES[model_type] | GPT2_DEFAULTS
    for ours, theirs in keys.items():
        value = description.get(theirs)
        if value is not None:
            fields[ours] = value
        elif ours not in fields:
            raise KeyError(theirs)
    if description["rope_type"] == "llama3":
        fields["rope_scaling"] = {key: float(description[key]) for key in ROPE_SCALING_KEYS}
    return ModelConfig(**fields)


def read_model_config(folder: Path, where: str) -> ModelConfig:
    """The resolved configuration of the model in `folder`, vocab_size included.

    Raises: UserError beginning with `where`: config.json is missing or corrupt, or asks for what
    this transformer does not compute.
    """
    description = read_json(folder / "config.json", where)
    try:
        return parse_description(description).resolved()
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        rule = f"config.json lacks a key or has a value of the wrong kind ({error})"
        raise UserError(f"{where}: {rule}; fetch the folder again") from None


def config_of_pretrained(config: ModelConfig) -> ModelConfig:
    """`config` in the shape of the model at config.init. block_size and dropout stay its own."""
    where = f"model.init={config.init}"
    folder = resolve(config.init, "model.init", verify=False)
    pretrained = read_model_config(folder, where)
    if config.vocab_size not in (None, pretrained.vocab_size):
        rule = f"{where} has {pretrained.vocab_size} rows; leave model.vocab_size unset"
        raise UserError(f"model.vocab_size={config.vocab_size}: {rule}")
    return replace(
        pretrained,
        init=config.init,
        block_size=config.block_size,
        dropout=config.dropout,
    )


def list_shards(folder: Path, where: str) -> list[Path]:
    """model.safetensors or, where there is none, the files that the index names."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.is_file() or not index.is_file():
        return [single]
    try:
        names = set(read_json(index, where)["weight_map"].values())
        return [folder / name for name in sorted(names)]
    except (KeyError, AttributeError, TypeError):
        rule = f"{index.name} names no weights; fetch the folder again"
        raise UserError(f"{where}: {rule}") from None


def read_tensors(folder: Path, where: str) -> Tensors:
    """All weights in a folder by their names, without `transformer.` or `model.` before them."""
    tensors = {}
    for path in list_shards(folder, where):
        if not path.is_file():
            has_pickle = any(folder.glob("*.bin"))
            hint = "; convert pytorch_model.bin with transformers" if has_pickle else ""
            raise UserError(f"{where}: {path.name} is missing{hint}")
        try:
            tensors |= load_file(path)
        except SafetensorError as error:
            rule = f"{path.name} is corrupt ({error}); fetch the folder again"
            raise UserError(f"{where}: {rule}") from None

    weights = {}
    for name, tensor in tensors.items():
        if not BUFFERS.search(name):
            short_name = name.removeprefix("transformer.").removeprefix("model.")
            weights[short_name] = tensor
    return weights


def check_tensor(where: str, name: str, tensor: Tensor | None, shape: torch.Size) -> None:
    """UserError unless the folder's tensor is there, in floating point and of this shape."""
    if tensor is None:
        raise UserError(f"{where}: weights lack {name}; fetch the folder again")
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        rule = "only fp32, bf16, fp16 and fp64 weights are supported"
        raise UserError(f"{where}: {name} is {tensor.dtype}; {rule}")
    if tensor.shape != shape:
        rule = f"config.json says {tuple(shape)}; they are not of one model"
        raise UserError(f"{where}: {name} has shape {tuple(tensor.shape)}, {rule}")


def read_weights(folder: Path, where: str, config: ModelConfig, like: Tensors) -> Tensors:
    """The folder's weights as our state dict, in the dtype of the embedding.

    Args:
        config: what read_model_config says of the folder.
        like: a state dict of this shape (on the device meta, say).

    Raises: UserError beginning with `where`: missing, corrupt, or not the weights of this shape.
    """
    theirs = read_tensors(folder, where)
    model_type = family(config)
    weights = {}
    for name, param in like.items():
        pieces = []
        for their_name, piece in to_hugging_face(config, name, param).items():
            tensor = theirs.pop(their_name, None)
            check_tensor(where, their_name, tensor, piece.shape)
            pieces.append(tensor)
        weight = torch.cat(pieces)
        if model_type == "gpt2" and TRANSPOSED.search(name):
            weight = weight.T
        embedding = weights.get("wte.weight", weight)  # it comes first
        weights[name] = weight.to(embedding.dtype).contiguous()

    # What is left over: the tied head, if it is stored too.
    head = theirs.pop("lm_head.weight", None)
    embedding = weights["wte.weight"]
    if head is not None and not torch.equal(head.to(embedding.dtype), embedding):
        rule = "tie_word_embeddings=true, but lm_head.weight differs from the embedding"
        raise UserError(f"{where}: {rule}; set it to false")
    if theirs:
        rule = f"which {model_type} does not have; the model is not supported"
        raise UserError(f"{where}: weights hold {min(theirs)}, {rule}")
    return weights
