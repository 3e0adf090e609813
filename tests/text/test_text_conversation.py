"""Conversations of several turns: what is shown, acted, rewarded and learned from."""

import pickle

import numpy as np
import pytest
import torch as th
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from text_models import Infos
from tokenizers.processors import TemplateProcessing

from sb3_pg import PPO, REINFORCE, TRPO
from sb3_pg.common.errors import ArgumentError, NonFiniteError
from sb3_pg.text import ChatEnv, Reply, word_tokenizer
from sb3_pg.text.games import Calculator, GuessingGame, calculate
from sb3_pg.text.rows import TextRolloutBuffer
from sb3_pg.text.supervised import pretrain, train

pytestmark = pytest.mark.filterwarnings("ignore:.*render_mode='rgb_array'.*")

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": None,
}


def message(role, content):
    return {"role": role, "content": content}


def model_of(env):
    ends = list(env.action_space.end_tokens)
    return {**LLAMA, "vocab_size": int(env.action_space.n), "eos_token_id": ends, "max_position_embeddings": 64}


def words(env, row):
    return " ".join(env.tokenizer.convert_ids_to_tokens([int(token) for token in row if token >= 0]))


def say(env, text):
    """Step through a turn; returns what its last step has given."""
    for word in text.split():
        returned = env.step(env.tokenizer.convert_tokens_to_ids(word))
    return returned


@pytest.mark.parametrize("game", [GuessingGame, Calculator])
def test_games_follow_gymnasium_and_sb3(game):
    check_env(game(), skip_render_check=True)
    sb3_check_env(game())


def test_a_guessing_game():
    env = GuessingGame()
    env.reset(seed=0)
    env._state = 6
    row, reward, terminated, truncated, info = env.step(env.tokenizer.convert_tokens_to_ids("4"))
    assert (reward, terminated, truncated, info) == (0.0, False, False, {})
    assert words(env, row) == "<user> guess a number <end> <assistant> 4"
    row, reward, terminated, _, info = say(env, "<end>")
    assert (reward, terminated) == (0.0, False)
    assert info == {"completion": "4", "ended": True, "is_success": False}
    first = "<user> guess a number <end> <assistant> 4 <end> <user> higher <end> <assistant>"
    assert words(env, row) == first
    assert (row[env.width :] == -1).all() and (row[-2 - len(first.split()) :][:-2] >= 0).all()
    row, reward, terminated, _, info = say(env, "higher 9")  # cut off: the environment ends the turn
    assert (reward, terminated, info["ended"]) == (-0.2, False, False)
    assert words(env, row) == first + " higher 9 <end> <user> a number <end> <assistant>"
    assert words(env, say(env, "8 <end>")[0]).endswith("8 <end> <user> lower <end> <assistant>")
    assert env.render().splitlines()[-1] == "user: lower"
    row, reward, terminated, truncated, info = say(env, "6 <end>")
    assert (reward, terminated, truncated) == (1.0, True, False)
    assert (info["n_turns"], info["too_long"], info["is_success"]) == (4, False, True)
    contents = [its["content"] for its in info["messages"]]
    assert contents == ["guess a number", "4", "higher", "higher 9", "a number", "8", "lower", "6"]
    assert words(env, row[env.width :]) == "6 <end>"


def test_a_conversation_ends_after_its_turns():
    env = GuessingGame()
    env.reset(seed=0)
    env._state = 0
    done = [say(env, "1 <end>")[2] for _ in range(4)]
    assert done == [False, False, False, True]


