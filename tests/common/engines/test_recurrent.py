"""The recurrent engine against sb3-contrib's own methods, one step after the other."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from conftest import pairs
from gymnasium import spaces
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_pg import PPO, REINFORCE, TRPO
from sb3_pg.common.arrays import take
from sb3_pg.common.batch import Batch
from sb3_pg.common.engines.protocol import Seen
from sb3_pg.common.errors import ArgumentError

ACTIONS = {
    "discrete": spaces.Discrete(3),
    "multidiscrete": spaces.MultiDiscrete([2, 3]),
    "multibinary": spaces.MultiBinary(3),
    "box": spaces.Box(-1.0, 1.0, (2,)),
}


class Ends(gym.Env):
    """Episodes that end anywhere, by themselves or by a time limit."""

    def __init__(self, actions="discrete", observations="vector", seed=0, masks=False):
        self.action_space = ACTIONS[actions]
        box = spaces.Box(-1.0, 1.0, (3,))
        image = spaces.Box(0, 255, (36, 36, 1), np.uint8)
        every = {"vector": box, "image": image, "dict": spaces.Dict(a=box, b=spaces.Discrete(3))}
        self.observation_space = every[observations]
        self.observation_space.seed(seed)
        self.random = np.random.default_rng(seed)
        if masks:
            self.action_masks = self._action_masks

    def _action_masks(self):
        n = {"discrete": 3, "multidiscrete": 5, "multibinary": 6}
        width = next(n[name] for name, space in ACTIONS.items() if space is self.action_space)
        mask = self.random.random(width) < 0.5
        mask[[0, 2, 4] if width > 3 else [0]] = True
        return mask

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        ends = self.random.random(2) < 0.08
        return self.observation_space.sample(), float(self.random.normal()), bool(ends[0]), bool(ends[1]), {}


def envs(n_envs, **options):
    return DummyVecEnv([lambda i=i: Ends(seed=i, **options) for i in range(n_envs)])


KINDS = {
    "separate": {},
    "no critic LSTM": {"enable_critic_lstm": False},
    "shared": {"enable_critic_lstm": False, "shared_lstm": True},
    "two layers": {"n_lstm_layers": 2},
    "own extractors": {"share_features_extractor": False},
}
SETTINGS = {
    PPO: {"n_steps": 40, "batch_size": 32, "n_epochs": 2},
    TRPO: {"n_steps": 40, "batch_size": 32, "n_critic_updates": 2},
    REINFORCE: {"n_episodes": 6, "n_critic_updates": 1, "critic_batch_size": 32},
}
ALL = pytest.mark.parametrize("algorithm", SETTINGS)
N_ENVS, ENGINES = [1, 3], ["auto", "autograd"]


def make(algorithm=PPO, policy="MlpLstmPolicy", n_envs=2, kind="separate", env=None, policy_kwargs=None, **arguments):
    options = {"lstm_hidden_size": 8, "net_arch": [8], **KINDS[kind], **(policy_kwargs or {})}
    env = envs(n_envs) if env is None else env
    return algorithm(policy, env, seed=0, policy_kwargs=options, **{**SETTINGS[algorithm], **arguments})


def nothing(policy, n):
    layers, _, size = policy.lstm_hidden_state_shape
    zeros = th.zeros(layers, n, size, dtype=next(policy.parameters()).dtype)
    return RNNStates((zeros, zeros), (zeros, zeros))


def unrolled(policy, rollout, states, masks=None):
    """Values, log-probabilities and entropies step by step, in the graph; the last memory; V of what was cut."""
    buffer, n, dtype = rollout.buffer, rollout.n_steps, next(policy.parameters()).dtype
    found, cuts = [], {}
    ends = {(cut.step, cut.env): cut for cut in rollout.cuts}
    for t in range(n):
        starts = th.as_tensor(buffer.episode_starts[t], dtype=dtype)
        observations = as_tensor(take(buffer.observations, t), dtype)
        actions = th.as_tensor(buffer.actions[t])
        actions = actions.flatten() if isinstance(policy.action_space, spaces.Discrete) else actions
        actions = actions.to(dtype) if isinstance(policy.action_space, spaces.MultiBinary) else actions
        v, log_prob, entropy = policy.evaluate_actions(observations, actions, states, starts)
        *_, states = policy(observations, states, starts)
        found.append((v.flatten(), log_prob, entropy))
        for env in range(rollout.n_envs):
            if (t, env) in ends:
                own = tuple(x[:, env : env + 1] for x in states.vf)
                x = as_tensor(ends[t, env].observation, dtype)
                cuts[t, env] = policy.predict_values(x, own, th.zeros(1, dtype=dtype)).item()
    return [th.stack(x) for x in zip(*found, strict=True)], states, cuts


def as_tensor(x, dtype):
    if isinstance(x, dict):
        return {k: th.as_tensor(v) for k, v in x.items()}
    return th.as_tensor(x, dtype=dtype)


class AtEnds(BaseCallback):
    """Calls a function at the end of each rollout with the memory that it began with."""

    def __init__(self, look):
        super().__init__()
        self.look, self.n_looks = look, 0

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        self.look(self.model)
        self.n_looks += 1


JUDGING = {
    "LSTM": ("MlpLstmPolicy", "vector", "auto"),
    "LSTM, autograd": ("MlpLstmPolicy", "vector", "autograd"),
    "dictionaries": ("MultiInputLstmPolicy", "dict", "auto"),
    "GRU": ("MlpGruPolicy", "vector", "auto"),
}


@pytest.mark.parametrize("judging, kind, n_envs, sequence_length", pairs(JUDGING, KINDS, N_ENVS, [None, 7]))
def test_judging_is_step_by_step(judging, kind, n_envs, sequence_length):
    """Values, log-probabilities, the values of final observations, and the memory that goes on."""
    states, (policy, observations, engine) = {}, JUDGING[judging]

    def look(model):
        rollout, n = model.rollout, model.rollout.n_steps
        before = states.get("last", nothing(model.policy, n_envs))
        with th.no_grad():
            (values, log_probs, _), after, cuts = unrolled(model.policy, rollout, before)
            last = model.policy.predict_values(
                as_tensor(model._last_obs, th.float32), after.vf, th.as_tensor(rollout.last_dones, dtype=th.float32)
            )
        judged = model.network.judge(rollout)
        np.testing.assert_allclose(judged.values, values, atol=1e-5)
        np.testing.assert_allclose(judged.log_probs, log_probs, atol=1e-5)
        np.testing.assert_allclose(rollout.buffer.values[:n], values, atol=1e-5)
        np.testing.assert_allclose(rollout.buffer.log_probs[:n], log_probs, atol=1e-5)
        expected = [*last.flatten().tolist(), *(cuts[cut.step, cut.env] for cut in rollout.cuts)]
        np.testing.assert_allclose(judged.final_values, expected, atol=1e-5)
        evaluation = model.network.evaluate(model.network.batch(rollout))
        np.testing.assert_allclose(evaluation.log_prob, log_probs.flatten(), atol=1e-5)
        np.testing.assert_allclose(evaluation.value, values.flatten(), atol=1e-5)
        for x, y in zip(model._last_memory[:2], after.pi, strict=True):
            np.testing.assert_allclose(x, y, atol=1e-5)
        if model.policy.lstm_critic is not None:
            for x, y in zip(model._last_memory[2:], after.vf, strict=True):
                np.testing.assert_allclose(x, y, atol=1e-5)
        states["last"] = after

    env, options = envs(n_envs, observations=observations), {"sequence_length": sequence_length, "engine": engine}
    model, callback = make(PPO, policy, n_envs, kind, env, **options), AtEnds(look)
    is_closed = policy == "MlpLstmPolicy" and engine == "auto"
    assert ("closed-form" in model.network.description) == is_closed
    model.learn(3 * 40 * n_envs, callback)
    assert callback.n_looks == 3


class Typed(FlattenExtractor):
    """Gives features of the type that the policy has: SB3 makes float32 of all observations."""

    def __init__(self, space):
        super().__init__(space)
        self.one = th.nn.Parameter(th.ones(()))

    def forward(self, observations):
        return super().forward(observations).to(self.one.dtype)


@pytest.mark.parametrize("kind, engine, actions", pairs(KINDS, ENGINES, ACTIONS))
def test_gradients_are_those_of_the_unrolled_policy(kind, actions, engine):
    """In float64, of a loss with all three parts; what was remembered before the rollout is a constant."""
    extractor = {} if engine == "auto" else {"features_extractor_class": Typed}
    model = make(PPO, kind=kind, env=envs(2, actions=actions), n_epochs=1, learning_rate=0.0, policy_kwargs=extractor)
    model.learn(160)
    assert ("closed-form" in model.network.description) == (engine == "auto")
    policy, rollout = model.policy.double(), model.rollout
    engine, random = model._refreshed_network(), np.random.default_rng(0)
    n = rollout.n_steps * rollout.n_envs
    a, b = (th.as_tensor(random.normal(size=n)) for _ in range(2))
    memory = [x.astype(np.float64) for x in rollout.memory]
    rollout.memory = tuple(memory)
    batch = engine.batch(rollout)
    batch.memory = tuple(x.astype(np.float64) for x in batch.memory)
    engine.evaluate(batch).backward(a, -0.3, b)
    found = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.optimizer.zero_grad()
    for name in ("features_extractor", "pi_features_extractor", "vf_features_extractor"):
        setattr(policy, name, Typed(model.observation_space).double())
    pi, vf = (tuple(th.as_tensor(x) for x in memory[i : i + 2]) for i in (0, 2))
    (values, log_probs, entropies), *_ = unrolled(policy, rollout, RNNStates(pi, vf))
    ((a * log_probs.flatten()).mean() - 0.3 * entropies.mean() + (b * values.flatten()).mean()).backward()
    for name, p in policy.named_parameters():
        if "extractor.one" in name:
            continue
        expected = np.zeros(p.shape) if p.grad is None else p.grad
        np.testing.assert_allclose(found.get(name, np.zeros(p.shape)), expected, atol=1e-10, err_msg=name)


@pytest.mark.parametrize(
    "algorithm, actions, n_envs, sequence_length, engine", pairs(SETTINGS, ACTIONS, N_ENVS, [None, 5], ENGINES)
)
def test_all_learn(algorithm, actions, n_envs, sequence_length, engine):
    model = make(algorithm, env=envs(n_envs, actions=actions), sequence_length=sequence_length, engine=engine)
    before = model.policy.parameters_to_vector()
    model.learn(200)
    assert model.network.description.startswith("recurrent")
    assert np.isfinite(model.policy.parameters_to_vector()).all()
    assert not np.array_equal(model.policy.parameters_to_vector(), before)


OBSERVATIONS = {
    "CnnLstmPolicy": "image",
    "MultiInputLstmPolicy": "dict",
    "CnnGruPolicy": "image",
    "MlpGruPolicy": "vector",
}


@pytest.mark.parametrize("algorithm, policy, kind", pairs(SETTINGS, OBSERVATIONS, KINDS))
def test_all_learn_from_images_and_dictionaries(algorithm, policy, kind):
    observations = OBSERVATIONS[policy]
    model = make(algorithm, policy, kind=kind, env=envs(2, observations=observations))
    model.learn(100)
    assert np.isfinite(model.policy.parameters_to_vector()).all()


@pytest.mark.parametrize(
    "algorithm, actions, engine", pairs(SETTINGS, ["discrete", "multidiscrete", "multibinary"], ENGINES)
)
def test_masks_and_memory_together(algorithm, actions, engine):
    class Allowed(BaseCallback):
        def _on_step(self):
            masks, actions = self.locals["action_masks"], self.locals["actions"].reshape(2, -1)
            sizes = {"discrete": [3], "multidiscrete": [2, 3], "multibinary": [2, 2, 2]}[self.kind]
            for mask, row in zip(masks, actions, strict=True):
                for part, choice in zip(np.split(mask, np.cumsum(sizes)[:-1]), row, strict=True):
                    assert part[int(choice)]
            return True

    callback = Allowed()
    callback.kind = actions
    model = make(algorithm, env=envs(2, actions=actions, masks=True), engine=engine)
    model.learn(200, callback)
    evaluation = model.network.evaluate(model.network.batch(model.rollout))
    if algorithm is not TRPO and actions == "discrete":
        assert float(np.asarray(evaluation.entropy).min()) < 0.2  # where one action is allowed, there is none
    if algorithm is TRPO:
        assert model.logger.name_to_value["train/kl_divergence_loss"] < model.target_kl


@pytest.mark.parametrize("kind, engine, every", pairs(KINDS, ENGINES, [1, 2]))
def test_fisher_products_go_through_the_recurrence(kind, every, engine):
    """They are the second derivative of the KL along a direction."""
    model = make(TRPO, kind=kind, n_envs=3, engine=engine)
    model.learn(240)
    batch = model.network.batch(model.rollout)
    actor = model.network.actor(batch)
    assert not actor.old.kl.any()
    start = actor.vector
    product = actor.fisher(every)
    direction = np.random.default_rng(0).normal(size=len(start)).astype(np.float32)
    direction = th.as_tensor(direction) if isinstance(start, th.Tensor) else direction
    quadratic = float(direction @ product(direction)) / 2
    kept = np.unique(batch.sequences, return_inverse=True)[1] % every == 0
    divergences = []
    for size in (3e-3, -3e-3):
        actor.vector = start + size * direction
        divergences.append(float(actor.look().kl[kept].mean()))
    assert np.mean(divergences) == pytest.approx(quadratic * 9e-6, rel=0.03)


@pytest.mark.parametrize("algorithm, kind, engine", pairs(SETTINGS, KINDS, ENGINES))
def test_predicting_with_state_is_acting(algorithm, kind, engine):
    model = make(algorithm, kind=kind, engine=engine)
    model.learn(100)
    env, state = model.get_env(), None
    observations, starts, memory = env.reset(), np.ones(2, bool), None
    for _ in range(30):
        actions, state = model.predict(observations, state, starts, deterministic=True)

        acted = model.network.act(Seen(observations, None, starts, memory), deterministic=True)
        np.testing.assert_array_equal(actions, acted.actions)
        memory = acted.memory
        for x, y in zip(memory[:2], state, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
        observations, _, starts, _ = env.step(actions)


@ALL
def test_gru(algorithm, tmp_path):
    model = make(algorithm, "MlpGruPolicy")
    names = {name for name, _ in model.policy.named_parameters()}
    assert model.policy.lstm_actor.weight_hh_l0.shape == (3 * 8, 8)
    assert {id(p) for group in model.policy.optimizer.param_groups for p in group["params"]} == set(
        map(id, model.policy.parameters())
    )
    model.learn(100)
    model.save(tmp_path / "gru")
    again = algorithm.load(tmp_path / "gru")
    assert {name for name, _ in again.policy.named_parameters()} == names
    observations = np.zeros((2, 3), np.float32)
    (a, state), (b, other) = (m.predict(observations, deterministic=True) for m in (model, again))
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(state[0], other[0])


@pytest.mark.parametrize("method", ["forward", "extract_features", "_process_sequence"])
def test_policies_that_use_their_memory_otherwise_are_refused(method):
    own = type("Own", (RecurrentActorCriticPolicy,), {method: lambda self, *args, **kwargs: None})
    with pytest.raises(ArgumentError, match=f"Own has a `{method}` of its own"):
        make(PPO, own).learn(10)


@ALL
def test_the_closed_form_comes_back(algorithm):
    model = make(algorithm)
    model.learn(50)
    handle = model.policy.lstm_actor.register_forward_hook(lambda *_: None)
    model.learn(50)
    assert model.network.description == "recurrent, autograd (LSTM has a hook)"
    handle.remove()
    model.policy.lstm_critic.requires_grad_(False)
    model.learn(50)
    assert model.network.description == "recurrent, autograd (parameters are frozen)"
    model.policy.requires_grad_(False)
    before = model.policy.parameters_to_vector()
    model.learn(50)
    np.testing.assert_array_equal(model.policy.parameters_to_vector(), before)
    model.policy.requires_grad_(True)
    model.learn(50)
    assert model.network.description == "recurrent, closed-form"


@pytest.mark.parametrize("lstm_kwargs", [{"bias": False}, {"dropout": 0.1}])
def test_lstms_of_other_kinds_take_autograd(lstm_kwargs):
    model = make(PPO, kind="two layers", policy_kwargs={"lstm_kwargs": lstm_kwargs})
    model.learn(80)
    assert model.network.description.startswith("recurrent, autograd")


def test_minibatches_hold_as_many_stretches_as_batch_size_needs():
    """And no piece is left over in their middle."""
    sequences = np.repeat([0, 1, 2, 3], [19, 3, 18, 2])
    batch = Batch(np.zeros((len(sequences), 3)), sequences=sequences)
    assert [len(x) for x in batch.minibatches(10)] == [19, 21, 2]
    assert [len(x) for x in batch.minibatches(20)] == [22, 20]
    assert [len(x) for x in batch.minibatches(1)] == [19, 3, 18, 2]
    assert [len(x) for x in batch.minibatches(None)] == [42]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("n_envs", N_ENVS)
def test_a_policy_that_a_callback_puts_in_goes_on_with_what_was_remembered(engine, n_envs):
    columns = {}

    class Replacing(BaseCallback):
        def _on_step(self):
            if self.n_calls == 15:
                old = self.model.policy
                kwargs = self.model.policy_kwargs
                new = type(old)(old.observation_space, old.action_space, self.model.lr_schedule, **kwargs)
                self.policies, self.model.policy = [old, new], new
            return True

        def _on_rollout_end(self):
            n = self.model.rollout.n_steps
            columns.update({x: getattr(self.model.rollout_buffer, x)[:n].copy() for x in ("values", "log_probs")})

    model, callback = make(PPO, n_envs=n_envs, engine=engine, learning_rate=0.0, n_steps=40), Replacing()
    model.learn(1, callback)
    rollout, (old, new) = model.rollout, callback.policies
    with th.no_grad():
        (_, of_old, _), *_ = unrolled(old, rollout, nothing(old, n_envs))
        np.testing.assert_allclose(columns["log_probs"][:15], of_old[:15], atol=1e-5)
        states = nothing(old, n_envs)
        for t in range(40):
            policy, starts = old if t < 15 else new, th.as_tensor(rollout.buffer.episode_starts[t])
            x, actions = th.as_tensor(rollout.buffer.observations[t]), th.as_tensor(rollout.buffer.actions[t]).flatten()
            v, log_prob, _ = policy.evaluate_actions(x, actions, states, starts)
            *_, states = policy(x, states, starts)
            np.testing.assert_allclose(columns["values"][t], v.flatten(), atol=1e-5)
            np.testing.assert_allclose(columns["log_probs"][t], log_prob, atol=1e-5)


@pytest.mark.parametrize("policy", ["MlpLstmPolicy", "MlpGruPolicy"])
def test_what_is_remembered_lies_as_cudnn_wants_it(policy):
    """Else "rnn: hx is not contiguous", on a GPU alone."""
    model, seen = make(PPO, policy, n_envs=3, kind="two layers", engine="autograd"), []
    model.policy.lstm_actor.register_forward_pre_hook(lambda _, given: seen.extend(x.is_contiguous() for x in given[1]))
    model.learn(1)
    assert seen and all(seen)
