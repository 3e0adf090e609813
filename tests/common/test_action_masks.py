"""Masks of allowed actions: acting, judging, stepping and predicting among what is allowed."""

import gc
import subprocess
import sys
import threading
import weakref

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from conftest import pairs
from gymnasium import spaces
from sb3_contrib import MaskablePPO
from sb3_contrib.common.envs import (
    InvalidActionEnvDiscrete,
    InvalidActionEnvMultiBinary,
    InvalidActionEnvMultiDiscrete,
)
from sb3_contrib.common.maskable.evaluation import evaluate_policy as contrib_evaluate_policy
from sb3_contrib.common.wrappers import ActionMasker
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize
from tiny_models import OwnGet

from sb3_pg import PPO, REINFORCE, TRPO
from sb3_pg.common.errors import ArgumentError
from sb3_pg.common.masks import checked_masks

SPACES = {
    "discrete": spaces.Discrete(6),
    "start": spaces.Discrete(6, start=-3),
    "multidiscrete": spaces.MultiDiscrete([3, 5, 2]),
    "multibinary": spaces.MultiBinary(4),
}


class Guarded(gym.Env):
    """Refuses forbidden actions with an error; observations say nothing of what is allowed."""

    def __init__(self, space="discrete", observations="vector", length=9, wrong=None):
        self.action_space = SPACES[space]
        self.wrong, self.length, self.kind = wrong, length, observations
        box = spaces.Box(-1.0, 1.0, (3,))
        image = spaces.Box(0, 255, (36, 36, 1), np.uint8)
        self.observation_space = {"vector": box, "image": image, "dict": spaces.Dict(a=box, b=spaces.Discrete(3))}[
            observations
        ]
        self.sizes = {"discrete": [6], "start": [6], "multidiscrete": [3, 5, 2], "multibinary": [2] * 4}[space]
        self.random = np.random.default_rng(0)

    def _look(self):
        self.mask = [self.random.random(n) < 0.4 for n in self.sizes]
        for mask in self.mask:
            mask[self.random.integers(len(mask))] = True
        return self.observation_space.sample()

    def action_masks(self):
        if self.wrong is not None and self.t == 3:
            return self.wrong
        return np.concatenate(self.mask)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self._look(), {}

    def step(self, action):
        choices = np.atleast_1d(action) - getattr(self.action_space, "start", 0)
        for mask, choice in zip(self.mask, choices, strict=True):
            assert mask[int(choice)], (action, self.mask)
        self.t += 1
        return self._look(), float(np.sum(choices)), False, self.t >= self.length, {}


class OwnForward(ActorCriticPolicy):
    """Acts by its own code."""

    def forward(self, obs, deterministic=False):
        return super().forward(obs, deterministic)


class OwnExtract(ActorCriticPolicy):
    """Computed by autograd and formulas."""


class OwnDistribution(ActorCriticPolicy):
    """Makes its distribution itself, of SB3's kind."""

    def _get_action_dist_from_latent(self, latent_pi):
        return self.action_dist.proba_distribution(action_logits=2.0 * self.action_net(latent_pi))


SETTINGS = {
    PPO: {"n_steps": 32, "batch_size": 16, "n_epochs": 2},
    TRPO: {"n_steps": 32, "batch_size": 16, "n_critic_updates": 2},
    REINFORCE: {"n_episodes": 4, "n_critic_updates": 1},
}
ALL = pytest.mark.parametrize("algorithm", SETTINGS)
EVERY_SPACE = pytest.mark.parametrize("space", SPACES)
POLICIES = {
    "MlpPolicy": ("MlpPolicy", "vector"),
    "CnnPolicy": ("CnnPolicy", "image"),
    "MultiInputPolicy": ("MultiInputPolicy", "dict"),
    "own forward": (OwnForward, "vector"),
    "own class": (OwnExtract, "vector"),
    "own distribution": (OwnDistribution, "vector"),
}


