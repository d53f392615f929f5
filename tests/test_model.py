"""GPT-2 against transformers' own, its cache, its counts, its refusals."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from engine import UserError
from model import GPT, ModelConfig, gpt
from model.gpt import KVCache as Cache
from model.gpt import sample_next as draw
from tests.helpers import assert_close

SMALL = ModelConfig(n_layer=3, n_head=4, n_embd=32, block_size=24)


@pytest.fixture
def theirs(tmp_path):
    config = GPT2Config(
        vocab_size=97,
        n_layer=3,
        n_head=4,
        n_embd=32,
        n_positions=24,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config).eval()
    for param in model.parameters():  # biases and norms away from their initial zeros and ones
        param.data.add_(torch.randn_like(param) * 0.1)
    model.save_pretrained(tmp_path / "hf")
    return model


@pytest.fixture
def ids():
    return torch.randint(97, (2, 24))


GROUPED = ModelConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, block_size=24, rope_theta=1e4)


def hidden_and_gradients(model, ids, documents):
    hidden = model.hidden(ids, document_ids=documents)
    gradients = torch.autograd.grad(hidden.square().sum(), list(model.h.parameters()))
    return hidden, *gradients


@pytest.mark.parametrize("masked", [False, True])
def test_repeated_heads_attend_as_groups_do(ids, masked, monkeypatch):
    model = GPT(GROUPED, 97)
    documents = None
    if masked:
        documents = (ids % 5 == 0).cumsum(1)
    grouped = hidden_and_gradients(model, ids, documents)
    monkeypatch.setattr(gpt, "reads_grouped_heads", lambda query, mask: False)
    repeated = hidden_and_gradients(model, ids, documents)
    for one, other in zip(grouped, repeated, strict=True):
        assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "dtype, masked, head_dim, heads",
    [
        (torch.bfloat16, False, 64, 2),  # flash attention takes groups
        (torch.bfloat16, True, 64, 4),
        (torch.float32, False, 64, 4),
        (torch.bfloat16, False, 264, 4),
    ],
)
def test_heads_are_repeated_on_cuda_without_flash(ids, dtype, masked, head_dim, heads, monkeypatch):
    attend, reads_grouped_heads, seen = F.scaled_dot_product_attention, gpt.reads_grouped_heads, []

    def look(query, key, value, **options):
        seen.append((key.shape[1], value.shape[1], options["enable_gqa"]))
        return attend(query, key, value, **options)

    def as_on_cuda(query, mask):
        cuda = torch.device("cuda")
        return reads_grouped_heads(
            SimpleNamespace(device=cuda, dtype=query.dtype, shape=query.shape), mask
        )

    monkeypatch.setattr(F, "scaled_dot_product_attention", look)
    monkeypatch.setattr(gpt, "reads_grouped_heads", as_on_cuda)
    model = GPT(replace(GROUPED, head_dim=head_dim), 97).to(dtype)
    model.hidden(ids, document_ids=ids if masked else None)
    assert seen == [(heads, heads, heads == 2)] * 2


def test_the_attention_kernel_is_the_one_that_pytorch_would_take(monkeypatch):
    cpu = torch.device("cpu")
    assert gpt.attention_kernel(GROUPED, cpu, torch.float32, masked=True) == "flash"
    dropping = replace(GROUPED, dropout=0.1)
    assert gpt.attention_kernel(dropping, cpu, torch.float32, masked=True) == "math"
    asked = []

    def choose(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa):
        asked.append((query.dtype, key.shape, attn_mask, is_causal, enable_gqa))
        return 3

    monkeypatch.setattr(torch, "_fused_sdp_choice", choose)
    assert gpt.attention_kernel(GROUPED, cpu, torch.bfloat16, masked=False) == "cudnn"
    assert asked == [(torch.bfloat16, (1, 2, 24, 8), None, True, True)]


def test_logits_equal_transformers_both_ways(theirs, ids, tmp_path):
    ours = GPT.from_pretrained(tmp_path / "hf").eval()
    want = theirs(ids).logits
    assert_close(ours(ids), want, rtol=0, atol=1e-5)
    ours.save_pretrained(tmp_path / "back")
    back = GPT2LMHeadModel.from_pretrained(tmp_path / "back").eval()
    assert_close(back(ids).logits, want, rtol=0, atol=1e-6)
    assert back.config.vocab_size == 97 and back.config.n_positions == 24


def test_the_hubs_own_variants_are_read(theirs, ids, tmp_path):
    """No `transformer.` prefix, causal masks stored, the tied head stored too: as the hub's gpt2 folder is."""
    tensors = {
        name.removeprefix("transformer."): tensor.contiguous()
        for name, tensor in load_file(tmp_path / "hf/model.safetensors").items()
    }
    for layer in range(3):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 24, 24)
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    save_file(tensors, tmp_path / "hf/model.safetensors")
    assert_close(
        GPT.from_pretrained(tmp_path / "hf").eval()(ids), theirs(ids).logits, rtol=0, atol=1e-5
    )