def test_a_sum_with_the_calculator():
    env = Calculator()
    env.reset(seed=0)
    env._state = {"right": 17, "called": False}
    row, reward, terminated, *_ = say(env, "calc 3 * 4 + 5 <end>")
    assert (reward, terminated) == (0.1, False)
    assert words(env, row).endswith("calc 3 * 4 + 5 <end> <tool> 1 7 <end> <assistant>")
    assert say(env, "calc 3 <end>")[1] == 0.0  # once is enough
    _, reward, terminated, _, info = say(env, "1 7 <end>")
    assert (reward, terminated, info["is_success"]) == (1.0, True, True)
    env.reset()
    assert words(env, say(env, "calc 3 * <end>")[0]).endswith("<tool> error <end> <assistant>")
    _, reward, terminated, _, info = say(env, "9 9 9 <end>")
    assert (reward, terminated, info["is_success"]) == (0.0, True, False)


@pytest.mark.parametrize(
    "text, expected",
    [("3 * 4 + 5", 17), ("3 + 4 * 5", 23), ("7", 7), ("9 * 9 * 9", 729), ("3 *", None), ("3 4", None), ("", None)],
)
def test_calculate(text, expected):
    assert calculate(text.split()) == expected


# ---------------------------------------------------------------- any template


def chat_tokenizer():
    """As those of chat models: a start token, and an end of turns that is not the end of texts."""
    tokenizer = word_tokenizer(["a", "b", "c", "<start>", "<turn>", "<user>", "<assistant>", "<system>"])
    tokenizer.add_special_tokens({"bos_token": "<start>", "additional_special_tokens": ["<turn>"]})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<start> $A", special_tokens=[("<start>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}> {{ m.content }}<turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    return tokenizer


class Echo(ChatEnv):
    """Says what the model has said; the reward is the number of its words."""

    reply = None

    def begin(self, rng):
        return Reply([message("system", "a b c"), message("user", "abc"[rng.integers(3)])], state=0)

    def answer(self, text, state, messages):
        return self.reply or Reply([message("user", text or "a")], float(len(text.split())), state + 1)


def echo(**options):
    settings = {"prompt_length": 40, "response_length": 4, "max_turns": 3, **options}
    return Echo(chat_tokenizer(), **settings)


def test_ends_of_turns_and_of_texts():
    env = echo()
    end, turn = env.tokenizer.convert_tokens_to_ids(["<end>", "<turn>"])
    assert env.action_space.end_tokens == (end, turn)
    env.reset(seed=3)
    row = say(env, "a b <turn>")[0]
    start = "<start> <system> a b c <turn> <user> "
    assert words(env, row)[: len(start)] == start
    assert words(env, row)[len(start) + 2 :] == "<turn> <assistant> a b <turn> <user> a b <turn> <assistant>"
    row = say(env, "c <end>")[0]  # the model's own token stays, and the template's end follows
    assert words(env, row).endswith("<assistant> c <end> <turn> <user> c <turn> <assistant>")


def test_a_turn_ends_with_a_stop_string_and_misses_its_end():
    env = echo(stop_strings=["b c"], missing_end_penalty=0.5)
    env.reset()
    row, reward, _, _, info = say(env, "b c")
    assert (reward, info["completion"], info["ended"]) == (2.0, "b c", True)
    assert words(env, row).endswith("<assistant> b c <turn> <user> b c <turn> <assistant>")
    row, reward, *_, info = say(env, "a a a a")
    assert (reward, info["ended"]) == (3.5, False)
    assert words(env, row).endswith("<assistant> a a a a <turn> <user> a a a a <turn> <assistant>")


def test_a_conversation_that_would_be_too_long_ends_and_is_not_cut():
    env = echo(prompt_length=22, max_turns=100)
    row, _ = env.reset()
    over = False
    while not over:
        before = row
        row, _, over, _, info = say(env, "a b <turn>")
    assert info["too_long"] and info["n_turns"] == 2
    assert np.array_equal(row[: env.width], before[: env.width])
    assert words(env, row[env.width :]) == "a b <turn>"
    with pytest.raises(ArgumentError, match="begins with 10 tokens, more than prompt_length=9: raise it"):
        echo(prompt_length=9).reset()


