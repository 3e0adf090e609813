"""An error names the cause that was looked at, and once that is mended the model learns on."""

import re

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from conftest import make_envs, pairs, silent
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback
from stable_baselines3.common.vec_env import DummyVecEnv
from tiny_models import ALGORITHMS, ALL, tiny, weights

from sb3_pg import PPO, REINFORCE, TRPO
from sb3_pg.common.buffers import RolloutBuffer
from sb3_pg.common.errors import ArgumentError, NonFiniteError

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

#: What an error about the policy must not say.
BLAMES_THE_ENVIRONMENT = re.compile(r"in the environment|simulation|division by zero|rewards and observations")

ENGINES = pytest.mark.parametrize("engine", ["auto", "autograd"])


class Sound(gym.Env):
    """Nothing is wrong with it; it counts the actions that are not numbers."""

    def __init__(self, action="box"):
        self.observation_space = spaces.Box(-1, 1, (3,), np.float32)
        self.action_space = {"box": spaces.Box(-1, 1, (2,), np.float32), "discrete": spaces.Discrete(3)}[action]
        self.n_bad = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._observe(), {}

    def _observe(self):
        return self.np_random.uniform(-1, 1, 3).astype(np.float32)

    def step(self, action):
        self.n_bad += bool(np.isnan(action).any())
        self.steps += 1
        return self._observe(), float(np.nan_to_num(np.sum(action))), self.steps == 4, False, {}


def sound_model(algorithm, action="box", **options):
    """A model on two sound environments, of whose updates each has eight steps of each."""
    sizes = {REINFORCE: {"n_episodes": 4}}.get(algorithm, {"n_steps": 8, "batch_size": 16})
    return tiny(algorithm, DummyVecEnv([lambda: Sound(action), lambda: Sound(action)]), **{**sizes, **options})


class Breaking(BaseCallback):
    """Does something to the policy in the third rollout; keeps its parameters from before.

    :param deed: function of the policy
    :param event: when
    """

    def __init__(self, deed, event):
        super().__init__()
        self.deed, self.event, self.rollouts, self.done = deed, event, 0, False

    def _maybe(self, event):
        if not self.done and self.rollouts == 3 and event == self.event:
            self.done = True
            self.good = {name: p.clone() for name, p in self.model.policy.state_dict().items()}
            with th.no_grad():
                self.deed(self.model.policy)

    def _on_rollout_start(self):
        self.rollouts, self.n = self.rollouts + 1, 0
        self._maybe("start")

    def _on_step(self):
        self.n += 1
        if self.n == 4:
            self._maybe("middle")
        return True

    def _on_rollout_end(self):
        self._maybe("end")


def answers_are_finite(policy):
    """Whether the policy's actions, their probabilities and its values are numbers."""
    observations = th.as_tensor(np.random.default_rng(0).uniform(-1, 1, (16, 3)), dtype=th.float32)
    with th.no_grad():
        try:
            actions, values, log_prob = policy(observations)
        except ValueError:  # torch's distributions refuse such parameters
            return False
    return all(bool(x.isfinite().all()) for x in (actions, values, log_prob))


def check_goes_on(model, message, good=None):
    """The model learns on: from what it has if the error says that this is good, else from what it is given."""
    if re.search("last good|can be saved", message):
        assert answers_are_finite(model.policy), "what the error says of the policy is not true"
    elif good is not None:
        model.policy.load_state_dict(good)
    before = weights(model)
    model.learn(64)
    after = weights(model)
    assert np.isfinite(after).all()
    assert answers_are_finite(model.policy)
    assert np.abs(after - before).max() > 1e-6
    model.learn(32, reset_num_timesteps=False)


def set_to(name, value):
    def deed(policy):
        dict(policy.named_parameters())[name].fill_(value)

    return deed


NAN, INF = float("nan"), float("inf")
BROKEN = [
    ("log_std", 100.0),  # of which the deviation overflows
    ("log_std", NAN),
    ("action_net.weight", NAN),
    ("action_net.bias", INF),
    ("mlp_extractor.policy_net.0.weight", NAN),
    ("value_net.weight", NAN),
    ("value_net.bias", INF),
]


