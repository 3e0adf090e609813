"""Adam by one kernel makes the steps of torch's own."""

import copy
import io

import numpy as np
import pytest
import torch as th
from conftest import make_envs
from torch import nn

from sb3_pg import PPO
from sb3_pg.common.engines.optimizer import QuickAdam, use_fused_adam


@pytest.mark.parametrize("kind", [th.optim.Adam, th.optim.AdamW])
def test_quick_adam_is_torchs(kind):
    """The same steps, from a state that a file holds for torch's own optimizer."""
    arguments = {"n_steps": 16, "batch_size": 8, "n_epochs": 2, "policy_kwargs": {"optimizer_class": kind}}
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
    assert ours.network._adam
    assert not torchs.network._adam
    for a, b in zip(ours.policy.parameters(), torchs.policy.parameters(), strict=True):
        th.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
        mine, its = ours.policy.optimizer.state[a], torchs.policy.optimizer.state[b]
        assert float(mine["step"]) == float(its["step"]) == 12
        th.testing.assert_close(mine["exp_avg"], its["exp_avg"], atol=1e-6, rtol=1e-4)
        th.testing.assert_close(mine["exp_avg_sq"], its["exp_avg_sq"], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_quick_adam_moves_actor_and_critic_apart(decay):
    """Parameters that have made different numbers of steps, as after early stopping, then step together."""
    rng = np.random.default_rng(0)
    ours, torchs = ([nn.Parameter(th.ones(n)) for n in (3, 2, 4)] for _ in range(2))
    adams = [th.optim.Adam(parameters, lr=0.1, weight_decay=decay) for parameters in (ours, torchs)]
    use_fused_adam(adams[0])
    quick = QuickAdam(adams[0])
    memory = [th.zeros(n) for n in (3, 2, 4)]
    for moves in [(True, True), (False, True), (True, True), (True, False), (True, True), (False, True), (True, True)]:
        which = (*2 * moves[:1], moves[1])
        for p, its, g, moved in zip(ours, torchs, memory, which, strict=True):
            g.copy_(th.from_numpy(rng.normal(size=len(g))))
            p.grad, its.grad = (g, g.clone()) if moved else (None, None)
        quick.step(moves)
        adams[1].step()
    for mine, its in zip(ours, torchs, strict=True):
        th.testing.assert_close(mine, its)
        th.testing.assert_close(adams[0].state[mine]["step"], adams[1].state[its]["step"])


def test_a_loaded_optimizer_state_is_gone_on_from():
    model = PPO("MlpPolicy", make_envs(), n_steps=16, batch_size=8, n_epochs=1, seed=0)
    model.learn(16)
    state = copy.deepcopy(model.policy.optimizer.state_dict())
    model.learn(16)
    model.policy.optimizer.load_state_dict(state)
    model.train()
    assert {float(s["step"]) for s in model.policy.optimizer.state.values()} == {4.0}