@pytest.mark.parametrize(
    "reply, error, message",
    [
        ("b", ArgumentError, "`answer` must return a Reply, not 'b'"),
        (["b"], ArgumentError, r"`answer` must return a Reply, not \['b'\]"),
        (Reply([message("user", "b")], "1"), ArgumentError, "The reward of a Reply must be a number, not '1'"),
        (Reply([message("user", "b")], float("nan")), NonFiniteError, "`answer` gave the reward nan"),
        (Reply([message("assistant", "b")]), ArgumentError, "What `answer` returns ends with a message of the assist"),
        (Reply([message("user", "zebra")]), ArgumentError, "A reply .* has what the tokenizer does not know: 'zebra'"),
        (Reply(["b"]), ArgumentError, "What `answer` returns must be a list of messages"),
    ],
)
def test_replies_that_cannot_work_change_nothing(reply, error, message):
    env = echo()
    env.reset()
    before = say(env, "a")[0]
    env.reply = reply
    with pytest.raises(error, match=message):
        say(env, "<turn>")
    env.reply = None
    assert np.array_equal(env._row, before)
    assert say(env, "b <turn>")[1] == 2.0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tokenizer": word_tokenizer(["a"])}, "Conversations need a chat template, but the .* has none"),
        ({"tokenizer": "gpt2"}, "must be a Hugging Face tokenizer, not 'gpt2'"),
        ({"prompt_length": 0}, "`prompt_length` must be a whole number >= 1"),
        ({"max_turns": 1.5}, "`max_turns` must be a whole number >= 1, not 1.5"),
        ({"missing_end_penalty": -1}, "`missing_end_penalty` must be a finite number >= 0"),
        ({"stop_strings": "a"}, "`stop_strings` must be a list of texts"),
        ({"end_tokens": ["zebra"]}, "`end_tokens` has 'zebra'"),
    ],
)
def test_arguments_that_cannot_work(options, message):
    with pytest.raises(ArgumentError, match=message) as error:
        Echo(**{"tokenizer": chat_tokenizer(), **options})
    assert "\n" not in str(error.value)


def test_what_begins_a_conversation_must_be_a_reply_with_messages():
    env = echo()
    for reply, error in (
        (None, "`begin` must return a Reply, not None"),
        (Reply(), "What `begin` returns must be a li"),
    ):
        env.begin = lambda rng, reply=reply: reply
        with pytest.raises(ArgumentError, match=error):
            env.reset()


def test_environments_can_be_pickled_amid_a_conversation():
    env = echo()
    env.reset(seed=0)
    say(env, "a b <turn>")
    again = pickle.loads(pickle.dumps(env))
    for x, y in zip(say(env, "c <turn>"), say(again, "c <turn>"), strict=True):
        assert np.array_equal(x, y)


def test_the_state_for_archives_is_all_that_changes():
    env, other = echo(), echo()
    env.reset(seed=0)
    other.reset(seed=1)
    say(env, "a b <turn>")
    say(env, "c")
    before = vars(other).copy()
    other.set_state({**env.get_state(), "generator": None, "tokenizer": None})  # of an odd archive
    assert vars(other).keys() == before.keys()
    for name in ("_row", "_length", "_turn", "_messages", "_state"):
        assert np.array_equal(getattr(env, name), getattr(other, name)), name
    assert (env._state, env._turn, env._length) == (1, 1, 1)
    assert {name for name, x in vars(echo()).items() if name[0] == "_" and x is not None} == {
        *("_row", "_length", "_turn", "_messages")
    }


# ------------------------------------------------------------------- learning

OPTIONS = {
    PPO: {"n_steps": 16, "batch_size": 256, "n_epochs": 6, "learning_rate": 5e-3},
    TRPO: {"n_steps": 16, "batch_size": 512, "target_kl": 0.1, "n_critic_updates": 2, "cg_max_steps": 6},
    REINFORCE: {"n_episodes": 32, "baseline": "leave_one_out", "learning_rate": 1e-2},
}


