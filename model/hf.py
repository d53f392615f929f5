"""Hugging Face folders of gpt2, llama, qwen2 and qwen3, read and written. Our checkpoints are such.

A folder holds config.json and model.safetensors (or shards with an index). A model that no family
computes (with ReLU^2, say) is written under our own names, as model_type nanodistill.

This file works on configurations and state dicts alone; GPT.from_pretrained and GPT.save_pretrained
in model/gpt.py are what to call.
"""

import json
import math
import re
from collections import ChainMap
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine import UserError, first_line
from engine.checkpoint import resolve
from model.config import ROPE_SCALINGS, ModelConfig

Tensors = dict[str, Tensor]
GENERATION_FILE = "generation_config.json"

# The fields of ModelConfig that make a family. Its other fields are free.
LLAMA = {
    "norm": "rmsnorm",
    "mlp": "swiglu",
    "bias": "none",
    "qk_norm": False,
    "logit_softcap": None,
}
GPT2 = LLAMA | {"norm": "layernorm", "mlp": "gelu", "bias": "all", "rope_theta": None}
FAMILIES = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "qwen2": LLAMA | {"bias": "qkv"},
    "qwen3": LLAMA | {"qk_norm": True},
}

# Every key of config.json that transformers' configurations of these families have is in one of
# three lists: read (GPT2_KEYS, LLAMA_KEYS and RoPE's), of one value (ALLOWED), or IRRELEVANT. Keys
# that are in none have no effect in transformers, and none here.

