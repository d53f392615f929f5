"""Weights in and out: Hugging Face folders of gpt2, llama, qwen2 and qwen3, which our checkpoints are too.

A folder is config.json and model.safetensors (or shards with an index). A model that is of none of these kinds (ReLU^2, say) is
written under our own names, model_type nanodistill.
"""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from engine import UserError, first_line
from engine.checkpoint import resolve
from model.gpt import GPT, SCALING, ModelConfig

# The switches that make each family; what is not named here is free.
LLAMA = {"norm": "rmsnorm", "mlp": "swiglu", "bias": "none", "qk_norm": False}
FAMILIES = {
    "gpt2": {"norm": "layernorm", "mlp": "gelu", "bias": "all", "qk_norm": False},
    "llama": LLAMA,
    "qwen2": LLAMA | {"bias": "qkv"},
    "qwen3": LLAMA | {"qk_norm": True},
}
# Keys of config.json that change the computation, and the only value (their default too) that this transformer computes.
FIXED_GPT2 = {
    "activation_function": "gelu_new",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
}
FIXED_GPT2 |= {"reorder_and_upcast_attn": False, "add_cross_attention": False}
FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
}
# Our sizes by their names in config.json; those in OPTIONAL may be missing there, or null.
SIZES_GPT2 = {
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "n_inner": "n_inner",
    "block_size": "n_positions",
}
SIZES_GPT2 |= {"norm_eps": "layer_norm_epsilon", "dropout": "resid_pdrop"}
SIZES = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_embd": "hidden_size"}
SIZES |= {
    "n_inner": "intermediate_size",
    "block_size": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
}
SIZES |= {
    "n_kv_head": "num_key_value_heads",
    "head_dim": "head_dim",
    "dropout": "attention_dropout",
}
OPTIONAL = {"n_kv_head", "head_dim", "dropout", "norm_eps"}
# Their modules by ours; where several stand, ours is their rows one below the other.
MODULES = {"wte": "embed_tokens", "ln_f": "norm", "lm_head": "lm_head"}
MODULES |= {"ln_1": "input_layernorm", "ln_2": "post_attention_layernorm"}
MODULES |= {
    "attn.c_attn": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj",
}
MODULES |= {"attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"}
MODULES |= {"mlp.c_fc": "mlp.gate_proj mlp.up_proj", "mlp.c_proj": "mlp.down_proj"}
TRANSPOSED = re.compile(
    r"(c_attn|c_proj|c_fc)\.weight$"
)  # GPT-2's Conv1D stores [in, out], torch's Linear [out, in]
PREFIX = re.compile(
    r"^(transformer|model)\."
)  # some folders have it before every name, some have not
BUFFERS = re.compile(
    r"(\.attn\.(masked_)?bias|rotary_emb\.inv_freq)$"
)  # in old folders: no weights


def family(config: ModelConfig) -> str:
    """The model_type whose computation `config` asks for, or nanodistill."""
    plain = config.kv_heads == config.n_head and config.head_size * config.n_head == config.n_embd
    for name, switches in FAMILIES.items():
        fits = (
            config.rope_theta is None and plain if name == "gpt2" else config.rope_theta is not None
        )
        if fits and all(getattr(config, key) == value for key, value in switches.items()):
            return name
    return "nanodistill"