def learner(algorithm=PPO, game=GuessingGame, n_envs=32, gamma=1.0, policy_kwargs=None, **options):
    env = make_vec_env(game, n_envs=n_envs, seed=0)
    kwargs = {"model": model_of(env), "reference_kl_coef": None, **(policy_kwargs or {})}
    options = {**OPTIONS[algorithm], **options}
    return algorithm("CausalLMPolicy", env, gamma=gamma, seed=0, device="cpu", policy_kwargs=kwargs, **options)


def collect(model):
    _, callback = model._setup_learn(10_000)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)


@pytest.mark.parametrize("algorithm", OPTIONS)
def test_every_algorithm_learns_to_guess(algorithm):
    model, env = learner(algorithm), make_vec_env(GuessingGame, n_envs=20, seed=1)
    before = evaluate_policy(model, env, 100, deterministic=False)[0]
    model.learn(4_000 if algorithm is REINFORCE else 3_000)
    assert evaluate_policy(model, env, 100, deterministic=False)[0] > before + 0.2


def episodes(model):
    """Each whole conversation of a rollout: environment, steps, observations and actions."""
    rollout, buffer = model.rollout, model.rollout_buffer
    n, observations = rollout.n_steps, np.asarray(model.rollout_buffer.observations[: rollout.n_steps])
    for env in range(rollout.n_envs):
        start = 0 if buffer.episode_starts[0, env] else None
        for end in np.flatnonzero(rollout.dones[:, env]):
            if start is not None:
                steps = slice(start, end + 1)
                yield env, steps, observations[steps, env], buffer.actions[:n][steps, env, 0]
            start = end + 1


@pytest.mark.parametrize("game", [GuessingGame, Calculator, echo])
def test_log_probabilities_are_those_of_the_model_reading_the_whole_conversation(game):
    """By transformers alone, in double precision, on what was said from the first to the last token."""
    model = learner(game=game, n_envs=8, n_steps=40, policy_kwargs={"temperature": 0.7})
    for p in model.policy.parameters():
        p.data += 0.1 * th.randn(p.shape, generator=th.Generator().manual_seed(p.numel()))
    collect(model)
    lm, buffer, n_turns = model.policy.language_model.double(), model.rollout_buffer, []
    head = model.policy.value_head.double()
    for env, steps, rows, actions in episodes(model):
        said = np.append(rows[-1][rows[-1] >= 0], actions[-1])
        places = (rows >= 0).sum(axis=1)  # where each of the model's tokens stands in what was said
        assert np.array_equal(said[places], actions)
        assert all(np.array_equal(said[:place], row[row >= 0]) for place, row in zip(places, rows, strict=True))
        out = lm(th.as_tensor(said)[None].long(), output_hidden_states=True)
        log_probs = th.log_softmax(out.logits[0] / 0.7, dim=-1)[places - 1, actions].detach().numpy()
        np.testing.assert_allclose(buffer.log_probs[steps, env], log_probs, atol=2e-4)
        values = head(out.hidden_states[-1][0])[places - 1, 0].detach().numpy()
        np.testing.assert_allclose(buffer.values[steps, env], values, atol=2e-4)
        n_turns.append(1 + np.count_nonzero(np.diff(places) > 1))
    assert len(n_turns) > 5 and max(n_turns) > 1


def test_rewards_of_turns_are_discounted_through_their_ends():
    model = learner(REINFORCE, echo, n_envs=8, gamma=0.9, n_episodes=16, baseline=None, n_critic_updates=0)
    collect(model)
    keep, returns = model.horizon.keep(model.rollout), model.rollout_buffer.returns
    tokenizer, found = model.env.envs[0].unwrapped.tokenizer, 0
    for env, steps, rows, actions in episodes(model):
        expected, later = [], 0.0
        for row, action in zip(rows[::-1], actions[::-1], strict=True):
            response = [int(x) for x in [*row[40:], action] if x >= 0]
            ends = response[-1] in model.policy.end_tokens
            reward = 0.0
            if ends or len(response) == 4:
                reward = float(len(tokenizer.decode(response[: len(response) - ends]).split()))
            later = reward + 0.9 * later
            expected.append(later)
        np.testing.assert_allclose(returns[steps, env], expected[::-1], rtol=1e-5)
        found += bool(keep[steps, env].all())
    assert found >= 16