def make(algorithm, space="discrete", policy="MlpPolicy", n_envs=2, vec=DummyVecEnv, **arguments):
    kind, observations = POLICIES[policy]
    env = vec([lambda i=i: Guarded(space, observations, 9 + 4 * i) for i in range(n_envs)])
    return algorithm(kind, env, seed=0, **{**SETTINGS[algorithm], **arguments})


@pytest.mark.parametrize("algorithm, space, policy", pairs(SETTINGS, SPACES, POLICIES))
def test_only_allowed_actions_are_chosen(algorithm, space, policy):
    model = make(algorithm, space, policy)
    model.learn(100)
    assert model.rollout.masks
    assert (model.network.description == "closed-form") == (policy == "MlpPolicy")


@pytest.mark.parametrize("algorithm, space, engine", pairs(SETTINGS, SPACES, ["auto", "autograd"]))
def test_learned_from_is_the_masked_distribution(algorithm, space, engine):
    """Log-probabilities and entropies against sb3-contrib's own masked distributions."""
    from sb3_contrib.common.maskable.distributions import make_masked_proba_distribution

    model = make(algorithm, space, engine=engine, learning_rate=0.0)
    model.learn(1)
    rollout, batch = model.rollout, model.network.batch(model.rollout)
    x, actions = th.as_tensor(rollout.column("observations")), th.as_tensor(rollout.column("actions"))
    masks = rollout.mask_rows()
    evaluation = model.network.evaluate(batch)
    with th.no_grad():
        latent = model.policy.mlp_extractor.forward_actor(x)
        logits = model.policy.action_net(latent)
    if space == "multibinary":  # as sb3-contrib has it: two options for each
        logits = th.stack([th.zeros_like(logits), logits], dim=-1).flatten(1)
    distribution = make_masked_proba_distribution(model.action_space).proba_distribution(logits)
    distribution.apply_masking(masks)
    actions = actions.flatten() if isinstance(model.action_space, spaces.Discrete) else actions
    np.testing.assert_allclose(np.asarray(evaluation.log_prob), distribution.log_prob(actions), atol=1e-5)
    np.testing.assert_allclose(np.asarray(evaluation.entropy), distribution.entropy(), atol=1e-5)
    if algorithm is not TRPO:
        np.testing.assert_allclose(rollout.column("log_probs"), distribution.log_prob(actions), atol=1e-5)


@EVERY_SPACE
@pytest.mark.parametrize("policy", ["MlpPolicy", "own distribution"])
def test_the_trust_region_is_the_masked_policys(space, policy):
    """The Fisher matrix is the Hessian of the masked KL; the KL of the step is below the limit."""
    model = make(TRPO, space, policy, target_kl=0.01)
    model.learn(200)
    assert model.logger.name_to_value["train/kl_divergence_loss"] < 0.01
    assert model.logger.name_to_value["train/is_line_search_success"] == 1.0
    batch = model.network.batch(model.rollout)
    actor = model.network.actor(batch)
    actor.old  # noqa: B018
    start, product = actor.vector, actor.fisher()
    direction = np.random.default_rng(0).normal(size=len(start)).astype(np.float32)
    direction = th.as_tensor(direction) if isinstance(start, th.Tensor) else direction
    quadratic = float(direction @ product(direction)) / 2
    divergences, size = [], 3e-3
    for signed in (size, -size):  # their mean has no term of third order
        actor.vector = start + signed * direction
        divergences.append(float(actor.look().kl.mean()))
    assert np.mean(divergences) == pytest.approx(quadratic * size**2, rel=0.02)


@ALL
def test_use_masking_false_ignores_masks(algorithm):
    model = make(algorithm, use_masking=False)
    with pytest.raises(AssertionError):
        model.learn(100)
    assert not model._rollout.masks