# Keys that change what is computed but not which weights there are, and the values that we compute.
# Of a list each element must be one of them. Null is as if the key were not there.
OFF = (None, False)
ALLOWED = {
    "model_type": (*FAMILIES, "nanodistill"),
    "quantization_config": (None,),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # one function under two names
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "hidden_act": ("silu", "swish"),  # one function under two names
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "sliding_window": (None,),
    "layer_types": ("full_attention",),
    "partial_rotary_factor": (1.0,),
    "rope_type": ("default", *ROPE_SCALINGS),
    "full_attention": (None,),  # RoPE's keys of a type of layer
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "per_layer_config": (None, {}),
    "pruned_heads": (None, {}),
    # Switches of other families: where one is on, the model is not what its model_type says.
    "attention_chunk_size": OFF,
    "attn_logit_softcapping": OFF,
    "final_logit_softcapping": OFF,
    "query_pre_attn_scalar": OFF,
    "clip_qkv": OFF,
    "alibi": OFF,
    "use_qk_norm": OFF,
    "qk_layernorm": OFF,
    "no_rope_layers": OFF,
    "no_rope_layer_interval": OFF,
    "rope_interleaved": OFF,
    "use_mrope": OFF,
    "use_bidirectional_attention": OFF,
    "use_parallel_residual": OFF,
    "parallel_attn": OFF,
    "num_experts": OFF,
    "num_local_experts": OFF,
    "n_routed_experts": OFF,
    "scale_emb": (None, 1.0),
    "logit_scale": (None, 1.0),
    "logits_scaling": (None, 1.0),
    "embedding_multiplier": (None, 1.0),
    "residual_multiplier": (None, 1.0),
    "attention_multiplier": (None, 1.0),
}
# Keys of ALLOWED that these families do not look at.
NOT_LOOKED_AT = {
    "qwen2": {"attention_bias", "sliding_window"},  # the window that use_sliding_window turns on
    "qwen3": {"sliding_window"},
}
# Keys that the logits do not depend on: names, training, generation, other heads than the language
# model's, and how the same is computed.
IRRELEVANT = """
_name_or_path architectures transformers_version dtype id2label label2id problem_type
bos_token_id eos_token_id pad_token_id use_cache output_hidden_states output_attentions return_dict
initializer_range embd_pdrop attn_pdrop max_window_layers
chunk_size_feed_forward pretraining_tp reorder_and_upcast_attn
summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout
"""

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
}
# Other names of GPT-2's keys; where both are there these count.
GPT2_ALIASES = {
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
}
# Their values where config.json lacks the key or has null. A key that is not here is required.
DEFAULTS = {
    "n_inner": None,
    "layer_norm_epsilon": 1e-5,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-6,
    "num_key_value_heads": None,
    "head_dim": None,
    "attention_dropout": 0.0,
}
# Their values where config.json lacks the key, but not where it has null.
ABSENT = {
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
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
        possible = standard_heads if name == "gpt2" else config.rope_theta is not None
        if possible and fields.items() <= vars(config).items():
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


def describe(config: ModelConfig, weight: Tensor, bos: int | None, eos) -> dict:
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
    description |= {theirs: getattr(config, ours) for ours, theirs in keys.items()}
    if model_type == "gpt2":
        dropout = config.dropout
        sizes = {"n_ctx": config.block_size, "embd_pdrop": dropout, "attn_pdrop": dropout}
        return description | {"architectures": ["GPT2LMHeadModel"], **sizes}

    description["architectures"] = [f"{model_type.title()}ForCausalLM"]
    description["rope_theta"] = config.rope_theta
    if config.rope_scaling is not None:
        scaling = dict(config.rope_scaling)
        original = "original_max_position_embeddings"
        if original in scaling:
            scaling[original] = int(scaling[original])  # transformers wants a whole number
        description["rope_scaling"] = scaling  # every version of transformers reads this form
    return description


def save(
    folder: Path,
    config: ModelConfig,
    state: Tensors,
    bos: int | None,
    eos: int | list[int] | None,
    vocab_size: int,
) -> None:
    """Writes what transformers' AutoModelForCausalLM.from_pretrained reads, in the weights' dtype.

    Args:
        config: a resolved one.
        state: our state dict.
        bos: the token that begins a text.
        eos: the token or the list of tokens that end one, or None.
        vocab_size: possible tokens; transformers' generate never draws the rows after them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(eos, list) and len(eos) < 2:  # one is written as a number
        eos = eos[0] if eos else None
    description = describe(config, state["wte.weight"], bos, eos)
    prefix = {"gpt2": "transformer.", "nanodistill": ""}.get(description["model_type"], "model.")
    tensors = {}
    for name, param in state.items():
        for theirs, tensor in to_hugging_face(config, name, param).items():
            full_name = theirs if theirs == "lm_head.weight" else prefix + theirs
            tensors[full_name] = tensor.cpu().contiguous()
    scratch = folder / ".model.tmp"
    save_file(tensors, scratch, metadata={"format": "pt"})

    scratch.replace(folder / "model.safetensors")
    for shard in folder.glob("model-*.safetensors"):  # another model's
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    (folder / "config.json").write_text(json.dumps(description, indent=1))
    generation = {"bos_token_id": bos, "eos_token_id": eos}  # what transformers' generate goes by
    padding = range(vocab_size, len(state["wte.weight"]))
    if padding:
        generation["suppress_tokens"] = list(padding)
    (folder / GENERATION_FILE).write_text(json.dumps(generation))


@contextmanager
def report_damage(where: str):
    """Turns what reading a folder raises into one line that begins with `where`, a KEY=PATH."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except (KeyError, TypeError, AttributeError, ValueError, SafetensorError) as error:
        problem = f"cannot read it ({type(error).__name__}: {first_line(error)})"
        raise UserError(f"{where}: {problem}; fetch the folder again") from None


def rope_entries(description: dict) -> dict:
    """RoPE's keys, from wherever config.json has them; without those that are null.

    As in transformers, rope_scaling (older folders have it, and model cards tell people to add it)
    replaces all of rope_parameters, its rope_theta too.
    """
    entries = description.get("rope_scaling") or description.get("rope_parameters") or {}
    entries = {key: value for key, value in entries.items() if value is not None}
    entries.setdefault("rope_type", entries.get("type", "default"))
    return entries


def read_rope(description: dict) -> dict:
    """The fields rope_theta and rope_scaling of ModelConfig, as transformers reads config.json."""
    entries = rope_entries(description)
    theta = entries.get("rope_theta") or description.get("rope_theta") or 10000.0
    kind = entries["rope_type"]
    if kind == "default":
        return {"rope_theta": theta}

    original = "original_max_position_embeddings"
    entries.setdefault(original, description["max_position_embeddings"])
    if description.get(original) is not None:
        entries[original] = description[original]
    if entries.get("mscale") and entries.get("mscale_all_dim"):
        growth = 0.1 * max(0.0, math.log(entries["factor"]))
        above = 1 + entries["mscale"] * growth
        below = 1 + entries["mscale_all_dim"] * growth
        entries.setdefault("attention_factor", above / below)

    scaling = {"rope_type": kind}
    for key in ROPE_SCALINGS[kind]:
        if key in entries:
            scaling[key] = entries[key] if key == "truncate" else float(entries[key])
    return {"rope_theta": theta, "rope_scaling": scaling}


def check_allowed(description: dict) -> None:
    """UserError for a value that would change what is computed."""
    given = description | rope_entries(description)
    not_looked_at = NOT_LOOKED_AT.get(given["model_type"], ())
    for key, allowed in ALLOWED.items():
        values = given.get(key)
        if values is None or key in not_looked_at:
            continue
        for value in values if isinstance(values, list) else [values]:
            if value not in allowed:
                known = ", ".join(map(str, allowed))
                raise UserError(f"{key}={value} is not supported; this version reads {known}")


def parse_description(description: dict) -> ModelConfig:
    """config.json as a configuration, vocab_size included. KeyError for a key that is missing.

    Raises: UserError for a value that would change what is computed.
    """
    check_allowed(description)
    model_type = description["model_type"]
    if model_type == "nanodistill":
        return ModelConfig(**description["config"])

    given = {"tie_word_embeddings": model_type == "gpt2"} | DEFAULTS
    for key, value in ABSENT.get(model_type, {}).items():
        if key not in description:
            given[key] = value
    given |= {key: value for key, value in description.items() if value is not None}
    if model_type != "gpt2":
        fields = {ours: given[theirs] for ours, theirs in LLAMA_KEYS.items()}
        return ModelConfig(**FAMILIES[model_type], **fields, **read_rope(description))
    for alias, key in GPT2_ALIASES.items():
        if alias in given:
            given[key] = given[alias]
    fields = {ours: given[theirs] for ours, theirs in GPT2_KEYS.items()}
    return ModelConfig(**FAMILIES["gpt2"], **fields)


def read_model_config(folder: Path, where: str) -> ModelConfig:
    """The resolved configuration of the model in `folder`, vocab_size included.

    Raises: UserError beginning with `where`: config.json is corrupt, or asks for what this
    transformer does not compute.
    """
    with report_damage(where):
        return parse_description(json.loads((folder / "config.json").read_text())).resolved()


def read_end_tokens(folder: Path, where: str) -> list[int]:
    """The tokens that end a text: generation_config.json's, else config.json's, if any."""
    with report_damage(where):
        for name in (GENERATION_FILE, "config.json"):
            if not (folder / name).is_file():
                continue
            eos = json.loads((folder / name).read_text()).get("eos_token_id")
            if eos is not None:
                tokens = eos if isinstance(eos, list) else [eos]
                return [int(token) for token in tokens]
    return []


def config_of_pretrained(config: ModelConfig) -> ModelConfig:
    """The shape of the model at config.init, with the block_size and dropout of `config`."""
    folder = resolve(config.init, "model.init", verify=False)
    pretrained = read_model_config(folder, f"model.init={config.init}")
    return replace(
        pretrained,
        init=config.init,
        block_size=config.block_size,
        dropout=config.dropout,
    )


def read_tensors(folder: Path) -> Tensors:
    """All weights in a folder by their names, without `transformer.` or `model.` before them."""
    files = [folder / "model.safetensors"]
    if not files[0].is_file():
        files = sorted(folder.glob("model-*.safetensors")) or files
    tensors = {}
    for path in files:
        tensors |= load_file(path)
    weights = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not BUFFERS.search(name):
            weights[name.removeprefix("transformer.").removeprefix("model.")] = tensor
    return weights


def shapes(tensors: Tensors) -> dict[str, tuple]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def read_weights(folder: Path, where: str, config: ModelConfig, like: Tensors) -> Tensors:
    """The folder's weights as our state dict, in the dtype of the embedding.

    Args:
        config: what read_model_config says of the folder.
        like: a state dict of this shape (on the device meta, say).

    Raises: UserError beginning with `where`: corrupt, or not the weights of this shape.
    """
    pieces = {name: to_hugging_face(config, name, param) for name, param in like.items()}
    wanted = shapes(ChainMap(*pieces.values()))
    with report_damage(where):
        theirs = read_tensors(folder)
        stored = shapes(theirs)

        # The head may be stored though it is the embedding
        (embedding,) = pieces["wte.weight"]
        head = theirs.get("lm_head.weight")
        if config.tied and head is not None and torch.equal(head, theirs[embedding]):
            del stored["lm_head.weight"]

        differing = [name for name, _ in stored.items() ^ wanted.items()]
        if differing:
            name = min(differing)
            rule = f"config.json says {wanted.get(name)}; not of one model, or not supported"
            raise UserError(f"{name} has shape {stored.get(name)}, {rule}")

    weights = {}
    for name, names in pieces.items():
        weight = torch.cat([theirs[piece] for piece in names])
        if family(config) == "gpt2" and TRANSPOSED.search(name):
            weight = weight.T
        weights[name] = weight.to(theirs[embedding].dtype).contiguous()
    return weights