def test_values_look_through_the_end_of_a_turn():
    model = learner(PPO, echo, n_envs=4, gamma=0.9, n_steps=24)
    th.nn.init.normal_(model.policy.value_head.weight)
    collect(model)
    buffer, dones = model.rollout_buffer, model.rollout.dones
    finals = model.policy.predict_values(model._last_obs).detach().numpy().ravel()
    following = np.concatenate([buffer.values[1:24], finals[None]])
    delta = buffer.rewards[:24] + 0.9 * following * ~dones - buffer.values[:24]
    expected = np.zeros_like(delta)
    for step in reversed(range(24)):
        expected[step] = delta[step] + (0.9 * 0.95 * ~dones[step] * expected[step + 1] if step < 23 else 0.0)
    np.testing.assert_allclose(buffer.advantages[:24], expected, atol=1e-4)
    turns = np.isin(buffer.actions[:24, :, 0], model.policy.end_tokens) & ~dones
    assert turns.sum() > 3 and np.abs(following[turns]).min() > 1e-3


def test_what_is_logged_is_of_a_turn():
    model = learner(PPO, echo, n_envs=8, n_steps=40, policy_kwargs={"reference_kl_coef": 0.0})
    collect(model)
    rows, actions = (model.rollout.column(name) for name in ("observations", "actions"))
    lengths = (np.asarray(rows)[:, 40:] >= 0).sum(axis=1) + 1
    ended = np.isin(actions[:, 0], model.policy.end_tokens)
    over = ended | (lengths == 4)
    log, dones = model.logger.name_to_value, model.rollout.dones.ravel()
    assert not np.array_equal(over, dones)
    assert log["text/response_length"] == pytest.approx(lengths[over].mean())
    assert log["text/ended"] == pytest.approx(ended[over].mean())
    assert log["text/score"] == pytest.approx(model.rollout.column("rewards")[over].mean())
    model.learn(1)
    assert "rollout/success_rate" not in model.logger.name_to_value
    game = learner(n_envs=4)
    game.learn(200)
    assert game.ep_success_buffer


@pytest.mark.parametrize("buffer", [TextRolloutBuffer, RolloutBuffer])
def test_each_turn_that_was_cut_short_is_masked_alone(buffer):
    kwargs, stopping = {"mask_truncated_completions": True}, lambda: echo(stop_strings=["a b"])
    model = learner(PPO, stopping, 8, policy_kwargs=kwargs, n_steps=40, rollout_buffer_class=buffer)
    for _ in range(2):  # the second rollout begins amid turns
        callback = model._setup_learn(10_000, Infos(), reset_num_timesteps=False)[1]
        goes_on = (model._last_obs[:, 40:] >= 0).any(axis=1)
        model.collect_rollouts(model.env, callback, model.rollout_buffer, 40)
    expected, seen, whole = np.ones((40, 8)), np.array(callback.seen).reshape(40, 8), []
    for env in range(8):
        start = 0
        for step in np.flatnonzero(["completion" in info for info in seen[:, env]]):
            expected[start : step + 1, env] = seen[step, env]["ended"]
            whole.append(seen[step, env]["ended"])
            start = step + 1
    numbers = model.rollout.stretches.numbers
    assert goes_on.any() and min(sum(whole), len(whole) - sum(whole)) > 5
    assert any(len(np.unique(expected[numbers == number])) == 2 for number in range(numbers.max()))
    weight = np.asarray(model.network.batch(model.rollout).weight)
    assert np.array_equal(weight.reshape(40, 8), expected)


