"""Schedules, which optimizer takes which parameters, Muon, and undoing non-finite steps."""

import copy
import math

import pytest
import torch

from engine.optim import Muon, OptimConfig, Optimizers, learning_rate, make_optimizers
from model import GPT, ModelConfig


@pytest.mark.parametrize(
    "schedule, step, expected",
    [
        ("cosine", 0, 0.1),
        ("cosine", 10, 1.0),
        ("cosine", 54, 0.6),  # half way from 10 to 98
        ("cosine", 98, 0.2),
        ("wsd", 78, 1.0),
        ("wsd", 88, 0.6),
        ("wsd", 98, 0.2),
        ("constant", 98, 1.0),
    ],
)
def test_schedules_at_their_corners(schedule, step, expected):
    config = OptimConfig(
        lr=1.0,
        min_lr=0.2,
        warmup_steps=10,
        schedule=schedule,
        decay_fraction=20 / 99,
    )
    assert learning_rate(config, step, max_steps=99) == pytest.approx(expected)


@pytest.fixture
def model():
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16}
    config = ModelConfig(**shape, qk_norm=True)
    return GPT(config, vocab_size=31)


def test_muon_takes_the_blocks_matrices_and_decay_reaches_matrices_alone(model):
    config = OptimConfig(name="muon", lr=1e-3, weight_decay=0.3)
    muon, adamw = make_optimizers(model, config)
    groups = [*muon.param_groups, *adamw.param_groups]
    assert [group["weight_decay"] for group in groups] == [0.3, 0.3, 0.0]

    group_of = {}
    for place, group in enumerate(groups):
        for param in group["params"]:
            group_of[param] = place
    for name, param in model.named_parameters():
        if param.dim() == 1:
            expected = 2
        elif name.endswith(("attn.weight", "c_proj.weight", "c_fc.weight")):
            expected = 0
        else:
            expected = 1
        assert group_of[param] == expected, name


@pytest.mark.parametrize("fast_bf16", [True, False])
def test_muon_is_torchs_muon(monkeypatch, fast_bf16):
    """Its updates to bfloat16's rounding, its momentum to the bit."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast_bf16)
    torch.manual_seed(0)
    ours = []
    for shape in ((8, 24), (24, 8), (8, 24), (16, 16), (1, 5)):
        ours.append(torch.nn.Parameter(torch.randn(shape)))
    theirs = copy.deepcopy(ours)
    options = {
        "lr": 0.01,
        "weight_decay": 0.3,
        "adjust_lr_fn": "match_rms_adamw",
    }
    our_muon = Muon(ours, **options)
    torch_muon = torch.optim.Muon(theirs, **options)
    for _ in range(3):
        before = copy.deepcopy(theirs)
        for our, their in zip(ours, theirs, strict=True):
            our.grad = torch.randn_like(our)
            their.grad = our.grad.clone()
        our_muon.step()
        torch_muon.step()
        for our, their, old in zip(ours, theirs, before, strict=True):
            assert (our - their).norm() < 0.04 * (their - old).norm()
            our_state = our_muon.state[our]
            their_state = torch_muon.state[their]
            assert torch.equal(our_state["momentum_buffer"], their_state["momentum_buffer"])


def make(model, name, scaled=False):
    config = OptimConfig(name=name, lr=1e-2)
    return Optimizers(model, config, scaled)


def step(model, optimizers, gradient=1.0, loss=1.0):
    """A step with random gradients, but for one entry that is `gradient`."""
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    first = next(model.parameters())
    first.grad[0, 0] = gradient
    return optimizers.step(torch.tensor(loss))


def state_of(model, optimizers):
    """Copies of the weights and of the optimizers' state."""
    parts = optimizers.state_dict()["parts"]
    state = [part["state"] for part in parts]
    weights = model.state_dict()
    return copy.deepcopy([weights, *state])


def assert_same(state, before):
    torch.testing.assert_close(state, before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("key, value", [("gradient", math.nan), ("loss", math.inf)])
def test_a_step_that_is_not_finite_and_those_after_it_change_nothing(model, name, key, value):
    optimizers = make(model, name)
    step(model, optimizers)
    before = state_of(model, optimizers)
    step(model, optimizers, **{key: value})
    step(model, optimizers)
    assert_same(state_of(model, optimizers), before)
    assert optimizers.failed == 1


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_float16_leaves_out_an_overflow_alone_and_lowers_the_scale(model, name):
    optimizers = make(model, name, scaled=True)
    optimizers.backward(model.head_weight.sum())
    scale = optimizers.scaler.get_scale()
    assert model.head_weight.grad.max() == scale > 1

    step(model, optimizers)
    before = state_of(model, optimizers)
    step(model, optimizers, gradient=math.inf)
    assert_same(state_of(model, optimizers), before)
    assert optimizers.scaler.get_scale() == scale / 2
    step(model, optimizers)
    assert optimizers.failed == 0
    assert not torch.equal(model.head_weight, before[0]["wte.weight"])


def test_clipping_scales_the_gradient_and_returns_the_norm_before(model):
    config = OptimConfig(lr=1e-2, beta1=0.5, grad_clip=1e-3)
    optimizers = Optimizers(model, config)
    norm = step(model, optimizers, gradient=1e3).item()
    assert norm == pytest.approx(1e3, rel=0.1)

    (adamw,) = optimizers.optimizers
    param = next(model.parameters())
    mean_gradient = adamw.state[param]["exp_avg"][0, 0]
    clipped = mean_gradient.item() / 0.5
    assert clipped == pytest.approx(1e-3 * 1e3 / norm, rel=1e-3)
    assert all(param.grad is None for param in model.parameters())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_learning_rate_reaches_every_group_of_a_restored_state_too(model, name):
    optimizers = make(model, name)
    step(model, optimizers)
    state = copy.deepcopy(optimizers.state_dict())
    optimizers.load_state_dict(state)
    weights, *_ = state_of(model, optimizers)
    optimizers.set_learning_rate(0.0)
    step(model, optimizers)
    assert_same(model.state_dict(), weights)