def parts(model: GPT, kind: str, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Our tensor as theirs, by their full names: itself, turned, or split into the rows of each of their modules."""
    if kind == "nanodistill":
        return {name: tensor}
    prefix = "" if name == "lm_head.weight" else "transformer." if kind == "gpt2" else "model."
    if kind == "gpt2":
        return {prefix + name: tensor.T if TRANSPOSED.search(name) else tensor}
    block, module, leaf = re.fullmatch(r"(h\.\d+\.)?(.*)\.(\w+)", name).groups()
    names = [
        f"{prefix}{(block or '').replace('h.', 'layers.')}{theirs}.{leaf}"
        for theirs in MODULES[module].split()
    ]
    rows = model.h[0].attn.sizes if len(names) == 3 else len(tensor) // len(names)
    return dict(zip(names, tensor.split(rows), strict=True))


def describe(model: GPT, bos: int | None, eos: int | None) -> dict:
    """config.json: what `read_config` and transformers read."""
    config, kind = model.config, family(model.config)
    dtype = str(model.head_weight.dtype).removeprefix("torch.")
    found = {
        "model_type": kind,
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": config.tied,
        "dtype": dtype,
    }
    if kind == "nanodistill":
        return found | {"config": asdict(config) | {"init": None, "vocab_size": None}}
    names, fixed = (SIZES_GPT2, FIXED_GPT2) if kind == "gpt2" else (SIZES, FIXED)
    sizes = asdict(config) | {
        "n_inner": config.inner,
        "n_kv_head": config.kv_heads,
        "head_dim": config.head_size,
    }
    found |= (
        {theirs: sizes[ours] for ours, theirs in names.items()}
        | fixed
        | {"bos_token_id": bos, "eos_token_id": eos}
    )
    if kind == "gpt2":
        same = {
            "n_ctx": config.block_size,
            "embd_pdrop": config.dropout,
            "attn_pdrop": config.dropout,
        }
        return found | same | {"architectures": ["GPT2LMHeadModel"]}
    scaling = config.rope_scaling and {"rope_type": "llama3", **config.rope_scaling}
    if scaling:
        scaling[SCALING[3]] = int(scaling[SCALING[3]])  # transformers wants positions as an integer
    rope = {"rope_type": "default", **(scaling or {}), "rope_theta": config.rope_theta}
    found |= {"rope_theta": config.rope_theta, "rope_scaling": scaling, "rope_parameters": rope}
    return found | {"architectures": [f"{kind.title()}ForCausalLM"]}


def save(model: GPT, folder: Path, bos: int | None = None, eos: int | None = None) -> None:
    """Writes what transformers' AutoModelForCausalLM.from_pretrained reads, in the parameters' own dtype."""
    folder.mkdir(parents=True, exist_ok=True)
    described, tensors = describe(model, bos, eos), {}
    (folder / "config.json").write_text(json.dumps(described, indent=1))
    for name, param in model.state_dict().items():
        theirs = parts(model, described["model_type"], name, param)
        tensors |= {full: part.detach().cpu().contiguous() for full, part in theirs.items()}
    save_file(tensors, folder / ".model.tmp", metadata={"format": "pt"})
    (folder / ".model.tmp").replace(folder / "model.safetensors")
    for stale in (
        *folder.glob("model-*.safetensors"),
        *folder.glob("model.safetensors.index.json"),
    ):  # another model's shards
        stale.unlink()


def load(path: str | Path, key: str = "path") -> GPT:
    """The model at `path` on the CPU, in its embedding's dtype; UserError naming `key` for what cannot be read."""
    folder, where = resolve(path, key), f"{key}={path}"
    (model, kind), state = skeleton(folder, where), {}
    theirs = {
        PREFIX.sub("", name): tensor
        for name, tensor in read_tensors(folder, where).items()
        if not BUFFERS.search(name)
    }
    for name, param in model.state_dict().items():
        pieces = []
        for full, want in parts(model, kind, name, param).items():
            short = PREFIX.sub("", full)
            if (piece := theirs.pop(short, None)) is None:
                raise UserError(f"{where}: weights lack {short}; fetch the folder again")
            if not piece.is_floating_point() or piece.element_size() < 2:
                raise UserError(
                    f"{where}: {short} is {piece.dtype}; only fp32, bf16, fp16 and fp64 weights are supported"
                )
            if (got := tuple(piece.shape)) != (shape := tuple(want.shape)):
                raise UserError(
                    f"{where}: {short} has shape {got}, config.json says {shape}; they are not of one model"
                )
            pieces.append(piece)
        tensor = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        tensor = tensor.T if kind == "gpt2" and TRANSPOSED.search(name) else tensor
        state[name] = tensor.to(state.get("wte.weight", tensor).dtype).contiguous()
    head = theirs.pop("lm_head.weight", None)
    if head is not None and not torch.equal(
        head.to(state["wte.weight"].dtype), state["wte.weight"]
    ):
        raise UserError(
            f"{where}: tie_word_embeddings=true, but lm_head.weight differs from the embedding; set it to false"
        )
    if theirs:
        raise UserError(
            f"{where}: weights hold {min(theirs)}, which {kind} does not have; the model is not supported"
        )
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(True)


def skeleton(folder: Path, where: str) -> tuple[GPT, str]:
    """The model that config.json describes, without weights (on the device meta), and its model_type."""
    described = read_json(folder / "config.json", where)
    try:
        sizes = read_config(described, where)
        try:
            config = ModelConfig(**sizes)
        except UserError as error:  # it names keys of ours, which nobody set
            raise UserError(f"{where}: config.json: {error}") from None
        with torch.device("meta"):
            return GPT(config, described["vocab_size"]), described["model_type"]
    except KeyError as error:
        raise UserError(f"{where}: config.json lacks {error}; fetch the folder again") from None
    except (TypeError, AttributeError) as error:
        raise UserError(
            f"{where}: config.json holds a value of the wrong kind ({first_line(error)}); fetch it again"
        ) from None


def started(config: ModelConfig) -> ModelConfig:
    """`config` with the shape of the model at its `init`, whose weights are not read; block_size and dropout stay its own."""
    where = f"model.init={config.init}"
    model, _ = skeleton(resolve(config.init, "model.init", verify=False), where)
    if config.vocab_size not in (None, model.vocab_size):
        rule = f"{where} has {model.vocab_size} rows, which a start from it keeps; leave model.vocab_size unset"
        raise UserError(f"model.vocab_size={config.vocab_size}: {rule}")
    own = {
        "init": config.init,
        "block_size": config.block_size,
        "dropout": config.dropout,
        "vocab_size": model.vocab_size,
    }
    sizes = {
        "n_kv_head": model.config.kv_heads,
        "head_dim": model.config.head_size,
        "n_inner": model.config.inner,
    }
    return replace(model.config, **sizes, **own)


def read_json(file: Path, where: str) -> dict:
    try:
        return {**json.loads(file.read_text())}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{where}: {file.name} is not JSON of keys and values ({first_line(error)}); fetch the folder again"
        ) from None