@pytest.mark.parametrize("algorithm, policy, space", pairs(SETTINGS, POLICIES, SPACES))
def test_predict_with_masks(algorithm, policy, space):
    model = make(algorithm, space, policy)
    env = model.get_env()
    observations = env.reset()
    for deterministic in (True, False):
        for _ in range(20):
            masks = np.stack(env.env_method("action_masks"))
            actions, state = model.predict(observations, deterministic=deterministic, action_masks=masks)
            assert state is None
            observations, *_ = env.step(actions)  # which refuses forbidden ones
    single = observations[0] if isinstance(observations, np.ndarray) else {k: v[0] for k, v in observations.items()}
    mask = np.stack(env.env_method("action_masks"))[0]
    action, _ = model.predict(single, deterministic=True, action_masks=mask)
    assert model.action_space.contains(action.item() if action.ndim == 0 else action.astype(model.action_space.dtype))
    again, _ = model.predict(single, deterministic=True, action_masks=np.ones_like(mask))
    plain, _ = model.predict(single, deterministic=True)
    np.testing.assert_array_equal(again, plain)


@pytest.mark.parametrize("wrapped", [False, True])
@ALL
def test_sb3s_evaluation_and_callback_mask(algorithm, wrapped):
    """The environment refuses forbidden actions, so that it is enough that they pass."""
    model = make(algorithm)
    env = DummyVecEnv([lambda: Monitor(Guarded())] * 2)
    if wrapped:
        env = VecNormalize(env, norm_reward=False)
        model = algorithm("MlpPolicy", VecNormalize(DummyVecEnv([lambda: Monitor(Guarded())])), **SETTINGS[algorithm])
    evaluate_policy(model, env, n_eval_episodes=4)
    evaluate_policy(model, env, n_eval_episodes=4, deterministic=False)
    contrib_evaluate_policy(model, env, n_eval_episodes=4)
    callback = EvalCallback(env, eval_freq=20, n_eval_episodes=2, verbose=0)
    model.learn(100, callback)
    assert callback.evaluations_results or callback.last_mean_reward > -np.inf
    if not wrapped:
        evaluate_policy(model, Monitor(Guarded()), n_eval_episodes=2)


def test_evaluation_without_masking_is_unmasked():
    model = make(PPO, use_masking=False)
    with pytest.raises(AssertionError):
        evaluate_policy(model, DummyVecEnv([lambda: Monitor(Guarded())]), n_eval_episodes=4, deterministic=False)


@ALL
def test_subprocesses_and_action_masker(algorithm):
    def masker():
        env = Guarded()
        ask, env.unwrapped.action_masks = env.action_masks, None
        return ActionMasker(env, lambda _: ask())

    model = algorithm("MlpPolicy", DummyVecEnv([masker]), **SETTINGS[algorithm])
    model.learn(60)
    assert model.rollout.masks
    env = SubprocVecEnv([Guarded, Guarded], start_method="fork")
    try:
        model = algorithm("MlpPolicy", env, **SETTINGS[algorithm])
        model.learn(60)
        assert model.rollout.masks[0].shape == (2, 6)
    finally:
        env.close()


@ALL
@pytest.mark.parametrize(
    "wrong, message",
    [
        (np.zeros(6), "environment 1 at step 3 .* allow no action"),
        (np.ones(5), r"at step 3 .*shape \(2, 6\)"),
        (np.ones(7), "at step 3"),
        (["yes"] * 6, "at step 3"),
        (None, None),
    ],
)
def test_wrong_masks_are_named(algorithm, wrong, message):
    env = DummyVecEnv([lambda: Guarded(length=20), lambda: Guarded(length=20, wrong=wrong)])
    model = algorithm("MlpPolicy", env, **SETTINGS[algorithm])
    if message is None:
        model.learn(40)
        return
    with pytest.raises(ArgumentError, match=message):
        model.learn(40)