def test_sharded_and_bf16_folders(theirs, ids, tmp_path):
    theirs.bfloat16().save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    ours = GPT.from_pretrained(tmp_path / "shards").eval()
    assert {param.dtype for param in ours.parameters()} == {torch.bfloat16}
    assert_close(ours.float()(ids), theirs.float()(ids).logits, rtol=0, atol=1e-5)


REFUSED = {
    "model_type": "mistral",
    "activation_function": "relu",
    "scale_attn_by_inverse_layer_idx": True,
    "reorder_and_upcast_attn": True,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_compute_something_else_is_refused_by_name(theirs, tmp_path, name):
    file = tmp_path / "hf/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: REFUSED[name]}))
    with pytest.raises(UserError, match=rf"teacher.path=.*{name}={REFUSED[name]} is not supported"):
        GPT.from_pretrained(tmp_path / "hf", key="teacher.path")


WRONG_KINDS = {"n_layer": "two", "n_head": 4.0, "layer_norm_epsilon": "1e-5"}


@pytest.mark.parametrize("name", WRONG_KINDS)
def test_values_of_the_wrong_kind_are_one_line(theirs, tmp_path, name):
    file = tmp_path / "hf/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: WRONG_KINDS[name]}))
    with pytest.raises(UserError, match=r"config.json holds a value of the wrong kind") as caught:
        GPT.from_pretrained(tmp_path / "hf")
    assert "\n" not in str(caught.value)


def damage_dtype(tensors):
    tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"].to(torch.int8)


def damage_untied(tensors):
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1


def damage_missing(tensors):
    del tensors["transformer.h.1.mlp.c_fc.bias"]


def damage_shape(tensors):
    tensors["transformer.wpe.weight"] = torch.zeros(25, 32)


def damage_extra(tensors):
    tensors["transformer.h.0.attn.q_norm.weight"] = torch.zeros(8)


@pytest.mark.parametrize(
    "damage, rule",
    [
        (damage_untied, "lm_head.weight differs"),
        (damage_missing, "lack h.1.mlp.c_fc.bias"),
        (damage_shape, "wpe.weight has shape"),
        (damage_dtype, "wpe.weight is torch.int8; only fp32"),
        (damage_extra, "hold h.0.attn.q_norm"),
    ],
)
def test_weights_that_do_not_fit_are_refused(theirs, tmp_path, damage, rule):
    file = tmp_path / "hf/model.safetensors"
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file)
    with pytest.raises(UserError, match=rule):
        GPT.from_pretrained(tmp_path / "hf")


def test_corrupt_missing_and_pickled_weights_are_one_line(theirs, tmp_path):
    file = tmp_path / "hf/model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model.safetensors is corrupt"):
        GPT.from_pretrained(tmp_path / "hf")
    file.rename(tmp_path / "hf/pytorch_model.bin")
    with pytest.raises(UserError, match=r"model.safetensors is missing; convert pytorch_model.bin"):
        GPT.from_pretrained(tmp_path / "hf")
    (tmp_path / "hf/config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is not JSON"):
        GPT.from_pretrained(tmp_path / "hf")


def test_cached_logits_equal_uncached_ones():
    model, ids = GPT(SMALL, 97).eval(), torch.randint(97, (2, 24))
    cache = Cache(model, 2)
    parts = [
        model(ids[:, :7], cache),
        model(ids[:, 7:12], cache),
        *(model(ids[:, place : place + 1], cache) for place in range(12, 24)),
    ]
    assert_close(torch.cat(parts, dim=1), model(ids), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="25 positions"):
        model(ids[:, :1], cache)


