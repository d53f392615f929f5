"""Weights in and out: Hugging Face's GPT-2 folders (config.json, model.safetensors), which our checkpoints are too."""

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from engine import UserError
from engine.checkpoint import resolve
from model.gpt import GPT, ModelConfig

# Conv1D layers store [in, out], torch's Linear [out, in].
TRANSPOSED = re.compile(r"(c_attn|c_proj|c_fc)\.weight$")
MASKS = re.compile(r"\.attn\.(masked_)?bias$")
# Keys of config.json that change the computation, and the only value that this transformer computes.
REQUIRED = {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


def save(model: GPT, folder: Path) -> None:
    """Writes what transformers' GPT2LMHeadModel.from_pretrained reads, in the parameters' own dtype."""
    config = model.config
    described = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": model.vocab_size}
    described |= {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd}
    described |= {"n_positions": config.block_size, "n_ctx": config.block_size, "n_inner": None}
    described |= {f"{name}_pdrop": config.dropout for name in ("resid", "embd", "attn")}
    dtype = str(model.head_weight.dtype).removeprefix("torch.")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(described | REQUIRED | {"dtype": dtype}, indent=1))
    tensors = {
        f"transformer.{name}": (param.T if TRANSPOSED.search(name) else param).detach().cpu().contiguous()
        for name, param in model.state_dict().items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load(path: str | Path, key: str = "path") -> GPT:
    """The GPT-2 at `path` on the CPU, in its stored dtype; UserError naming `key` for what cannot be read."""
    folder = resolve(path, key)
    try:
        described = json.loads((folder / "config.json").read_text())
    except ValueError:
        raise UserError(f"{key}={path}: config.json is not JSON; fetch the folder again") from None
    config = read_config(described, f"{key}={path}")
    tensors = read_tensors(folder, f"{key}={path}")
    names = {name: name.removeprefix("transformer.") for name in tensors if not MASKS.search(name)}
    state = {short: tensors[name].T if TRANSPOSED.search(short) else tensors[name] for name, short in names.items()}
    head = state.pop("lm_head.weight", None)
    if head is not None and "wte.weight" in state and not torch.equal(head, state["wte.weight"]):
        raise UserError(f"{key}={path}: lm_head.weight differs from the embedding; an untied head is not supported")
    with torch.device("meta"):
        model = GPT(config, described["vocab_size"])
    for name, param in model.state_dict().items():
        if name not in state:
            raise UserError(f"{key}={path}: weights lack {name}; fetch the folder again")
        if state[name].shape != param.shape:
            got, want = tuple(state[name].shape), tuple(param.shape)
            raise UserError(f"{key}={path}: {name} has shape {got}, config.json says {want}; they are not of one model")
    unknown = sorted(set(state) - set(model.state_dict()))
    if unknown:
        raise UserError(f"{key}={path}: weights hold {unknown[0]}, which GPT-2 does not have; the model is not supported")
    model.load_state_dict({name: tensor.contiguous() for name, tensor in state.items()}, assign=True)
    return model.requires_grad_(True)


def read_config(described: dict, where: str) -> ModelConfig:
    """config.json as ModelConfig; refuses by name what would compute something else."""
    kind = described.get("model_type")
    if kind != "gpt2":
        raise UserError(f"{where}: model_type={kind} is not supported; this version reads gpt2")
    for name, value in REQUIRED.items():
        if described.get(name, value) != value:
            raise UserError(f"{where}: {name}={described[name]} is not supported; only {value} is")
    if described.get("n_inner") not in (None, 4 * described["n_embd"]):
        raise UserError(f"{where}: n_inner={described['n_inner']} is not supported; only 4 * n_embd is")
    sizes = {name: described[name] for name in ("n_layer", "n_head", "n_embd")}
    return ModelConfig(**sizes, block_size=described["n_positions"], dropout=described.get("resid_pdrop", 0.0))


def read_tensors(folder: Path, where: str) -> dict[str, torch.Tensor]:
    """All tensors of model.safetensors, or of the shards that its index names."""
    index = folder / "model.safetensors.index.json"
    shards = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    tensors = {}
    for name in shards:
        if not (folder / name).is_file():
            hint = "; convert pytorch_model.bin with transformers" if list(folder.glob("*.bin")) else ""
            raise UserError(f"{where}: {name} is missing{hint}")
        try:
            tensors |= load_file(folder / name)
        except SafetensorError as error:
            raise UserError(f"{where}: {name} is corrupt ({error}); fetch the folder again") from None
    return tensors