def test_masks_of_choices_are_checked_one_by_one():
    space = spaces.MultiDiscrete([2, 3])
    assert checked_masks(space, [[1, 0, 0, 0, 1]], 1).tolist() == [[True, False, False, False, True]]
    with pytest.raises(ArgumentError, match="environment 1 allow no option of choice 1"):
        checked_masks(space, [[1, 0, 0, 0, 1], [1, 1, 0, 0, 0]], 2)
    with pytest.raises(ArgumentError, match="environment 0 allow no option of choice 2"):
        checked_masks(spaces.MultiBinary(3), [1, 1, 1, 0, 0, 0], 1)
    with pytest.raises(ArgumentError, match="Box"):
        checked_masks(spaces.Box(-1, 1, (2,)), [1, 1], 1)
    with pytest.raises(ArgumentError, match="`action_masks`"):
        make(PPO).predict(np.zeros((2, 3), np.float32), action_masks=np.ones(6))


@pytest.mark.parametrize("algorithm", SETTINGS)
@pytest.mark.parametrize("engine", ["auto", "autograd"])
@pytest.mark.parametrize(
    "env",
    [
        lambda: InvalidActionEnvDiscrete(dim=20, n_invalid_actions=10),
        lambda: InvalidActionEnvMultiDiscrete(dims=[4, 5], n_invalid_actions=4),
        lambda: InvalidActionEnvMultiBinary(dims=4, n_invalid_actions=3),
    ],
)
def test_sb3_contribs_environments(algorithm, engine, env):
    class Allowed(BaseCallback):
        def _on_step(self):
            for inner, action in zip(self.training_env.envs, self.locals["actions"], strict=True):
                sizes = {spaces.Discrete: lambda s: [s.n], spaces.MultiDiscrete: lambda s: list(s.nvec)}.get(
                    type(inner.action_space), lambda s: [2] * s.n
                )(inner.action_space)
                allowed = np.split(self.asked.pop(0), np.cumsum(sizes)[:-1])
                assert all(a[int(i)] for a, i in zip(allowed, np.atleast_1d(action), strict=True))
            return True

    inner, callback = env(), Allowed()
    callback.asked, ask = [], inner.action_masks

    def asking():
        callback.asked.append(np.asarray(ask()))
        return callback.asked[-1]

    inner.action_masks = asking
    model = algorithm("MlpPolicy", inner, engine=engine, seed=0, **SETTINGS[algorithm])
    model.learn(150, callback)


@ALL
def test_buffers_with_their_own_get_are_refused(algorithm):
    extra = {"n_steps": 16} if algorithm is REINFORCE else {}
    model = make(algorithm, rollout_buffer_class=OwnGet, **extra)
    with pytest.raises(ArgumentError, match="use_masking=False"):
        model.learn(64)


@ALL
def test_a_stopped_rollout_keeps_its_masks(algorithm):
    class Stop(BaseCallback):
        def _on_step(self):
            return self.n_calls < 5

    model = make(algorithm)
    model.learn(100, Stop())
    model.learn(1, reset_num_timesteps=False)
    assert len(model.rollout.masks) == model.rollout.n_steps


CONTRIB = {
    "discrete": lambda: InvalidActionEnvDiscrete(dim=20, n_invalid_actions=10),
    "multidiscrete": lambda: InvalidActionEnvMultiDiscrete(dims=[4, 5], n_invalid_actions=4),
    "multibinary": lambda: InvalidActionEnvMultiBinary(dims=4, n_invalid_actions=3),
}


def predictions(model, env):
    """What a model does in fifty states of an environment."""
    np.random.seed(0)
    env.action_space.seed(0)
    env.observation_space.seed(0)
    env.reset()
    observations, masks = [], []
    for _ in range(50):
        env._choose_next_state()
        observations.append(env.observation_space.sample())
        masks.append(env.action_masks())
    return model.predict(np.stack(observations), deterministic=True, action_masks=np.stack(masks))[0]


