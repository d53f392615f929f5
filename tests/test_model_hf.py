"""GPT-2, Llama, Qwen2 and Qwen3 folders against transformers' own models.

The weights are drawn so that every setting shows: norms and biases away from ones and zeros,
embeddings of sizes from 0.001 to 1 (a wrong eps changes the small rows), the first head's queries
and keys small under a QK-norm. Measured: each setting moves the logits by 10 tolerances or more.
"""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from engine import UserError
from model import GPT, ModelConfig, build_student, hf
from model.hf import config_of_pretrained
from tests.helpers import assert_close

V = 101
# 300 positions: past original_max_position_embeddings below, and past 256, where bf16 no longer
# holds every whole number.
IDS = torch.randint(V, (2, 300), generator=torch.Generator().manual_seed(1))
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
FAR = {"rope_type": "default", "rope_theta": 500000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 50,
    "attention_factor": 1.2,
    "beta_fast": 4.0,
    "beta_slow": 0.5,
    "truncate": False,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": V,
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 48,
    "n_positions": 400,
}
SIZES = {
    "vocab_size": V,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 400,
}
BASE = SIZES | {"num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1}
OWN = BASE | {"rope_parameters": PLAIN, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
TIED = BASE | {"rope_parameters": PLAIN, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
WIDE = {"num_attention_heads": 6, "head_dim": 20}  # more than the hidden size
CASES = {
    "gpt2": GPT2,
    "llama": OWN | {"model_type": "llama", "num_key_value_heads": 4},
    "llama3": OWN | WIDE | {"model_type": "llama", "rope_parameters": LLAMA3},
    "llama_tied": TIED | {"model_type": "llama", "rope_parameters": FAR},
    "llama_linear": OWN | {"model_type": "llama", "rope_parameters": LINEAR},
    "qwen2": OWN | {"model_type": "qwen2", "rope_parameters": FAR},
    "qwen2_tied": TIED | {"model_type": "qwen2"},
    "qwen2_yarn": OWN | {"model_type": "qwen2", "rope_parameters": YARN},
    "qwen3": OWN | WIDE | {"model_type": "qwen3"},
    "qwen3_tied": TIED | {"model_type": "qwen3", "head_dim": 8},
}
every_case = pytest.mark.parametrize("case", CASES)


def build(description):
    """transformers' model of a config, in eval mode, its weights drawn anew from seed 0."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**description)).eval()
    for name, param in model.named_parameters():
        weights = param.data
        if weights.dim() == 2:
            fan_in = weights.shape[0 if "c_" in name else 1]  # GPT-2's Conv1D stores [in, out]
            weights.normal_(std=1.5 * fan_in**-0.5)
        else:
            weights.normal_(mean=1.0 if name.endswith("weight") else 0.0, std=0.3)
        if "embed_tokens" in name or "wte" in name:
            weights.mul_(torch.logspace(-3, 0, V)[torch.randperm(V)][:, None])
        if "wpe" in name:
            weights.mul_(0.01)
        if description["model_type"] == "qwen3" and ("q_proj" in name or "k_proj" in name):
            weights[: description["head_dim"]].mul_(1e-3)
    return model


@pytest.fixture
def make(tmp_path):
    """make(case, **changes) -> transformers' model and the folder that holds it."""

    def make(case, dtype=torch.float32, **changes):
        model = build(CASES[case] | changes).to(dtype)
        model.save_pretrained(tmp_path / "hf")
        return model, tmp_path / "hf"

    return make


def edit(folder, changes):
    """Rewrites keys of config.json; None drops a key."""
    path = folder / "config.json"
    description = json.loads(path.read_text()) | changes
    kept = {key: value for key, value in description.items() if value is not None}
    path.write_text(json.dumps(kept))


def to_old_form(folder):
    """config.json as most folders on the hub have it: RoPE's keys at the top, a window off."""
    description = json.loads((folder / "config.json").read_text())
    changes = dict.fromkeys(("rope_parameters", "dtype", "layer_types", "transformers_version"))
    changes["torch_dtype"] = description["dtype"]
    rope = dict(description.get("rope_parameters") or {})
    if rope:
        changes["rope_theta"] = rope.pop("rope_theta")
        changes["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    if "qwen" in description["model_type"]:
        changes |= {"sliding_window": 4, "max_window_layers": 1, "use_sliding_window": False}
    edit(folder, changes)


def read_theirs(folder):
    """transformers' reading of a folder; every tensor must be there, and no other."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype="auto"
    )
    assert not any(info.values()), info
    return model.eval()


def read_ours(folder):
    return GPT.from_pretrained(folder).eval()


@torch.no_grad()
def their_logits(model):
    return model(IDS).logits


@torch.no_grad()
def our_logits(folder):
    return read_ours(folder)(IDS)


def stored(folder):
    tensors = load_file(folder / "model.safetensors")
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def store(tensors, folder):
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def agree(actual, expected):
    assert_close(actual, expected, rtol=0, atol=1e-4)


def refused(folder, match):
    """The message is one line, `.` matches no other."""
    with pytest.raises(UserError, match=f"^teacher.path={folder}: .*{match}.*$"):
        GPT.from_pretrained(folder, key="teacher.path")


@every_case
def test_logits_equal_transformers_both_ways(make, case, tmp_path):
    theirs, folder = make(case)
    agree(our_logits(folder), their_logits(theirs))
    to_old_form(folder)
    agree(our_logits(folder), their_logits(theirs))
    ours = read_ours(folder)
    assert ours.num_params() == theirs.num_parameters()
    assert ours.config.block_size == 400
    assert {param.dtype for param in ours.parameters()} == {torch.float32}

    # Other weights, written by us
    for param in ours.parameters():
        param.data += 0.1 * param.std() * torch.randn_like(param)
    back = tmp_path / "back"
    ours.save_pretrained(back, bos=0, eos=1)
    want = ours(IDS).detach()
    assert torch.equal(our_logits(back), want)
    agree(their_logits(read_theirs(back)), want)
    assert stored(back).keys() == stored(folder).keys()
    config = AutoConfig.from_pretrained(back).to_dict()
    expected = AutoConfig.from_pretrained(folder).to_dict()
    for key in CASES[case].keys() | {"dtype", "hidden_act", "activation_function"}:
        assert config.get(key) == expected.get(key), key


@every_case
def test_bf16_stays_bf16_and_errs_as_transformers_does(make, case, tmp_path):
    _, folder = make(case, dtype=torch.bfloat16)
    exact = their_logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    ours = our_logits(folder)
    theirs = their_logits(read_theirs(folder))
    assert ours.dtype == theirs.dtype == torch.bfloat16
    our_error = (ours.float() - exact).abs().max()
    their_error = (theirs.float() - exact).abs().max()
    assert our_error <= 2 * their_error + 1e-4

    back = tmp_path / "back"
    read_ours(folder).save_pretrained(back)
    after = stored(back)
    for name, tensor in stored(folder).items():
        assert after[name].dtype == torch.bfloat16
        assert torch.equal(after[name], tensor)


def test_the_hubs_own_variants_are_read(make):
    """No `transformer.` before names, causal masks and the tied head stored, as the hub's gpt2."""
    theirs, folder = make("gpt2")
    tensors = stored(folder)
    for layer in range(2):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 400, 400)
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    tensors["ln_f.weight"] = tensors["ln_f.weight"].double()  # the embedding's dtype counts
    store(tensors, folder)
    agree(our_logits(folder), their_logits(theirs))


def test_shards_are_read_and_replaced(make):
    theirs, folder = make("llama_tied")
    want = their_logits(theirs)
    (folder / "model.safetensors").unlink()
    theirs.save_pretrained(folder, max_shard_size="100KB")
    first, *others = sorted(folder.glob("*.safetensors"))
    assert others
    agree(our_logits(folder), want)

    # Saving leaves no shards; a missing one is missed
    ours = read_ours(folder)
    first.unlink()
    refused(folder, "embed_tokens.weight has shape None, config.json says")
    ours.save_pretrained(folder)
    assert [path.name for path in folder.glob("*.safetensors*")] == ["model.safetensors"]
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"another's")  # not read beside it
    agree(our_logits(folder), want)


NOT_COMPUTED = [  # case, a key of config.json, its value
    ("llama", "model_type", "mistral"),
    ("llama", "hidden_act", "gelu"),
    ("llama", "partial_rotary_factor", 0.5),
    ("qwen2", "use_sliding_window", True),
    ("gpt2", "activation_function", "relu"),
    ("gpt2", "scale_attn_weights", False),
    ("gpt2", "quantization_config", "fp8"),
    ("gpt2", "add_cross_attention", True),
    ("llama", "is_causal", False),
    ("qwen3", "is_causal", False),
    ("llama", "attention_bias", True),
    ("llama", "mlp_bias", True),
    ("llama", "sliding_window", 4),
    ("qwen2", "attention_chunk_size", 4),
    ("llama", "final_logit_softcapping", 30.0),
    ("qwen3", "logits_scaling", 8.0),
    ("qwen2", "per_layer_config", {"0": {"num_key_value_heads": 1}}),
]
OLD_ROPE = {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
LONG_ROPE = {"rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6}
REFUSED = [  # case, what its config.json is made to say (None: the key is dropped), the message
    *[(case, {key: value}, f"{key}={value} is not") for case, key, value in NOT_COMPUTED],
    ("qwen2", {"intermediate_size": None}, "cannot read it .KeyError: 'intermediate_size'.; fetch"),
    ("gpt2", {"n_head": None}, "KeyError: 'n_head'"),
    ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "factor=None: rope_type=yarn needs a"),
    ("llama", OLD_ROPE, "rope_type=dynamic is not"),
    ("qwen2", {"rope_scaling": LONG_ROPE}, "rope_type=longrope is not"),
    ("qwen3", {"rope_parameters": {"full_attention": PLAIN}}, "full_attention=.* is not"),
    ("llama3", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "factor"),
    ("llama3", {"num_key_value_heads": 4}, "n_kv_head=4: must divide"),
    ("qwen3", {"layer_types": ["sliding_attention"]}, "layer_types=sliding_attention is not"),
    ("gpt2", {"n_layer": "two"}, "cannot read it .TypeError"),
]


@pytest.mark.parametrize("case, changes, match", REFUSED, ids=str)
def test_what_is_not_computed_is_refused_by_name(make, case, changes, match):
    _, folder = make(case)
    edit(folder, changes)
    refused(folder, match)


LLAMA_KEYS = [*hf.LLAMA_KEYS.values(), "rope_parameters"]
READ = {
    "gpt2": hf.GPT2_KEYS.values(),
    "llama": LLAMA_KEYS,
    "qwen2": LLAMA_KEYS,
    "qwen3": LLAMA_KEYS,
}
OTHER_VALUES = {bool: False, int: 2, float: 0.3}  # by the type that a key has


@pytest.mark.parametrize("model_type", READ)
def test_every_key_of_transformers_is_in_one_list(model_type):
    """A key that a newer version of transformers adds belongs in one of the three of model/hf.py.

    An irrelevant one may have any value: transformers' own logits stay the same.
    """
    case = CASES[model_type] | {"pad_token_id": 3}
    own_keys = AutoConfig.for_model(**case).to_dict()
    irrelevant = hf.IRRELEVANT.split()
    lists = [READ[model_type], hf.ALLOWED, irrelevant]
    want = their_logits(build(case))
    for key, value in own_keys.items():
        holders = [names for names in lists if key in names]
        assert len(holders) == 1, key
        if key in irrelevant and type(value) in OTHER_VALUES and key != "return_dict":
            other = OTHER_VALUES[type(value)]
            if value is False:
                other = True
            assert torch.equal(their_logits(build(case | {key: other})), want), key


THETA = {"rope_theta": 300000.0}  # beside RoPE's other keys, not among them
ORIGINAL = "original_max_position_embeddings"
CARD = {"type": "yarn", "factor": 4.0, ORIGINAL: 100}  # as model cards tell people to add it
INFERRED = YARN | {"attention_factor": None}
ROPES = [  # what config.json says of RoPE; None: the key is dropped
    {"rope_scaling": CARD},
    {"rope_scaling": CARD, **THETA},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    {"rope_scaling": LINEAR, **THETA},
    {
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_parameters": None,
        **THETA,
    },
    {"rope_scaling": LLAMA3, "rope_parameters": YARN},
    {"rope_scaling": {"type": "default"}},
    {"rope_scaling": {}, "rope_parameters": YARN},
    {
        "rope_parameters": {"rope_type": "linear", "factor": 2.0},
        **THETA,
    },
    {"rope_parameters": INFERRED | {"truncate": True}},
    {"rope_parameters": INFERRED | {"mscale": 0.7, "mscale_all_dim": 1.5}},
    {"rope_parameters": INFERRED | {"mscale": 0.0, "mscale_all_dim": 1.5}},
    {"rope_parameters": YARN | {ORIGINAL: 2}},
    {
        "rope_parameters": YARN | {"attention_factor": 1.0},
        ORIGINAL: 150,
    },
]


@pytest.mark.parametrize("case", ["llama", "qwen3"])
@pytest.mark.parametrize("changes", ROPES, ids=str)
def test_rope_is_read_as_transformers_reads_it(make, case, changes, tmp_path):
    theirs, folder = make(case)
    edit(folder, changes)
    want = their_logits(read_theirs(folder))
    if "default" not in str(changes):
        assert (want - their_logits(theirs)).abs().max() > 1e-2
    agree(our_logits(folder), want)
    read_ours(folder).save_pretrained(tmp_path / "back")
    agree(their_logits(read_theirs(tmp_path / "back")), want)


def test_gpt2s_keys_have_other_names(make):
    theirs, folder = make("gpt2")
    edit(folder, {"num_attention_heads": 6})
    want = their_logits(read_theirs(folder))
    assert not torch.equal(want, their_logits(theirs))
    agree(our_logits(folder), want)


QWEN3_SIZES = ["head_dim", "num_key_value_heads"]
SETTINGS = [  # case, what it is built with, keys of its config.json that are dropped
    ("gpt2", {"n_inner": 64, "layer_norm_epsilon": 1e-4}, []),
    ("llama", {}, ["num_key_value_heads", "head_dim", "hidden_act", "tie_word_embeddings"]),
    ("qwen2_tied", {"rms_norm_eps": 1e-6}, ["rms_norm_eps", "dtype", "use_sliding_window"]),
    ("qwen3", {}, ["rope_parameters", "attention_bias", "layer_types"]),
    ("qwen3", {"head_dim": 128, "num_attention_heads": 64, "num_key_value_heads": 32}, QWEN3_SIZES),
    ("qwen2", {"attention_bias": True, "sliding_window": 4, "is_causal": None}, []),
    ("gpt2", {"activation_function": "gelu_pytorch_tanh", "reorder_and_upcast_attn": True}, []),
    ("llama", {"hidden_act": "swish", "use_mrope": False, "rope_interleaved": False}, []),
]


@pytest.mark.parametrize("case, built, dropped", SETTINGS, ids=str)
def test_other_settings_and_defaults_are_transformers(make, case, built, dropped):
    theirs, folder = make(case, **built)
    edit(folder, dict.fromkeys(dropped))
    assert_close(their_logits(read_theirs(folder)), their_logits(theirs))
    agree(our_logits(folder), their_logits(theirs))


ATTENTION = "model.layers.0.self_attn."
DAMAGES = [  # case, a tensor, what stands in its place (None: nothing), the message
    ("gpt2", "transformer.ln_f.bias", None, r"ln_f.bias has shape None, config.json says \(48,\)"),
    ("gpt2", "transformer.wpe.weight", torch.zeros(400, 48).char(), "wpe.weight has shape None"),
    ("llama", "model.norm.weight", torch.zeros(1), r"shape \(1,\), config.json says \(48,\)"),
    (
        "llama",
        ATTENTION + "q_proj.bias",
        torch.zeros(48),
        r"\(48,\), config.json says None;",
    ),
    ("qwen2_tied", "lm_head.weight", torch.zeros(V, 48), r"lm_head.weight has shape \(101, 48\)"),
]


@pytest.mark.parametrize("case, name, tensor, match", DAMAGES, ids=range(len(DAMAGES)))
def test_tensors_that_do_not_fit_are_refused_by_name(make, case, name, tensor, match):
    _, folder = make(case)
    tensors = load_file(folder / "model.safetensors") | {name: tensor}
    if tensor is None:
        del tensors[name]
    store(tensors, folder)
    refused(folder, match)


def test_broken_folders_are_one_line(make):
    _, folder = make("qwen3")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for broken in (whole[:-4], b""):
        weights.write_bytes(broken)
        refused(folder, "cannot read it .SafetensorError: .*; fetch the folder again")
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        GPT.from_pretrained(folder)
    for broken in ("", '{"model_type": "qwen', "[]"):
        (folder / "config.json").write_text(broken)
        refused(folder, "cannot read it ")


NEW_YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 150}
OURS = {
    "relu2": ModelConfig(mlp="relu2", rope_theta=1e4, norm="rmsnorm", bias="none"),
    "softcap": ModelConfig(mlp="swiglu", rope_theta=1e4, norm="rmsnorm", logit_softcap=0.5),
    "yarn": ModelConfig(
        rope_theta=1e4, rope_scaling={k: YARN[k] for k in YARN if k != "rope_theta"}
    ),
    "head_dim": ModelConfig(head_dim=8, norm_eps=1e-3),  # GPT-2's but for the size of its heads
}


@pytest.mark.parametrize("case", OURS)
def test_a_model_of_no_family_is_written_under_our_names(case, tmp_path):
    ours = GPT(replace(OURS[case], vocab_size=150, block_size=300), 150).eval()
    ours.save_pretrained(tmp_path)
    assert '"model_type": "nanodistill"' in (tmp_path / "config.json").read_text()
    assert torch.equal(our_logits(tmp_path), ours(IDS))
    assert read_ours(tmp_path).config == ours.config


def test_a_start_has_the_models_shape_and_its_own_context_and_dropout(make):
    _, folder = make("qwen3", dtype=torch.bfloat16)
    mine = ModelConfig(init=str(folder), block_size=50, dropout=0.25)
    config = config_of_pretrained(mine)
    student = build_student(config, V)
    shape = student.config
    assert shape == replace(config, block_size=400, init=None)
    assert (shape.n_kv_head, shape.qk_norm, shape.dropout) == (2, True, 0.25)
    assert student.wte.weight.dtype == torch.float32

    mine.block_size = 401
    with pytest.raises(UserError, match=r"model.block_size=401: .*hf reads at most 400 tokens"):
        build_student(mine, 200)


ENDS = {  # config.json's, generation_config.json's, and those that end a text
    "several": ([5, 7], None, [5, 7]),
    "one": (5, None, [5]),
    "generation_wins": (5, [7, 5, 500], [7, 5, 500]),  # one of them is none of the vocabulary's
    "generation_alone": (None, [7, 5], [7, 5]),
    "none": (None, None, []),
}


@pytest.mark.parametrize("name", ENDS)
def test_every_token_that_ends_a_text_is_read_and_saved_again(name, make, tmp_path):
    config_eos, generation_eos, expected = ENDS[name]
    _, folder = make("llama")
    edit(folder, {"eos_token_id": config_eos})
    generation = folder / "generation_config.json"
    generation.unlink()
    if generation_eos:
        generation.write_text(json.dumps({"eos_token_id": generation_eos, "temperature": 0.6}))

    ours = GPT.from_pretrained(folder)
    assert ours.eos == expected
    again = tmp_path / "again"
    for eos in (None, 9, [9, 5]):
        ours.save_pretrained(again, bos=0, eos=eos)
        given = [eos] if isinstance(eos, int) else eos
        wanted = expected if eos is None else given
        assert GPT.from_pretrained(again).eos == wanted
        theirs = AutoModelForCausalLM.from_pretrained(again)
        as_written = wanted if len(wanted) > 1 else next(iter(wanted), None)
        assert theirs.generation_config.eos_token_id == as_written
        assert theirs.config.eos_token_id == as_written
    generation.write_text("{")
    with pytest.raises(UserError, match="^path=.*: cannot read it .JSONDecodeError"):
        GPT.from_pretrained(folder)