# --------------------------------------------------------------- the policy is broken


@pytest.mark.parametrize(
    "algorithm, when, broken",
    pairs(ALGORITHMS, [("auto", "start"), ("auto", "middle"), ("auto", "end"), ("autograd", "middle")], BROKEN),
)
def test_a_broken_parameter_is_named(algorithm, when, broken):
    (engine, event), (name, value) = when, broken
    model, callback = sound_model(algorithm, engine=engine), Breaking(set_to(name, value), event)
    with pytest.raises(NonFiniteError) as caught:
        model.learn(1000, callback)
    message = str(caught.value)
    assert "policy" in message
    assert name in message
    assert not BLAMES_THE_ENVIRONMENT.search(message), message
    assert "step -1" not in message
    assert sum(env.n_bad for env in model.env.envs) == 0  # it was not let into the environments
    check_goes_on(model, message, callback.good)


@ALL
@ENGINES
@pytest.mark.parametrize("event", ["start", "end"])
def test_a_broken_parameter_of_a_policy_that_chooses(algorithm, engine, event):
    model = sound_model(algorithm, "discrete", engine=engine)
    callback = Breaking(set_to("action_net.weight", NAN), event)
    with pytest.raises(NonFiniteError, match=r"action_net\.weight") as caught:
        model.learn(1000, callback)
    assert not BLAMES_THE_ENVIRONMENT.search(str(caught.value)), str(caught.value)
    check_goes_on(model, str(caught.value), callback.good)


@ALL
@ENGINES
def test_a_deviation_that_overflows_from_the_beginning(algorithm, engine):
    model = sound_model(algorithm, engine=engine)
    with th.no_grad():
        model.policy.log_std.fill_(100.0)
    with pytest.raises(NonFiniteError, match="log_std") as caught:
        model.learn(64)
    assert not BLAMES_THE_ENVIRONMENT.search(str(caught.value)), str(caught.value)
    with th.no_grad():
        model.policy.log_std.zero_()
    check_goes_on(model, str(caught.value))


@ALL
def test_a_learning_rate_that_is_too_high(algorithm):
    """Gradients are finite, but what the step leads to cannot be computed with."""
    rate = [1e-3]
    model = sound_model(algorithm, learning_rate=lambda progress_remaining: rate[0])
    model.learn(32)
    good = {name: p.clone() for name, p in model.policy.state_dict().items()}
    rate[0] = 1e38
    with pytest.raises(NonFiniteError) as caught:
        model.learn(1000)
    message = str(caught.value)
    assert "`learning_rate`" in message or not BLAMES_THE_ENVIRONMENT.search(message), message
    rate[0] = 1e-3
    check_goes_on(model, message, good)


@ALL
def test_a_policy_whose_answers_are_not_numbers(algorithm):
    """Its parameters are, so that it must be the policy's own code."""

    class Failing(algorithm.policy_aliases["MlpPolicy"]):
        broken = False

        def forward(self, obs, deterministic=False):
            actions, values, log_prob = super().forward(obs, deterministic)
            return (actions * NAN if self.broken else actions), values, log_prob

    model = sound_model(algorithm, policy=Failing)
    with pytest.raises(NonFiniteError, match="policy") as caught:
        model.learn(1000, Breaking(lambda policy: setattr(policy, "broken", True), "middle"))
    assert not BLAMES_THE_ENVIRONMENT.search(str(caught.value)), str(caught.value)
    assert sum(env.n_bad for env in model.env.envs) == 0
    model.policy.broken = False
    check_goes_on(model, str(caught.value))


@ALL
@pytest.mark.parametrize("event", ["start", "middle"])
def test_the_environments_own_fault_is_still_the_environments(algorithm, event):
    def break_environment(policy):
        for env in model.env.envs:
            env._observe = lambda: np.full(3, NAN, np.float32)

    model = sound_model(algorithm)
    callback = Breaking(break_environment, event)
    with pytest.raises(NonFiniteError, match=r"observation of environment 0 at step \d+ .*environment"):
        model.learn(1000, callback)
    for env in model.env.envs:
        del env._observe
    check_goes_on(model, "last good")