@pytest.mark.parametrize("space", CONTRIB)
def test_archives_of_maskable_ppo(space, tmp_path):
    env = CONTRIB[space]()
    theirs = MaskablePPO("MlpPolicy", env, n_steps=64, n_epochs=2, seed=0).learn(128)
    theirs.save(tmp_path / "theirs")
    ours = PPO.load(tmp_path / "theirs", env=env)
    np.testing.assert_array_equal(predictions(ours, env), predictions(theirs, env))
    ours.learn(128, reset_num_timesteps=False)
    assert ours.rollout.masks
    ours.save(tmp_path / "ours")
    again = PPO.load(tmp_path / "ours", env=env)
    np.testing.assert_array_equal(predictions(again, env), predictions(ours, env))
    assert again.policy_class is ours.policy_class is ActorCriticPolicy
    if space != "multibinary":
        back = MaskablePPO.load(tmp_path / "ours", env=env)
        np.testing.assert_array_equal(predictions(back, env), predictions(ours, env))
        back.learn(64)


def test_moments_of_a_masked_archive_are_kept(tmp_path):
    env = CONTRIB["multibinary"]()
    theirs = MaskablePPO("MlpPolicy", env, n_steps=64, n_epochs=2, seed=0).learn(128)
    theirs.save(tmp_path / "theirs")
    ours = PPO.load(tmp_path / "theirs", env=env)
    x = th.as_tensor(np.stack([env.observation_space.sample() for _ in range(20)]))
    with th.no_grad():  # of on, as sb3-contrib has it for each number
        expected = th.stack([d.probs[:, 1] for d in theirs.policy.get_distribution(x).distributions], dim=1)
        np.testing.assert_allclose(ours.policy.get_distribution(x).distribution.probs, expected, atol=1e-6)
    moments = [state["exp_avg"] for state in theirs.policy.optimizer.state.values()]
    for found, x in zip(ours.policy.optimizer.state.values(), moments, strict=True):
        expected = x[1::2] if len(x) == 8 else x
        np.testing.assert_array_equal(found["exp_avg"], expected)


@pytest.mark.parametrize("algorithm", [TRPO, REINFORCE])
def test_archives_of_the_other_two_name_sb3s_policies(algorithm, tmp_path):
    model = make(algorithm)
    model.learn(64)
    model.save(tmp_path / "model")
    assert algorithm.load(tmp_path / "model").policy_class is ActorCriticPolicy


def test_moments_of_a_shared_extractor_are_numbered_once(tmp_path):
    """Its parameters have several names, but one number each in the optimizer."""
    env = Guarded("multibinary", "image")
    theirs = MaskablePPO("CnnPolicy", env, n_steps=16, batch_size=16, n_epochs=1, seed=0).learn(16)
    theirs.save(tmp_path / "theirs")
    ours = PPO.load(tmp_path / "theirs", env=env)
    for p, state in ours.policy.optimizer.state.items():
        assert state["exp_avg"].shape == p.shape
    ours.learn(16)


@ALL
def test_masks_that_are_no_method(algorithm):
    class Attribute(Guarded):
        action_masks = np.ones(6, bool)

    with pytest.raises(ArgumentError, match="must be a method"):
        algorithm("MlpPolicy", Attribute(), **SETTINGS[algorithm]).learn(10)
    with pytest.raises(AssertionError):  # by an environment that refuses forbidden actions
        algorithm("MlpPolicy", Attribute(), use_masking=False, **SETTINGS[algorithm]).learn(100)


WITHOUT_CONTRIB = """
import sys
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name.startswith("sb3_contrib") else find_spec(name, *more)
sys.modules["sb3_contrib"] = None
import numpy as np
from sb3_pg import PPO
model = PPO.load(sys.argv[1])
print(model.policy_class.__name__, model.predict(np.zeros(3, np.float32), deterministic=True)[0])
"""