def test_generation_with_the_cache_is_generation_without_it():
    model, ids = GPT(SMALL, 97), torch.randint(97, (2, 5))
    drawn = torch.stack(list(model.generate(ids, 19, temperature=0)), dim=1)
    model.eval()
    for _ in range(19):
        ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(drawn, ids[:, 5:])


def test_generation_goes_on_past_the_context_and_stops_where_told():
    model = GPT(SMALL, 97)

    def make(seed, **options):
        generator = torch.Generator().manual_seed(seed)
        return torch.cat(
            list(
                model.generate(
                    torch.zeros(1, 30, dtype=torch.long), 60, generator=generator, **options
                )
            )
        )

    assert (
        len(make(0)) == 60 and torch.equal(make(0), make(0)) and not torch.equal(make(0), make(1))
    )
    stop = int(make(0)[10])
    seen = make(0, stop=stop).tolist()
    assert seen[-1] == stop and seen.count(stop) == 1
    assert model.training  # generation leaves the mode as it was


def test_top_k_top_p_and_temperature_cut_what_they_say():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(4000, 4)
    generator = torch.Generator().manual_seed(0)

    def share(**options):
        options = {
            "temperature": 1.0,
            "top_k": None,
            "top_p": 1.0,
            "generator": generator,
        } | options
        return torch.bincount(draw(logits, **options), minlength=4) / 4000

    assert_close(share(), torch.tensor([0.5, 0.3, 0.15, 0.05]), rtol=0, atol=0.03)
    assert_close(share(top_k=2), torch.tensor([0.625, 0.375, 0, 0]), rtol=0, atol=0.03)
    assert_close(
        share(top_p=0.75), torch.tensor([0.625, 0.375, 0, 0]), rtol=0, atol=0.03
    )  # the crossing token stays
    assert share(top_p=0.4)[0] == 1 and share(temperature=0)[0] == 1 and share(top_k=1)[0] == 1
    sharp = torch.tensor([0.5, 0.3, 0.15, 0.05]) ** 2
    assert_close(share(temperature=0.5), sharp / sharp.sum(), rtol=0, atol=0.03)


def test_counts_by_hand():
    """GPT-2 small: wte 50257*768 + wpe 1024*768 + 12*(12*768^2 + 13*768) + 2*768.

    FLOPs: 6*(12*12*768^2 + 50257*768) + 12*12*768*1024.
    """
    with torch.device("meta"):
        small = GPT(ModelConfig(12, 12, 768, 1024), 50257)
    assert small.num_params() == 124_439_808
    assert small.flops_per_token(1024) == 6 * (84_934_656 + 38_597_376) + 113_246_208 == 854_438_400
    with torch.device("meta"):
        assert GPT(ModelConfig(48, 25, 1600, 1024), 50257).num_params() == 1_557_611_200


def test_initial_scales():
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=8, n_head=4, n_embd=256, block_size=64), 1000)
    assert model.wte.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.h[3].attn.c_attn.weight.std().item() == pytest.approx(0.02, rel=0.02)
    for layer in (model.h[0].attn, model.h[7].mlp):
        assert layer.c_proj.weight.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.02)
        assert layer.c_proj.bias.abs().max() == 0
    loss = torch.nn.functional.cross_entropy(
        model(torch.randint(1000, (2, 64))).flatten(0, 1), torch.randint(1000, (128,))
    )
    assert loss.item() == pytest.approx(math.log(1000), abs=0.2)


def test_the_head_is_the_embedding_and_its_gradient_has_both_parts():
    model, ids = GPT(SMALL, 97), torch.randint(97, (1, 6))
    assert model.head_weight is model.wte.weight
    model(ids).square().sum().backward()
    used = torch.zeros(97, dtype=torch.bool)
    used[ids.flatten()] = True
    assert (model.wte.weight.grad[~used].abs().sum(1) > 0).all()


def test_dropout_acts_in_training_alone():
    model, ids = GPT(ModelConfig(2, 2, 16, 16, dropout=0.5), 97), torch.randint(97, (1, 6))
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


def test_shapes_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="model.n_embd=10: must be a multiple of model.n_head=4"):
        ModelConfig(1, 4, 10, 8)
    with pytest.raises(UserError, match="model.n_layer=0: model.n_layer must be at least 1"):
        ModelConfig(0, 1, 8, 8)