def test_sb3s_evaluation(tmp_path):
    model, env = learner(n_envs=4), make_vec_env(GuessingGame, n_envs=2, seed=1)
    rewards, lengths = evaluate_policy(model, env, 6, return_episode_rewards=True)
    assert len(rewards) == 6 and all(1 <= n <= 8 for n in lengths) and all(-0.8 - 1e-6 <= r <= 1 for r in rewards)
    callback = EvalCallback(env, eval_freq=16, n_eval_episodes=4, log_path=str(tmp_path))
    model.learn(256, callback=callback)
    assert len(callback.evaluations_results) == 4
    assert len(evaluate_policy(model, GuessingGame(), 3, return_episode_rewards=True, warn=False)[0]) == 3


def test_an_interrupted_conversation_goes_on_from_an_archive(tmp_path):
    def made():
        return learner(game=echo, n_envs=4, n_steps=24, batch_size=96, n_epochs=1)

    whole = made()
    whole.learn(96)
    stopped = made()
    stopped.learn(96, callback=lambda its, _: its["n_steps"] < 13)
    stopped.save(tmp_path / "model")
    resumed = PPO.load(tmp_path / "model", made().env)
    assert resumed.action_space.end_tokens == stopped.action_space.end_tokens
    resumed.learn(40, reset_num_timesteps=False)
    for (name, x), y in zip(whole.policy.state_dict().items(), resumed.policy.state_dict().values(), strict=True):
        assert th.equal(x, y), name


# ----------------------------------------------------------- supervised start


def test_rows_of_a_supervised_start_are_those_that_the_environment_shows():
    env = Calculator()
    (talk,) = env.demonstrations(1)
    rows = env.turns_of([talk])
    assert len(rows) == 2
    env.reset()
    env._row = env._shown(env._first_prompt(talk[:1]))
    expected = []
    for row in rows:
        for token in row[env.width :][row[env.width :] >= 0]:
            shown = env._row.copy()
            env.step(token)
        shown[env.width + np.count_nonzero(shown[env.width :] >= 0)] = token
        expected.append(shown)
    assert np.array_equal(rows, expected)
    assert words(env, rows[1]).endswith(f"<tool> {talk[2]['content']} <end> <assistant> {talk[3]['content']} <end>")


@pytest.mark.parametrize(
    "talk, message",
    [
        ([message("user", "what")], "The conversation 'user: what' has no message of the assistant"),
        ([message("user", "what"), message("assistant", "1 2 3 4 5 6 7")], "has 8 tokens in its response; raise resp"),
        (
            [message("user", "what"), message("assistant", "zebra")],
            r"A turn \('zebra'\) has what the tokenizer does not",
        ),
        (
            [message("user", "what " * 40), message("assistant", "1")],
            "has 43 tokens in its prompt; raise prompt_length",
        ),
    ],
)
def test_conversations_that_cannot_be_imitated(talk, message):
    with pytest.raises(ArgumentError, match=message):
        Calculator().turns_of([talk])


def test_a_supervised_start_teaches_to_call_the_tool(tmp_path):
    env = Calculator()
    rows = env.turns_of(env.demonstrations(400)[::2])
    folder = pretrain(env, tmp_path, model=model_of(env), rows=rows, n_steps=150, learning_rate=1e-2)
    model = learner(game=Calculator, n_envs=4, policy_kwargs={"model": str(folder)})
    held_out = make_vec_env(Calculator, n_envs=10, seed=5)
    assert evaluate_policy(model, held_out, 50, deterministic=True)[0] > 0.1


@pytest.mark.parametrize("rows", [Calculator(), np.zeros((3, 5), int), np.zeros((0, 47), int), np.zeros((3, 47))])
def test_rows_that_cannot_be_imitated(rows):
    policy = learner(game=Calculator, n_envs=1).policy
    with pytest.raises(ArgumentError, match=r"`task` must be a TextTask, or rows of tokens of shape \(n, 47\), such"):
        train(policy, rows, n_steps=1)