def test_a_masked_archive_loads_without_sb3_contrib(tmp_path):
    model = make(PPO)
    model.learn(64)
    model.save(tmp_path / "model.zip")
    command = [sys.executable, "-c", WITHOUT_CONTRIB, str(tmp_path / "model.zip")]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    action = model.predict(np.zeros(3, np.float32), deterministic=True)[0]
    assert done.stdout.split() == ["ActorCriticPolicy", str(action)]


def test_predictions_of_others_within_an_evaluation_are_not_masked():
    """An opponent that moves within the environment, and a callback that asks for a single action."""
    opponent, asked = make(PPO), []

    class WithOpponent(Guarded):
        def reset(self, **options):
            asked.append(opponent.predict(np.zeros((1, 3), np.float32), deterministic=True)[0])
            return super().reset(**options)

    model = make(PPO)
    env = DummyVecEnv([WithOpponent, WithOpponent])
    single = lambda *_: asked.append(model.predict(np.zeros(3, np.float32), deterministic=True)[0])  # noqa: E731
    evaluate_policy(model, env, n_eval_episodes=2, callback=single, warn=False)
    plain = opponent.predict(np.zeros((1, 3), np.float32), deterministic=True)[0]
    assert all((x == plain).all() for x in asked)


def test_environments_are_let_go_of_after_an_evaluation():
    model, env = make(PPO), SubprocVecEnv([Guarded], start_method="fork")
    evaluate_policy(model, env, n_eval_episodes=1, warn=False)
    env.close()
    reference = weakref.ref(env)
    del env
    gc.collect()
    assert reference() is None


@ALL
def test_masking_may_be_changed_while_a_rollout_waits(algorithm):
    class Stop(BaseCallback):
        def _on_step(self):
            return self.n_calls < 5

    class Tolerant(Guarded):
        def step(self, action):
            return self._look(), 0.0, self.random.random() < 0.2, False, {}

    model = algorithm("MlpPolicy", DummyVecEnv([Tolerant]), seed=0, **SETTINGS[algorithm])
    model.learn(100, Stop())
    model.use_masking = False
    model.learn(1, reset_num_timesteps=False)
    assert not model.rollout.masks
    model.learn(100, Stop())
    model.use_masking = True
    model.learn(1, reset_num_timesteps=False)
    assert len(model.rollout.masks) == model.rollout.n_steps


@pytest.mark.parametrize("policy", ["own forward", "own class", "own distribution"])
def test_threads_predict_with_masks_of_their_own(policy):
    """On autograd, where a policy chooses by its one distribution object; and one thread without masks."""
    model, masks = make(PPO, policy=policy), [*np.eye(6, dtype=bool), None]
    x = np.random.default_rng(0).uniform(-1, 1, (4, 3)).astype(np.float32)
    plain = model.predict(x, deterministic=True)[0]
    expected = [plain if mask is None else np.full(4, mask.argmax()) for mask in masks]
    wrong, interval = [], sys.getswitchinterval()

    def ask(mask, actions):
        allowed = None if mask is None else np.tile(mask, (4, 1))
        for _ in range(60):
            found, _ = model.predict(x, deterministic=True, action_masks=allowed)
            if not np.array_equal(found, actions):
                wrong.append((mask, found))

    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=ask, args=pair) for pair in zip(masks, expected, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


def test_what_a_masked_policy_sets_of_itself_is_kept():
    class Counting(ActorCriticPolicy):
        n_calls = 0

        def forward(self, obs, deterministic=False):
            self.n_calls += 1
            return super().forward(obs, deterministic)

    model = PPO(Counting, Guarded(), seed=0, **SETTINGS[PPO]).learn(32)
    assert model.policy.n_calls == 32
    distribution = model.policy.action_dist
    model.policy.set_training_mode(True)
    model.predict(np.zeros(3, np.float32), action_masks=np.ones(6, bool))
    assert model.policy.action_dist is distribution
    assert not model.policy.training