# ----------------------------------------------------------------- a buffer's own get


class Negated(RolloutBuffer):
    """Its own ``get`` gives every advantage with the other sign."""

    def get(self, batch_size=None):
        for data in super().get(batch_size):
            yield data._replace(advantages=-data.advantages)


class NegatedWhenJudged(RolloutBuffer):
    """The same where every algorithm reads them."""

    def compute_returns_and_advantage(self, last_values, dones):
        super().compute_returns_and_advantage(last_values, dones)
        self.advantages[: self.pos] *= -1


class Overflowing(RolloutBuffer):
    """Its own ``get`` gives returns and advantages that a gradient cannot be made of, from the second rollout on."""

    n_rollouts = 0
    soundly = True

    def reset(self):
        super().reset()
        self.n_rollouts += 1

    def get(self, batch_size=None):
        factor = 1e38 if self.n_rollouts > 2 and not self.soundly else 1.0
        for data in super().get(batch_size):
            yield data._replace(advantages=data.advantages * factor * factor, returns=data.returns * factor * factor)


def learned_actor(model):
    """The actor's parameters after one update from a fixed seed."""
    model.set_random_seed(3)
    model.learn(16)
    parts = ("log_std", "action_net", "mlp_extractor.policy_net")
    found = [p.detach().numpy().ravel() for name, p in model.policy.named_parameters() if name.startswith(parts)]
    return np.concatenate(found)


def with_buffer(algorithm, buffer, **options):
    """A model with a buffer of its own ``get``; None if it says at once that it has no use for one."""
    try:
        return tiny(algorithm, make_envs(), rollout_buffer_class=buffer, **options)
    except ArgumentError as error:
        assert "get" in str(error)
        assert buffer.__name__ in str(error)
        assert algorithm is not PPO
        return None


@ALL
@ENGINES
def test_the_policy_learns_from_what_the_buffer_gives(algorithm, engine):
    # Plain gradient steps, which are as small as their gradients.
    options = {"engine": engine, "learning_rate": 0.05, "policy_kwargs": {"optimizer_class": th.optim.SGD}}
    if algorithm is not TRPO:
        options["max_grad_norm"] = None
    model = with_buffer(algorithm, Negated, **options)
    if model is None:
        return
    plain = learned_actor(tiny(algorithm, make_envs(), **options))
    expected = learned_actor(tiny(algorithm, make_envs(), rollout_buffer_class=NegatedWhenJudged, **options))
    np.testing.assert_allclose(learned_actor(model), expected, atol=1e-5)
    assert np.abs(expected - plain).max() > 1e-4


@ALL
def test_the_critic_learns_from_what_the_buffer_gives(algorithm):
    class Zeros(RolloutBuffer):
        def get(self, batch_size=None):
            for data in super().get(batch_size):
                yield data._replace(returns=th.zeros_like(data.returns) - 50.0)

    model = with_buffer(algorithm, Zeros, learning_rate=1e-2)
    if model is None:
        return
    plain = tiny(algorithm, make_envs(), learning_rate=1e-2).learn(160)
    observations = th.as_tensor(plain.env.reset())
    with th.no_grad():
        found, other = (its.policy.predict_values(observations).mean() for its in (model.learn(160), plain))
    assert found < other - 0.1


@ALL
@ENGINES
def test_an_error_about_a_sample_of_the_buffers_own(algorithm, engine):
    model = with_buffer(algorithm, Overflowing, engine=engine)
    if model is None:
        return
    model.rollout_buffer.soundly = False
    with pytest.raises(NonFiniteError) as caught:
        model.learn(1000)
    message = str(caught.value)
    assert "step -1" not in message
    assert "Overflowing" in message or "get" in message or "buffer" in message
    assert answers_are_finite(model.policy)
    model.rollout_buffer.soundly = True
    check_goes_on(model, message)


