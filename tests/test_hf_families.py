"""GPT-2, Llama, Qwen2 and Qwen3 folders against transformers' own models: logits, gradients, caches, saving, refusals.

The weights are drawn so that every setting shows: norms and biases away from ones and zeros, embeddings of sizes from
0.001 to 1 (a wrong eps changes the small rows), the first head's queries and keys small under a QK-norm. That they do
is asserted (test_the_reference_feels_every_setting).

Shapes: B rows, T positions, D hidden size, V vocabulary size.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from engine import UserError
from model import GPT
from model.gpt import KVCache as Cache
from tests.helpers import assert_close

V, T = 101, 75  # 75 positions: past both original_max_position_embeddings below
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_8 = LLAMA3 | {"rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 32}
LLAMA3_32 = LLAMA3 | {
    "rope_theta": 500000.0,
    "factor": 32.0,
    "original_max_position_embeddings": 64,
}
SIZES = {
    "vocab_size": V,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
BASE = SIZES | {
    "num_key_value_heads": 2,
    "max_position_embeddings": 400,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
OWN = BASE | {"rope_parameters": PLAIN, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
TIED = BASE | {"rope_parameters": PLAIN, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
WINDOW = {"sliding_window": 4, "max_window_layers": 1}
CASES = {
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": V,
        "n_layer": 2,
        "n_head": 4,
        "n_embd": 48,
        "n_positions": 400,
    },
    "llama": OWN | {"model_type": "llama", "num_key_value_heads": 4, "rms_norm_eps": 1e-5},
    "llama3": OWN
    | {
        "model_type": "llama",
        "num_attention_heads": 6,
        "head_dim": 12,
        "rope_parameters": LLAMA3_8,
    },
    "llama3_tied": TIED | {"model_type": "llama", "head_dim": 16, "rope_parameters": LLAMA3_32},
    "qwen2": OWN | {"model_type": "qwen2", "rope_parameters": PLAIN | {"rope_theta": 500000.0}},
    "qwen2_tied": TIED | {"model_type": "qwen2"},
    "qwen3": OWN | {"model_type": "qwen3", "num_attention_heads": 6, "head_dim": 20},
    "qwen3_tied": TIED | {"model_type": "qwen3", "head_dim": 8},
}
every_case = pytest.mark.parametrize("case", CASES)
both_forms = pytest.mark.parametrize("form", ["new", "old"])


def label(value):
    return json.dumps(value) if isinstance(value, dict) else value


def build(described):
    """transformers' model of a config, in eval mode, its weights drawn anew from seed 0."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**described)).eval()
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.dim() == 2:
                fan_in = (
                    param.shape[0] if "c_" in name else param.shape[1]
                )  # GPT-2's Conv1D stores [in, out]
                param.normal_(std=1.5 * fan_in**-0.5)
            else:
                param.normal_(
                    mean=1.0 if name.endswith("weight") else 0.0, std=0.3
                )  # a norm's weight, or a bias
            if "embed_tokens" in name or "wte" in name:
                param.mul_(torch.logspace(-3, 0, V)[torch.randperm(V)][:, None])
            if "wpe" in name:
                param.mul_(0.01)
            if described["model_type"] == "qwen3" and ("q_proj" in name or "k_proj" in name):
                param[: described["head_dim"]].mul_(1e-3)
    return model


def edit(folder, **fields):
    """Rewrite keys of config.json; None drops a key."""
    described = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(
        json.dumps({name: value for name, value in described.items() if value is not None})
    )