def require(where: str, name: str, value, *allowed) -> None:
    """UserError unless config.json's `name` has a value that this transformer computes."""
    if value not in allowed:
        known = ", ".join(str(each) for each in allowed)
        raise UserError(f"{where}: {name}={value} is not supported; this version reads {known}")


def read_config(described: dict, where: str) -> dict:
    """config.json as ModelConfig's fields; refuses by name what would compute something else. KeyError for a missing size."""
    kind = described.get("model_type")
    if kind == "nanodistill":
        return described["config"]
    require(where, "model_type", kind, *FAMILIES)
    if described.get("quantization_config"):
        raise UserError(
            f"{where}: quantization_config is not supported; give the unquantised weights"
        )
    gpt2 = kind == "gpt2"
    for name, value in (FIXED_GPT2 if gpt2 else FIXED).items():
        require(where, name, described.get(name, value), value)
    for layer in described.get("layer_types") or []:
        require(where, "layer_types", layer, "full_attention")
    sizes = {"norm_eps": 1e-5 if gpt2 else 1e-6, "tied": described.get("tie_word_embeddings", gpt2)}
    for ours, theirs in (SIZES_GPT2 if gpt2 else SIZES).items():
        if described.get(theirs) is not None:
            sizes[ours] = described[theirs]
        elif ours not in OPTIONAL and not (gpt2 and ours == "n_inner"):
            raise KeyError(theirs)
    if not gpt2:
        rope = described.get("rope_parameters") or described.get("rope_scaling") or {}
        if any(isinstance(value, dict) for value in rope.values()):
            raise UserError(
                f"{where}: rope_parameters for each kind of layer are not supported; only one for all is"
            )
        name = rope.get("rope_type", rope.get("type", "default"))
        require(where, "rope_type", name, "default", "llama3")
        require(where, "partial_rotary_factor", described.get("partial_rotary_factor", 1.0), 1.0)
        sizes["rope_theta"] = rope.get("rope_theta", described.get("rope_theta", 10000.0))
        sizes["rope_scaling"] = (
            {key: float(rope[key]) for key in SCALING} if name == "llama3" else None
        )
    return FAMILIES[kind] | sizes


def read_tensors(folder: Path, where: str) -> dict[str, torch.Tensor]:
    """All tensors of model.safetensors or, where that is not there, of the shards that its index names."""
    index, shards, tensors = folder / "model.safetensors.index.json", ["model.safetensors"], {}
    if index.is_file() and not (folder / shards[0]).is_file():
        places = read_json(index, where).get("weight_map")
        if (
            not isinstance(places, dict)
            or not places
            or not all(isinstance(name, str) for name in places.values())
        ):
            raise UserError(f"{where}: {index.name} names no weights; fetch the folder again")
        shards = sorted(set(places.values()))
    for name in shards:
        if not (folder / name).is_file():
            hint = (
                "; convert pytorch_model.bin with transformers"
                if list(folder.glob("*.bin"))
                else ""
            )
            raise UserError(f"{where}: {name} is missing{hint}")
        try:
            tensors |= load_file(folder / name)
        except SafetensorError as error:
            raise UserError(
                f"{where}: {name} is corrupt ({error}); fetch the folder again"
            ) from None
    return tensors
