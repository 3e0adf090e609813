"""Optimizers by few kernels make the steps of torch's own."""

import copy
import io

import numpy as np
import pytest
import torch as th
from conftest import make_envs
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from sb3_pg import PPO
from sb3_pg.common.engines.optimizer import QuickOptimizer, is_quick, use_fused_adam

KINDS = {
    "adam": (th.optim.Adam, {}),
    "adam_decay": (th.optim.Adam, {"weight_decay": 0.1}),
    "adam_decoupled": (th.optim.Adam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "adamw": (th.optim.AdamW, {"betas": (0.8, 0.99)}),
    "rmsprop": (th.optim.RMSprop, {"alpha": 0.9}),
    "rmsprop_decay": (th.optim.RMSprop, {"weight_decay": 0.1, "eps": 1e-5}),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("groups", ["one", "two"])
def test_quick_optimizers_are_torchs(name, groups):
    """The same steps, from a state that a file holds for torch's own optimizer."""
    kind, kwargs = KINDS[name]
    arguments = {"n_steps": 16, "batch_size": 8, "n_epochs": 2}
    arguments["policy_kwargs"] = {"optimizer_class": kind, "optimizer_kwargs": kwargs}
    if groups == "two":
        arguments |= {"critic_learning_rate": 2e-3, "critic_optimizer_kwargs": {"weight_decay": 0.2}}
    ours, torchs = (PPO("MlpPolicy", make_envs(), seed=0, **arguments) for _ in range(2))
    ours.learn(32)
    file = io.BytesIO()
    th.save(ours.get_parameters(), file)
    file.seek(0)
    torchs.set_parameters(th.load(file))
    torchs.policy.optimizer.register_step_post_hook(lambda *_: None)  # with a hook, only the optimizer itself will do
    torchs.set_logger(ours.logger)
    torchs.rollout_buffer = ours.rollout_buffer
    for model in (ours, torchs):
        np.random.seed(1)
        model.train()
    assert ours.network._quick
    assert not torchs.network._quick
    for a, b in zip(ours.policy.parameters(), torchs.policy.parameters(), strict=True):
        th.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
        mine, its = ours.policy.optimizer.state[a], torchs.policy.optimizer.state[b]
        assert float(mine["step"]) == float(its["step"]) == 12
        assert mine.keys() == its.keys()
        for key, x in its.items():
            th.testing.assert_close(mine[key], x, atol=1e-6, rtol=1e-4)


def test_hooks_of_all_optimizers_are_called():
    model, calls = PPO("MlpPolicy", make_envs(), n_steps=16, batch_size=8, n_epochs=2, seed=0), []
    model.learn(16)
    handle = register_optimizer_step_post_hook(lambda *its: calls.append(its))
    try:
        model.learn(16)
    finally:
        handle.remove()
    assert len(calls) == model.n_epochs * 16 * model.n_envs // model.batch_size


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("groups", ["one", "two"])
def test_actor_and_critic_move_apart(name, groups):
    """Parameters that have made different numbers of steps, as after early stopping, then step together."""
    kind, kwargs = KINDS[name]
    rng = np.random.default_rng(0)
    ours, torchs = ([nn.Parameter(th.ones(n)) for n in (3, 2, 4)] for _ in range(2))
    both = [kind(p if groups == "one" else grouped(p), lr=0.1, **kwargs) for p in (ours, torchs)]
    use_fused_adam(both[0])
    assert is_quick(both[0])
    quick = QuickOptimizer(both[0])
    memory = [th.zeros(n) for n in (3, 2, 4)]
    for moves in [(True, True), (False, True), (True, True), (True, False), (True, True), (False, True), (True, True)]:
        which = (*2 * moves[:1], moves[1])
        for p, its, g, moved in zip(ours, torchs, memory, which, strict=True):
            g.copy_(th.from_numpy(rng.normal(size=len(g))))
            p.grad, its.grad = (g, g.clone()) if moved else (None, None)
        quick.step(moves)
        both[1].step()
        for mine, its in zip(ours, torchs, strict=True):
            th.testing.assert_close(mine, its, atol=1e-6, rtol=1e-6)
    for mine, its in zip(ours, torchs, strict=True):
        th.testing.assert_close(both[0].state[mine]["step"], both[1].state[its]["step"])


def grouped(parameters):
    """The first two, and the last with options of its own."""
    return [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.3, "weight_decay": 0.2}]


@pytest.mark.parametrize("kwargs", [{"momentum": 0.9}, {"centered": True}, {"maximize": True}], ids=str)
def test_variants_are_left_to_torch(kwargs):
    parameters = [nn.Parameter(th.ones(2))]
    assert is_quick(th.optim.RMSprop(parameters))
    assert not is_quick(th.optim.RMSprop(parameters, **kwargs))
    groups = [{"params": parameters}, {"params": [nn.Parameter(th.ones(2))], **kwargs}]
    assert not is_quick(th.optim.RMSprop(groups))


def test_a_loaded_optimizer_state_is_gone_on_from():
    model = PPO("MlpPolicy", make_envs(), n_steps=16, batch_size=8, n_epochs=1, seed=0)
    model.learn(16)
    state = copy.deepcopy(model.policy.optimizer.state_dict())
    model.learn(16)
    model.policy.optimizer.load_state_dict(state)
    model.train()
    assert {float(s["step"]) for s in model.policy.optimizer.state.values()} == {4.0}