def to_old_form(folder):
    """config.json as most folders on the hub have it: rope_theta and rope_scaling at the top, torch_dtype, a window off."""
    described = json.loads((folder / "config.json").read_text())
    rope = described.pop("rope_parameters", None)
    if rope:
        described["rope_theta"] = rope.pop("rope_theta")
        described["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    described["torch_dtype"] = described.pop("dtype")
    if described["model_type"] in ("qwen2", "qwen3"):
        described |= WINDOW | {"use_sliding_window": False}
    for newer in ("layer_types", "transformers_version", "pad_token_id"):
        described.pop(newer, None)
    (folder / "config.json").write_text(json.dumps(described))


def read_back(folder):
    """transformers' reading of a folder; every tensor must be there, and no other."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype="auto"
    )
    assert not any(info.values()), info
    return model.eval()


def draw_ids(rows=2, length=T):
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(1))


def plain_names(tensors):
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def stored(folder):
    return plain_names(load_file(folder / "model.safetensors"))


@pytest.fixture
def make(tmp_path):
    """make(case, **changes) -> transformers' model and the folder that holds it."""

    def make(case, dtype=torch.float32, **changes):
        model = build(CASES[case] | changes).to(dtype)
        model.save_pretrained(tmp_path / "hf")
        return model, tmp_path / "hf"

    return make


def refused(folder, match):
    with pytest.raises(UserError, match=match) as caught:
        GPT.from_pretrained(folder)
    assert "\n" not in str(caught.value), "more than one line"


@both_forms
@every_case
@torch.no_grad()
def test_logits_equal_transformers(make, case, form):
    theirs, folder = make(case)
    if form == "old":
        to_old_form(folder)
        assert_close(
            read_back(folder)(draw_ids()).logits, theirs(draw_ids()).logits
        )  # the rewriting says the same
    ours = GPT.from_pretrained(folder).eval()
    want = theirs(draw_ids(), output_hidden_states=True)
    assert_close(ours(draw_ids()), want.logits, rtol=0, atol=1e-4)
    assert_close(ours.hidden(draw_ids()), want.hidden_states[-1], rtol=0, atol=1e-4)
    assert_close(ours.hidden(draw_ids()) @ ours.head_weight.T, want.logits, rtol=0, atol=1e-4)
    assert (
        ours.vocab_size == V
        and ours.config.block_size == 400
        and ours.num_params() == theirs.num_parameters()
    )
    assert {(param.dtype, param.device.type) for param in ours.parameters()} == {
        (torch.float32, "cpu")
    }


@pytest.mark.parametrize("case", [case for case in CASES if case != "gpt2"])
@torch.no_grad()
def test_the_reference_feels_every_setting(case):
    """Without this a test of equality could pass with a setting ignored. Its effect is 10 tolerances at the least."""
    described = CASES[case]
    others = [
        {"rms_norm_eps": 1.1e-5 - described["rms_norm_eps"]}
    ]  # 1e-5 for 1e-6 and the other way
    ropes = {"rope_theta": 20000.0}
    if described["rope_parameters"]["rope_type"] == "llama3":
        ropes |= {
            "rope_type": "default",
            "factor": 4.0,
            "low_freq_factor": 0.5,
            "high_freq_factor": 8.0,
        }
        ropes |= {"original_max_position_embeddings": 40}
    others += [
        {"rope_parameters": described["rope_parameters"] | {name: ropes[name]}} for name in ropes
    ]
    model = build(described)
    want = model(draw_ids()).logits
    for other in others:
        assert (build(described | other)(draw_ids()).logits - want).abs().max() > 1e-3, other
    if described["model_type"] == "qwen3":
        for norm in (
            model.model.layers[1].self_attn.q_norm,
            model.model.layers[1].self_attn.k_norm,
        ):
            norm.variance_epsilon *= 10
            assert (model(draw_ids()).logits - want).abs().max() > 1e-3
            norm.variance_epsilon /= 10


@pytest.fixture
def shards(make):
    """A folder in shards, their files, and the logits that transformers computes from it."""
    theirs, folder = make("llama3_tied")
    (folder / "model.safetensors").unlink()
    theirs.save_pretrained(folder, max_shard_size="100KB")
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 1
    return folder, files, theirs(draw_ids()).logits.detach()


@torch.no_grad()
def test_shards_are_read_or_named(shards):
    folder, files, want = shards
    assert_close(GPT.from_pretrained(folder).eval()(draw_ids()), want, rtol=0, atol=1e-4)
    files[0].rename(folder / "elsewhere")
    refused(folder, files[0].name)
    (folder / "elsewhere").rename(files[0])
    index = folder / "model.safetensors.index.json"
    maps = [
        json.dumps({"weight_map": places})
        for places in ([files[0].name], {"a": 3}, {"a": ["b"]}, {"a": None}, "x")
    ]
    for broken in (index.read_text()[:-9], "{}", "[]", *maps):
        index.write_text(broken)
        refused(folder, index.name)


def test_sizes_that_contradict_each_other_are_of_the_folder(make):
    _, folder = make("llama")
    edit(folder, num_attention_heads=3, num_key_value_heads=2, head_dim=16)
    refused(folder, r"^path=.*/hf: model.n_kv_head=2: must divide model.n_head=3")


@torch.no_grad()
def test_a_single_file_beside_shards_is_the_one_that_transformers_reads(shards):
    folder, _, want = shards
    theirs = read_back(folder)
    theirs.model.norm.weight.mul_(2.0)
    save_file(
        {
            name: tensor.clone()
            for name, tensor in theirs.state_dict().items()
            if name != "lm_head.weight"
        },
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    got = GPT.from_pretrained(folder).eval()(draw_ids())
    assert_close(got, read_back(folder)(draw_ids()).logits, rtol=0, atol=1e-4)
    assert (got - want).abs().max() > 1e-2


@pytest.mark.parametrize(
    "case, name",
    [("qwen3", "model.norm.weight"), ("llama", "lm_head.weight"), ("gpt2", "ln_f.bias")],
)
@torch.no_grad()
def test_a_tensor_of_another_dtype_is_taken_in_the_embeddings(make, case, name):
    _, folder = make(case, dtype=torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    full = name if name in tensors else f"transformer.{name}"
    save_file(
        tensors | {full: tensors[full].float()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    ours = GPT.from_pretrained(folder).eval()
    assert {param.dtype for param in ours.parameters()} == {torch.bfloat16}
    assert ours(draw_ids()).dtype == read_back(folder)(draw_ids()).logits.dtype == torch.bfloat16


@torch.no_grad()
def test_saving_over_shards_leaves_none_to_be_read(shards):
    folder, _, _ = shards
    ours = GPT.from_pretrained(folder).eval()
    for param in ours.parameters():
        param.mul_(1.1)
    ours.save_pretrained(folder)
    assert_close(read_back(folder)(draw_ids()).logits, ours(draw_ids()), rtol=0, atol=1e-4)
    assert torch.equal(GPT.from_pretrained(folder).eval()(draw_ids()), ours(draw_ids()))


@every_case
@torch.no_grad()
def test_generation_is_transformers_greedy_generation(make, case):
    theirs, folder = make(case)
    ours, ids = GPT.from_pretrained(folder), draw_ids(length=21)
    drawn = torch.stack(list(ours.generate(ids, 40, temperature=0)), dim=1)
    theirs.generation_config.eos_token_id = None  # it goes on after the end of a document
    assert torch.equal(
        drawn, theirs.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=0)[:, 21:]
    )
    assert torch.equal(drawn, ours.eval()(torch.cat([ids, drawn], dim=1))[:, 20:-1].argmax(-1))


@every_case
@torch.no_grad()
def test_cached_hidden_states_in_ragged_parts(make, case):
    ours, ids = GPT.from_pretrained(make(case)[1]).eval(), draw_ids()
    cache = Cache(ours, 2)
    parts = [ours.hidden(part, cache) for part in ids.split([1, 29, 1, 43, 1], dim=1)]
    assert_close(torch.cat(parts, dim=1), ours.hidden(ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", ["gpt2", "llama3", "llama3_tied", "qwen2", "qwen3"])
@torch.no_grad()
def test_documents_in_one_block_are_documents_alone(make, case):
    ours, ids = GPT.from_pretrained(make(case)[1]).eval(), draw_ids(rows=3)
    lengths = [[1, 30, 44], [75], [40, 1, 1, 33]]
    documents = torch.stack(
        [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths]
    )
    packed = ours.hidden(ids, document_ids=documents)
    for row, cuts in enumerate(lengths):
        alone = [ours.hidden(part[None]) for part in ids[row].split(cuts)]
        assert_close(packed[row], torch.cat(alone, dim=1)[0], rtol=0, atol=1e-4)
    assert torch.equal(
        packed, ours.hidden(ids, document_ids=documents.int() * 2 + 3)
    )  # any numbers, any whole type
    assert (packed - ours.hidden(ids))[0, 1:].abs().amax(
        -1
    ).min() > 1e-2  # without them every later token is another


@every_case
def test_gradients_equal_transformers(make, case, tmp_path):
    """Each of our parameters is replaced by its gradient and saved: the file's names say whose gradient it is."""
    theirs, folder = make(case)
    ours, ids = GPT.from_pretrained(folder).eval(), draw_ids()
    for logits in (ours(ids), theirs(ids).logits):
        torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        ).backward()
    for param in ours.parameters():
        param.data = param.grad
    ours.save_pretrained(tmp_path / "grads")
    got, want = (
        stored(tmp_path / "grads"),
        plain_names({name: param.grad for name, param in theirs.named_parameters()}),
    )
    assert got.keys() == want.keys()
    for name, grad in want.items():
        assert grad.abs().max() > 1e-6, name
        assert_close(got[name], grad, rtol=0, atol=1e-4 * grad.abs().max().item())


@both_forms
@every_case
@torch.no_grad()
def test_saved_folders_are_read_back(make, case, form, tmp_path):
    _, folder = make(case)
    if form == "old":
        to_old_form(folder)
    ours = GPT.from_pretrained(folder).eval()
    for param in ours.parameters():
        param.add_(torch.randn_like(param) * 0.1 * param.std())
    ours.save_pretrained(tmp_path / "back")
    want, theirs, again = (
        ours(draw_ids()),
        read_back(tmp_path / "back"),
        GPT.from_pretrained(tmp_path / "back").eval(),
    )
    assert_close(theirs(draw_ids()).logits, want, rtol=0, atol=1e-4)
    assert torch.equal(again(draw_ids()), want)
    before, after = (
        AutoConfig.from_pretrained(place).to_dict() for place in (folder, tmp_path / "back")
    )
    derived = {
        "dtype",
        "tie_word_embeddings",
        "hidden_act",
        "activation_function",
        "layer_norm_epsilon",
    }
    for name in CASES[case].keys() - {"bos_token_id", "eos_token_id"} | derived:
        assert before.get(name) == after.get(name), name
    tensors = stored(tmp_path / "back")
    assert tensors.keys() == stored(folder).keys()
    assert ("lm_head.weight" in tensors) != CASES[case].get("tie_word_embeddings", True)


@every_case
@torch.no_grad()
def test_bf16_stays_bf16_and_errs_as_transformers_does(make, case, tmp_path):
    """300 positions: beyond 256, where bf16 no longer holds every whole number."""
    _, folder = make(case, dtype=torch.bfloat16)
    ours, theirs, ids = GPT.from_pretrained(folder).eval(), read_back(folder), draw_ids(length=300)
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits
    assert (
        {param.dtype for param in ours.parameters()}
        == {ours(ids).dtype, theirs(ids).logits.dtype}
        == {torch.bfloat16}
    )
    got, reference = ours(ids).float() - exact, theirs(ids).logits.float() - exact
    assert got.abs().max() <= 2 * reference.abs().max() + 1e-4
    assert got.square().mean().sqrt() <= 2 * reference.square().mean().sqrt() + 1e-4
    ours.save_pretrained(tmp_path / "back")
    before, after = stored(folder), stored(tmp_path / "back")
    assert AutoConfig.from_pretrained(tmp_path / "back").dtype == torch.bfloat16
    assert before.keys() == after.keys() and {tensor.dtype for tensor in after.values()} == {
        torch.bfloat16
    }
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert_close(ours.float()(ids), exact, rtol=0, atol=1e-4)  # nothing but the weights was rounded


ACCESS_KINDS = ("yarn", "linear", "dynamic", "longrope")
SCALED = {
    "factor": 2.0,
    "original_max_position_embeddings": 32,
    "short_factor": [1.0] * 6,
    "long_factor": [2.0] * 6,
}
MIXED = ["full_attention", "sliding_attention"]
REFUSED = [  # case, what its config.json is made to say (None: the key is dropped), what the message names
    ("llama", {"model_type": "mistral"}, "mistral"),
    *[("llama", {"rope_scaling": SCALED | {"rope_type": kind}}, kind) for kind in ACCESS_KINDS],
    *[("qwen2", {"rope_scaling": SCALED | {"type": kind}}, kind) for kind in ACCESS_KINDS],
    *[
        ("qwen3", {"rope_parameters": SCALED | {"rope_type": kind, "rope_theta": 1e4}}, kind)
        for kind in ACCESS_KINDS
    ],
    *[(case, WINDOW | {"use_sliding_window": True}, "sliding") for case in ("qwen2", "qwen3")],
    ("qwen2", WINDOW | {"layer_types": MIXED, "use_sliding_window": True}, "sliding"),
    ("qwen3", {"sliding_window": 4, "layer_types": MIXED}, "sliding"),
    *[
        (case, {"quantization_config": {"quant_method": "fp8"}}, "quantization")
        for case in ("gpt2", "llama", "qwen3")
    ],
    *[(case, {"hidden_act": "gelu"}, "hidden_act") for case in ("llama", "qwen2", "qwen3")],
    ("gpt2", {"activation_function": "relu"}, "activation_function"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    *[
        (case, {"vocab_size": V - 1}, "vocab_size|embed_tokens|wte")
        for case in ("gpt2", "llama", "qwen2_tied")
    ],
    *[
        (case, {"vocab_size": V + 1}, "vocab_size|embed_tokens|wte")
        for case in ("gpt2", "llama", "qwen2_tied")
    ],
    *[("qwen2", {name: None}, name) for name in SIZES],
    *[
        ("gpt2", {name: None}, name)
        for name in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
    ],
    ("llama", {"num_hidden_layers": 3}, r"layers\.2|num_hidden_layers"),
    ("llama", {"num_hidden_layers": 1}, r"layers\.1|num_hidden_layers"),
    ("llama3", {"num_key_value_heads": 3}, "k_proj|v_proj|num_key_value_heads"),
    ("llama3", {"num_key_value_heads": 4}, "num_key_value_heads|n_kv_head|_proj"),  # 6 heads over 4
    ("llama3", {"head_dim": 10}, "_proj|head_dim"),
    ("llama3", {"rope_scaling": LLAMA3}, "factor"),
    ("llama3_tied", {"tie_word_embeddings": False}, "lm_head"),
]


@pytest.mark.parametrize("case, changes, match", REFUSED, ids=label)
def test_what_is_not_computed_is_refused_by_name(make, case, changes, match):
    _, folder = make(case)
    if "rope_parameters" not in changes:
        to_old_form(folder)
    edit(folder, **changes)
    refused(folder, match)


HALF, WHOLE = (PLAIN | {"partial_rotary_factor": share} for share in (0.5, 1.0))
EITHER = [  # case, what it is built with, what its config.json is then made to say
    ("gpt2", {"n_inner": 64}, {}),
    ("gpt2", {"n_inner": 192}, {}),
    ("gpt2", {"layer_norm_epsilon": 1e-4}, {}),
    ("gpt2", {}, {"activation_function": "gelu_pytorch_tanh"}),
    ("gpt2", {}, {"scale_attn_weights": False}),
    *[("llama", {name: True}, {}) for name in ("attention_bias", "mlp_bias")],
    ("qwen3", {"attention_bias": True}, {}),
    ("qwen2", {}, WINDOW | {"use_sliding_window": True, "max_window_layers": 2}),
    *[("llama", {}, {"rope_parameters": rope}) for rope in (HALF, WHOLE)],
    *[
        ("llama", {}, {name: None})
        for name in ("num_key_value_heads", "head_dim", "hidden_act", "tie_word_embeddings")
    ],
    *[
        ("llama3", {}, {name: None})
        for name in ("rms_norm_eps", "rope_parameters", "attention_bias", "mlp_bias")
    ],
    *[
        ("qwen2", {}, {name: None})
        for name in ("rms_norm_eps", "rope_parameters", "tie_word_embeddings", "dtype")
    ],
    *[
        ("qwen3", {}, {name: None})
        for name in ("rms_norm_eps", "rope_parameters", "attention_bias", "layer_types")
    ],
]


@pytest.mark.parametrize("case, built, changes", EITHER, ids=label)
@torch.no_grad()
def test_other_settings_are_computed_or_refused_by_name(make, case, built, changes):
    """The reference is transformers' reading of the same folder: a default, too, may be taken or refused, not missed."""
    _, folder = make(case, **built)
    edit(folder, **changes)
    want = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()(draw_ids()).logits
    try:
        ours = GPT.from_pretrained(folder).eval()
    except UserError as error:
        words = built.keys() | changes.keys() | {"sliding", "partial_rotary_factor"}
        assert any(word in str(error) for word in words) and "\n" not in str(error), str(error)
    else:
        assert_close(ours(draw_ids()), want, rtol=0, atol=1e-4)


LAYER = "model.layers.0."
DAMAGES = [  # case, tensors' new shapes (None: dropped); the message names one of them
    *[
        ("llama", {name: None})
        for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight")
    ],
    ("qwen2", {LAYER + "self_attn.k_proj.bias": None}),
    ("qwen3", {LAYER + "self_attn.q_norm.weight": None}),
    ("gpt2", {"transformer.ln_f.bias": None}),
    ("llama", {LAYER + "self_attn.v_proj.weight": (24, 48)}),
    ("llama", {LAYER + "self_attn.k_proj.weight": (48, 47)}),
    (
        "llama",
        {LAYER + "self_attn.k_proj.weight": (60, 48), LAYER + "self_attn.v_proj.weight": (36, 48)},
    ),  # the sum is right
    ("llama", {LAYER + "mlp.gate_proj.weight": (70, 48), LAYER + "mlp.up_proj.weight": (90, 48)}),
    ("llama", {LAYER + "mlp.down_proj.weight": (80, 48)}),  # transposed
    ("llama", {LAYER + "input_layernorm.weight": (1,)}),  # it would broadcast
    ("llama", {"lm_head.weight": (V + 1, 48)}),
    ("qwen3", {LAYER + "self_attn.k_norm.weight": (1,)}),
    ("llama", {LAYER + "self_attn.q_proj.bias": (48,)}),  # from here on: tensors that are too many
    ("llama", {LAYER + "self_attn.q_norm.weight": (12,)}),
    ("qwen2", {LAYER + "self_attn.o_proj.bias": (48,)}),
    ("qwen2_tied", {"lm_head.weight": (V, 48)}),  # another head than the tied one
    ("gpt2", {"transformer.h.0.attn.c_more.weight": (3,)}),
]


@pytest.mark.parametrize("case, shapes", DAMAGES, ids=label)
def test_tensors_that_do_not_fit_are_refused_by_name(make, case, shapes):
    _, folder = make(case)
    tensors = load_file(folder / "model.safetensors")
    changed = tensors | {name: torch.zeros(shape) for name, shape in shapes.items() if shape}
    kept = {name: tensor for name, tensor in changed.items() if shapes.get(name, ()) is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, "|".join(".".join(name.split(".")[-2:]) for name in shapes))


@pytest.mark.parametrize("case", ["gpt2", "qwen3"])
def test_broken_folders_are_one_line(make, case):
    theirs, folder = make(case)
    file, config = folder / "model.safetensors", (folder / "config.json").read_text()
    whole = file.read_bytes()
    for broken in (whole[:1000], whole[:-4], b"", b"not safetensors at all"):
        file.write_bytes(broken)
        refused(folder, "model.safetensors")
    file.unlink()
    refused(folder, "model.safetensors")
    torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin")
    file.write_bytes(whole)
    GPT.from_pretrained(folder)  # beside a safetensors file the .bin is no trouble
    (folder / "config.json").unlink()
    refused(folder, "config.json")
    refused(folder / "nowhere", "nowhere")
    for broken in ("{", "", config[:-9], "[]", "null"):
        (folder / "config.json").write_text(broken)
        refused(folder, "config.json")
