"""The transformer by itself: its cache, documents, draws, counts and refusals. test_model_hf.py
compares it with transformers'."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from engine import UserError
from model import GPT, ModelConfig, gpt
from model.config import ROPE_SCALINGS
from model.gpt import KVCache, attention_kernel, needs_repeated_heads, sample_next
from tests.helpers import assert_close

V = 97
LLAMA3 = ROPE_SCALINGS["llama3"]
CONFIGS = {
    "gpt2": ModelConfig(
        n_layer=3,
        n_head=4,
        n_embd=32,
        block_size=24,
    ),
    "modern": ModelConfig(
        n_head=4,
        n_kv_head=2,
        n_embd=32,
        head_dim=12,
        block_size=24,
        norm="rmsnorm",
        rope_theta=100.0,
        rope_scaling=dict.fromkeys(LLAMA3, 8.0) | {"low_freq_factor": 1.0},
        mlp="swiglu",
        qk_norm=True,
        tied=False,
        logit_softcap=0.5,
    ),
}


@pytest.fixture(params=CONFIGS)
def model(request):
    return GPT(CONFIGS[request.param], V).eval()


@pytest.fixture
def ids():
    return torch.randint(V, (2, 24))


def agree(actual, expected):
    assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_cached_hidden_states(model, ids):
    cache = KVCache(model, 2, 24)
    parts = []
    for part in ids.split([20, 1, 1, 1, 1], dim=1):
        parts.append(model.hidden(part, cache))
    cached = torch.cat(parts, dim=1)
    agree(cached, model.hidden(ids))
    with pytest.raises(ValueError, match="25 positions: the model reads at most block_size=24"):
        model.hidden(ids[:, :1], cache)


@torch.no_grad()
def test_documents_in_one_block_are_documents_alone(model, ids):
    document_ids = torch.zeros(2, 24, dtype=torch.long)
    document_ids[0, 1:11] = 7
    document_ids[0, 11:] = 3
    packed = model.hidden(ids, document_ids=document_ids)
    for row, start, end in [(0, 0, 1), (0, 1, 11), (0, 11, 24), (1, 0, 24)]:
        document = ids[row, start:end]  # [T]
        alone = model.hidden(document[None])
        agree(packed[row, start:end], alone[0])


@torch.no_grad()
def test_generation_past_the_context_reads_its_last_half_again(model, ids):
    prompt = ids.repeat(1, 2)  # [2,48]
    context = prompt[:, -24:]
    for token in model.generate(prompt, 40, temperature=0):
        if context.shape[1] > 24:
            context = context[:, -12:]
        likeliest = model(context)[:, -1].argmax(dim=-1)
        assert torch.equal(token, likeliest)
        context = torch.cat([context, token[:, None]], dim=1)


def test_generation_follows_its_seed_and_ends_where_all_have_stopped(ids):
    model = GPT(CONFIGS["gpt2"], 3)

    def generate(seed, stop=None):
        generator = torch.Generator().manual_seed(seed)
        tokens = model.generate(
            ids % 3,
            60,
            generator=generator,
            stop=stop,
        )
        return torch.stack(list(tokens), dim=1)

    first = generate(0)
    assert first.shape == (2, 60)
    assert torch.equal(generate(0), first)
    assert not torch.equal(generate(1), first)
    for stop in (2, [2], [1, 2]):
        stopped = generate(0, stop)
        is_end = torch.isin(stopped, torch.tensor(stop))
        ends = is_end.int().argmax(dim=1)
        assert stopped.shape[1] == ends.max() + 1
    model.eos = [1, 2]  # as its folder says
    assert torch.equal(generate(0), stopped)
    assert generate(0, []).shape == (2, 60)
    assert model.training  # generation leaves the mode as it was


@torch.no_grad()
def test_softcapped_logits_are_those_that_are_drawn_from(ids):
    model = GPT(replace(CONFIGS["gpt2"], n_embd=64, logit_softcap=0.1), 3).eval()
    prompt = ids % 3
    hidden = model.hidden(prompt)
    plain = hidden @ model.head_weight.T
    logits = model(prompt)
    agree(logits, 0.1 * torch.tanh(plain / 0.1))
    draws = model.generate(prompt, 1, generator=torch.Generator().manual_seed(0), temperature=0.1)
    want = sample_next(logits[:, -1], temperature=0.1, generator=torch.Generator().manual_seed(0))
    assert torch.equal(next(draws), want)


PROBABILITIES = [0.5, 0.3, 0.15, 0.05]
DRAWS = [  # options, probabilities of the draws
    ({}, PROBABILITIES),
    ({"top_k": 2}, [0.625, 0.375, 0, 0]),
    ({"top_p": 0.75}, [0.625, 0.375, 0, 0]),  # the token that crosses top_p stays
    ({"temperature": 0.5}, [0.685, 0.247, 0.062, 0.007]),  # squares
    ({"temperature": 0.0}, [1, 0, 0, 0]),
]


@pytest.mark.parametrize("options, want", DRAWS)
def test_draws_have_the_probabilities_that_were_asked_for(options, want):
    logits = torch.tensor(PROBABILITIES).log().expand(4000, 4)
    draws = sample_next(logits, **options)
    shares = draws.bincount(minlength=4) / 4000
    assert shares.tolist() == pytest.approx(want, abs=0.03)
    assert (shares > 0).tolist() == [share > 0 for share in want]


def test_counts_by_hand():
    """GPT-2 small: wte 50257*768 + wpe 1024*768 + 12*(12*768^2 + 13*768) + 2*768 parameters.

    FLOPs: 6*(12*12*768^2 + 50257*768) + 12*12*768*1024.
    """
    config = ModelConfig(n_layer=12, block_size=1024)
    with torch.device("meta"):
        small = GPT(config, 50257)
    assert small.num_params() == 124_439_808
    assert small.flops_per_token(1024) == 854_438_400


def test_initial_weights():
    model = GPT(ModelConfig(n_layer=8, n_embd=256), 1000)
    for name, std in (
        ("wte.weight", 0.02),
        ("h.7.mlp.c_proj.weight", 0.005),  # 0.02 over the square root of 2 * 8 layers
    ):
        weight = model.get_parameter(name)
        assert weight.std().item() == pytest.approx(std, rel=0.02)
    assert model.h[0].attn.c_attn.bias.abs().max() == 0

    identity = GPT(ModelConfig(n_embd=256, zero_init=True, rope_theta=1e4), V)
    weight = identity.h[0].mlp.c_fc.weight
    assert weight.std().item() == pytest.approx(1 / 16, rel=0.02)
    ids = torch.randint(V, (1, 9))
    embedded = identity.wte(ids)
    assert torch.equal(identity.hidden(ids), identity.ln_f(embedded))


def test_dropout_is_for_training_alone(model, ids):
    model.config.dropout = 0.5
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


@pytest.mark.parametrize("masked", [False, True])
def test_repeated_heads_attend_as_groups_do(ids, masked, monkeypatch):
    model = GPT(CONFIGS["modern"], V)
    document_ids = (ids % 5 == 0).cumsum(dim=1) if masked else None
    gradients = []
    for repeated in (False, True):
        monkeypatch.setattr(
            gpt,
            "needs_repeated_heads",
            lambda *_, repeated=repeated: repeated,
        )
        hidden = model.hidden(ids, document_ids=document_ids)
        loss = hidden.square().sum()
        weights = list(model.h.parameters())
        gradients.append(torch.autograd.grad(loss, weights))
    for one, other in zip(*gradients, strict=True):
        agree(one, other)


@pytest.mark.parametrize(
    "device, dtype, mask, repeated",
    [
        ("cuda", torch.bfloat16, None, False),  # flash attention takes groups
        ("cuda", torch.bfloat16, torch.ones(1), True),
        ("cuda", torch.float32, None, True),
        ("cpu", torch.float32, None, False),
    ],
)
def test_heads_are_repeated_for_the_memory_efficient_kernel(device, dtype, mask, repeated):
    query = SimpleNamespace(
        device=torch.device(device),
        dtype=dtype,
        shape=(1, 4, 6, 64),
    )
    assert needs_repeated_heads(query, mask) == repeated


@pytest.mark.parametrize("dropout, kernel", [(0.0, "flash"), (0.1, "math")])
def test_the_attention_kernel_is_the_one_that_pytorch_would_take(dropout, kernel):
    config = ModelConfig(
        n_head=4,
        n_kv_head=2,
        n_embd=32,
        block_size=24,
        dropout=dropout,
    )
    cpu = torch.device("cpu")
    chosen = attention_kernel(
        config,
        cpu,
        torch.float32,
        masked=True,
    )
    assert chosen == kernel


@pytest.mark.parametrize(
    "fields, sizes",
    [
        ({"n_layer": 2}, {"n_embd": 64, "n_head": 2, "n_inner": 256}),  # the demo's
        ({"n_layer": 6}, {"n_embd": 384, "n_head": 6, "n_kv_head": 6, "head_dim": 64}),
        ({"n_embd": 128, "mlp": "swiglu"}, {"n_inner": 384}),  # 341 and up
    ],
)
def test_unset_sizes_follow_from_the_dial(fields, sizes):
    config = ModelConfig(**fields)
    assert sizes.items() <= vars(config.resolved()).items()
    assert config == ModelConfig(**fields)  # what a run records is what its user wrote


YARN = {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 64}
MISTAKES = [  # fields, the message
    ({"head_dim": 5}, "model.head_dim=5: must be even with model.rope_theta"),
    ({"rope_theta": None, "rope_scaling": YARN}, "model.rope_theta=null: model.rope_scaling needs"),
    ({"rope_scaling": 4}, "model.rope_scaling=4: give {rope_type: yarn"),
    ({"rope_scaling": {"rope_type": "yarm"}}, "rope_type=yarm: .*; did you mean yarn"),
    ({"rope_scaling": {"rope_type": "linear"}}, "factor=None: rope_type=linear needs a number"),
    ({"rope_scaling": YARN | {"factor": 0}}, "model.rope_scaling.factor=0: .* must be above 0"),
    ({"rope_scaling": YARN | {"betafast": 4}}, "betafast=4: rope_type=yarn takes factor, orig"),
    ({"logit_softcap": 0.0}, "model.logit_softcap=0.0: .* must be above 0"),
]


@pytest.mark.parametrize("fields, match", MISTAKES)
def test_mistakes_are_one_line(fields, match):
    with pytest.raises(UserError, match=match):
        ModelConfig(**{"rope_theta": 1e4} | fields)


def test_what_rope_scaling_leaves_out():
    scaling = ModelConfig(rope_theta=1e4, rope_scaling=YARN).rope_scaling
    assert scaling["attention_factor"] == pytest.approx(1 + 0.1 * math.log(4))
    assert scaling["beta_fast"] == 32
    assert scaling["beta_slow"] == 1
    assert scaling["truncate"] is True
    assert "rope_type" not in LLAMA3  # as checkpoints from before there were others have it
    old = ModelConfig(rope_theta=1e4, rope_scaling=dict.fromkeys(LLAMA3, 8.0))
    assert old.rope_scaling["rope_type"] == "llama3"


@pytest.mark.parametrize("options", [{"temperature": 1e-40}, {"top_p": 1e-320}, {"temperature": 0}])
def test_the_smallest_temperature_and_share_take_the_likeliest_token(options):
    logits = torch.randn(5, 100)
    tokens = sample_next(logits, **options)
    assert torch.equal(tokens, logits.argmax(1))
