"""A reference that follows the policy, and what archives keep of it."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch as th
from conftest import silent
from stable_baselines3.common.callbacks import BaseCallback
from text_models import make
from tiny_models import AtRolloutEnd

from sb3_pg import PPO, REINFORCE, TRPO
from sb3_pg.common.objectives import KL_ESTIMATORS, kl_estimate
from sb3_pg.text.reference import mix

pytestmark = pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")

SYNC = {"ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.7}


def parameters(module):
    return [p.detach().clone() for p in module.parameters()]


class Noting(BaseCallback):
    """Notes policy and reference before the first update and after each."""

    def __init__(self):
        super().__init__()
        self.found = []

    def _on_step(self):
        return True

    def _note(self):
        self.found.append((parameters(self.model.policy.lm), parameters(self.model.policy.reference)))

    _on_rollout_start = _on_training_end = _note


@pytest.mark.parametrize("kind", [PPO, TRPO, REINFORCE])
def test_the_reference_follows_after_so_many_updates(kind):
    more = {"n_episodes": 8, "baseline": None} if kind is REINFORCE else {}
    model, noting = make("gpt2", kind, policy_kwargs=SYNC, **more), Noting()
    model.learn(1, callback=noting)
    noting.found.pop()  # after the first update, as the next rollout will find it
    model.learn(4 * 13 * 4, callback=noting, reset_num_timesteps=False)
    assert len(noting.found) > 4
    for number, ((_, before), (policy, after)) in enumerate(zip(noting.found, noting.found[1:], strict=False), 1):
        follows = number % 2 == 0
        for old, new, now in zip(before, policy, after, strict=True):
            expected = (0.3 * old.double() + 0.7 * new.double()).float() if follows else old
            np.testing.assert_allclose(now, expected, rtol=1e-5, atol=1e-6 * follows)
    assert model.policy.reference is not model.policy.language_model


def test_without_it_the_reference_stays():
    model = make("gpt2")
    before = parameters(model.policy.reference)
    model.learn(3 * 13 * 4)
    assert all(th.equal(p, q) for p, q in zip(before, model.policy.reference.parameters(), strict=True))
    assert "reference_age" not in model.policy.state_dict()


def test_a_whole_step_copies_the_policy_in_half_precision_too():
    a, b = th.nn.Linear(3, 2), th.nn.Linear(3, 2).bfloat16()
    for alpha in (0.5, 1.0):
        expected = [
            (q.float() + alpha * (p - q.float())).bfloat16() for p, q in zip(*(map(parameters, (a, b))), strict=True)
        ]
        mix(b, a, alpha)
        assert all(th.equal(p, q) for p, q in zip(b.parameters(), expected, strict=True))


@pytest.mark.parametrize("where", ["reward", "loss"])
@pytest.mark.parametrize(("kind", "options"), [(PPO, {}), (PPO, {"n_epochs": 1, "batch_size": 1000}), (TRPO, {})])
def test_learning_goes_on_exactly(kind, options, where, tmp_path):
    """Also from a rollout that was judged but not learned from, whose reference log-probabilities are kept."""
    kwargs = {**SYNC, "reference_kl_in": where, "mask_truncated_completions": True, "top_p": 0.9}
    model = make("gpt2", kind, policy_kwargs=kwargs, **options)
    path = tmp_path / "model.zip"

    def save(now):
        if now.num_timesteps > 2 * 13 * 4 and not path.exists():
            now.save(path)

    model.learn(5 * 13 * 4, callback=AtRolloutEnd(save))
    assert path.exists()
    loaded = silent(kind.load(path, env=copy.deepcopy(model.env)))
    assert int(loaded.policy.reference_age) == 0
    assert loaded.policy.reference_settings == model.policy.reference_settings
    loaded.learn(5 * 13 * 4 - loaded.num_timesteps, reset_num_timesteps=False)
    assert loaded.num_timesteps == model.num_timesteps
    for key, x in model.policy.state_dict().items():
        assert th.equal(x, loaded.policy.state_dict()[key]), key


# ------------------------------------------------------------------ estimators


@pytest.mark.parametrize("kind", [np.asarray, th.as_tensor], ids=["numpy", "torch"])
@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_estimates_by_their_definitions(estimator, kind):
    d = np.linspace(-3, 3, 13)
    r = np.exp(-d)  # pi_ref / pi
    value, derivative = kl_estimate(kind(d), estimator)
    expected = {"k1": -np.log(r), "k2": np.log(r) ** 2 / 2, "k3": (r - 1) - np.log(r)}[estimator]
    np.testing.assert_allclose(value, expected, atol=1e-12)
    leaf = th.tensor(d, requires_grad=True)
    (slope,) = th.autograd.grad(kl_estimate(leaf, estimator)[0].sum(), leaf)
    np.testing.assert_allclose(derivative, slope, atol=1e-12)
    assert type(value) is type(kind(d))


def test_what_the_gradients_of_the_estimators_are():
    """Exact expectations over a few actions: zero, that of KL(policy || reference), that of KL(reference || policy)."""
    logits = th.tensor([0.3, -1.0, 0.8, 0.1], dtype=th.float64, requires_grad=True)
    reference = th.tensor([0.5, 0.2, -0.4, 0.9], dtype=th.float64).log_softmax(0)
    log_prob = logits.log_softmax(0)
    kl = SimpleNamespace(
        reverse=(log_prob.exp() * (log_prob - reference)).sum(),
        forward=(reference.exp() * (reference - log_prob)).sum(),
    )
    gradient = {name: th.autograd.grad(x, logits, retain_graph=True)[0] for name, x in vars(kl).items()}
    wanted = {"k1": th.zeros(4), "k2": gradient["reverse"], "k3": gradient["forward"]}
    for estimator, expected in wanted.items():
        value, derivative = kl_estimate((log_prob - reference).detach(), estimator)
        (found,) = th.autograd.grad((log_prob.exp().detach() * derivative * log_prob).sum(), logits, retain_graph=True)
        np.testing.assert_allclose(found, expected, atol=1e-12)
        if estimator != "k2":  # unbiased
            assert float((log_prob.exp() * value).sum()) == pytest.approx(float(kl.reverse))