@ALL
def test_a_get_that_gives_nothing_or_too_much(algorithm):
    class Nothing(RolloutBuffer):
        def get(self, batch_size=None):
            yield from ()

    class Twice(RolloutBuffer):
        def get(self, batch_size=None):
            yield from super().get(batch_size)
            yield from super().get(batch_size)

    model = with_buffer(algorithm, Twice)
    if model is not None:
        assert np.isfinite(weights(model.learn(48))).all()
    model = with_buffer(algorithm, Nothing)
    if model is not None:
        try:
            model.learn(48)
        except (ArgumentError, ValueError) as error:
            assert "get" in str(error) or "buffer" in str(error)


# --------------------------------------------------------------------- unusual orders


def quiet_callback(model):
    callback = ConvertCallback(None)
    callback.init_callback(model)
    return callback


#: Either it works, or an error says what is missing.
SAID = (ValueError, AssertionError, RuntimeError)


def works_or_is_said(call, *words):
    try:
        call()
    except SAID as error:
        message = str(error)
        assert any(word in message for word in words), message


@ALL
def test_training_before_anything_was_collected(algorithm):
    model = tiny(algorithm, make_envs())
    works_or_is_said(model.train, "rollout", "learn", "collect")
    silent(model)
    before = weights(model)
    works_or_is_said(model.train, "rollout", "learn", "collect")
    np.testing.assert_array_equal(weights(model), before)
    model.learn(32)


@ALL
def test_collecting_before_learning(algorithm):
    model = tiny(algorithm, make_envs())
    callback = quiet_callback(model)

    def collect():
        return model.collect_rollouts(model.env, callback, model.rollout_buffer, 16)

    works_or_is_said(collect, "observation", "learn", "reset")
    model.learn(32)
    assert collect()
    assert model.rollout_buffer.pos >= 16
    model.train()
    assert np.isfinite(weights(model)).all()


@ALL
def test_training_twice_on_one_rollout(algorithm):
    model = tiny(algorithm, make_envs()).learn(16)
    before = weights(model)
    model.train()
    assert np.isfinite(weights(model)).all()
    assert not np.array_equal(weights(model), before)


@ALL
def test_training_on_a_rollout_that_was_interrupted(algorithm):
    model = tiny(algorithm, make_envs()).learn(32)
    model.learn(32, lambda locals_, globals_: model.rollout_buffer.pos < 5, reset_num_timesteps=False)
    before = weights(model)
    with pytest.raises(SAID, match=r"rollout|collect|learn"):
        model.train()
    np.testing.assert_array_equal(weights(model), before)
    model.learn(32, reset_num_timesteps=False)


@ALL
def test_training_after_loading(algorithm, tmp_path):
    tiny(algorithm, make_envs()).learn(32).save(tmp_path / "model")
    model = silent(algorithm.load(tmp_path / "model", env=make_envs(), device="cpu"))
    callback = quiet_callback(model)
    works_or_is_said(model.train, "rollout", "learn", "collect")
    works_or_is_said(
        lambda: model.collect_rollouts(model.env, callback, model.rollout_buffer, 16), "observation", "learn", "reset"
    )
    model.learn(32, reset_num_timesteps=False)


@ALL
def test_collecting_after_a_failed_run(algorithm):
    model = sound_model(algorithm)
    with pytest.raises(NonFiniteError):
        model.learn(1000, broken := Breaking(set_to("action_net.weight", NAN), "middle"))
    model.policy.load_state_dict(broken.good)
    callback = quiet_callback(model)
    works_or_is_said(
        lambda: model.collect_rollouts(model.env, callback, model.rollout_buffer, 8), "observation", "learn", "reset"
    )
    model.learn(32)


@ALL
def test_collecting_in_other_environments(algorithm):
    model, other = tiny(algorithm, make_envs()).learn(32), make_envs(seed=5)
    model._last_obs, model._last_episode_starts = other.reset(), np.ones(1, dtype=bool)
    assert model.collect_rollouts(other, quiet_callback(model), model.rollout_buffer, 16)
    model.train()
    assert np.isfinite(weights(model)).all()
