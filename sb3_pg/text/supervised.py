"""Teach a language model the answers of a task, so that a policy gradient has something to start from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch as th

from sb3_pg.common.errors import ArgumentError, check_count, check_number
from sb3_pg.text.conversation import ChatEnv
from sb3_pg.text.dropout import dropping
from sb3_pg.text.ends import check_known
from sb3_pg.text.environment import TextTask, check_task
from sb3_pg.text.language_model import LanguageModelPolicy, check_policy
from sb3_pg.text.policies import CausalLMPolicy
from sb3_pg.text.spaces import EMPTY


def examples(task: TextTask) -> np.ndarray:
    """Whole rows of prompt, example and end token, (n, prompt_length + response_length), one for each example.

    One that has an end of its own, such as a stop string, ends there, as the environment would end it.

    :raises ArgumentError: the task has no examples, or one that is too long
    """
    given = task.references if task.examples is None else task.examples
    if given is None:
        raise ArgumentError(f"The task {task.name!r} has no `examples` or `references` to learn from.")
    pairs = [(number, text) for number, some in enumerate(given) for text in _texts(number, some)]
    rows = task.observations([number for number, _ in pairs])
    tokens = task.tokenizer([text for _, text in pairs], add_special_tokens=False)["input_ids"]
    for row, ids, (number, text) in zip(rows, tokens, pairs, strict=True):
        check_known(task.tokenizer, f"The example of prompt {number}", text, ids)
        if len(ids) + 1 > task.response_length:
            raise ArgumentError(
                f"The example {text[:60]!r} has {len(ids)} tokens and its end; response_length is "
                f"{task.response_length}. Shorten it or raise `response_length`."
            )
        row[task.width : task.width + len(ids) + 1] = [*ids, task.answer_end]
    rows[:, task.width :] = task.cut(rows[:, task.width :])
    return rows


def _texts(number: int, given: Any) -> list[str]:
    """Return the examples of one prompt, given as one text or several."""
    texts = [given] if isinstance(given, str) else list(given) if isinstance(given, list | tuple) else []
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ArgumentError(f"The examples of prompt {number} must be a text or a list of texts, not {given!r}.")
    return texts


def steps_of(rows: np.ndarray, prompt_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the observations and actions of whole rows, as if they had been acted: (n, width) and (n,)."""
    responses = rows[:, prompt_length:]
    row, step = np.nonzero(responses != EMPTY)
    observations = rows[row]
    observations[:, prompt_length:][np.arange(responses.shape[1]) >= step[:, None]] = EMPTY
    return observations, responses[row, step]


def train(
    policy: LanguageModelPolicy,
    task: TextTask | np.ndarray,
    n_steps: int = 1000,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    max_grad_norm: float = 1.0,
    seed: int = 0,
    report: Callable[[int, float], None] | None = None,
    dropout: float = 0.0,
    weight_decay: float = 0.0,
) -> list[float]:
    """Maximise the log-probability of the task's examples, with a learning rate that falls to zero.

    :param policy: changed in place
    :param task: with examples or references; or whole rows, (n, prompt_length + response_length), such as those of
        :meth:`sb3_pg.text.ChatEnv.turns_of`
    :param n_steps: gradient steps
    :param batch_size: examples in each
    :param learning_rate: of Adam, at the beginning
    :param max_grad_norm: gradients are scaled down to this norm, above 0. Lower lets odd batches do less
    :param seed: of the order of the examples
    :param report: called with the step and the loss of each step
    :param dropout: probability with which hidden numbers are dropped, in [0, 0.99]. Higher fits examples less closely
    :param weight_decay: of AdamW (Loshchilov and Hutter 2019). Higher keeps weights smaller
    :return: the loss of each step, nats per token
    :raises ArgumentError: there is nothing to learn from, or it does not fit the policy
    """
    check_policy(policy)
    check_count("n_steps", n_steps, low=0)
    check_count("batch_size", batch_size)
    check_number("learning_rate", learning_rate)
    check_number("max_grad_norm", max_grad_norm, above_low=True)
    check_number("weight_decay", weight_decay)
    check_number("dropout", dropout, high=0.99)
    rows = examples(task) if isinstance(task, TextTask) else np.asarray(task)
    if (
        rows.ndim != 2
        or rows.shape[1:] != policy.observation_space.shape
        or not len(rows)
        or rows.dtype.kind not in "iu"
    ):
        raise ArgumentError(
            f"`task` must be a TextTask, or rows of tokens of shape (n, {policy.observation_space.shape[0]}), such as "  # type: ignore[index]
            f"ChatEnv.turns_of returns them, not {type(task).__name__} of shape {rows.shape} and type {rows.dtype}."
        )
    if rows.max() >= policy.n_tokens or (rows < 0).all(axis=1).any():
        raise ArgumentError(f"`task` has rows that are empty, or tokens that the policy's {policy.n_tokens} are not.")
    rng, losses = np.random.default_rng(seed), []
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = th.optim.AdamW(trained, lr=learning_rate, weight_decay=weight_decay)
    for step in range(n_steps):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / n_steps)
        chosen = rows[rng.integers(len(rows), size=batch_size)]
        observations, actions = steps_of(chosen, policy.prompt_length)
        with dropping(policy.language_model, dropout):
            _, log_prob, _ = policy.evaluate_actions(observations, th.as_tensor(actions, device=policy.device))
            loss = -log_prob.mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        th.nn.utils.clip_grad_norm_(trained, max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
        if report is not None:
            report(step, losses[-1])
    return losses


def pretrain(
    task: TextTask | ChatEnv,
    folder: str | Path,
    policy_class: type[LanguageModelPolicy] = CausalLMPolicy,
    model: Any = None,
    seed: int = 0,
    rows: np.ndarray | None = None,
    **training: Any,
) -> Path:
    """Make a small model, teach it the task and write it to a folder, with its tokenizer, for ``model=folder``.

    :param task: with examples or references; or an environment for conversations
    :param folder: where to write
    :param policy_class: CausalLMPolicy or Seq2SeqLMPolicy
    :param model: a configuration or the folder of a model; None makes a small new one
    :param seed: of the weights and of the order of the examples
    :param rows: what to imitate, as for :func:`train`; None takes the task's examples
    :param training: arguments of :func:`train`
    :return: the folder
    :raises ArgumentError: as :func:`train`
    """
    if not isinstance(task, TextTask | ChatEnv):
        check_task(task)
    if rows is None and isinstance(task, ChatEnv):
        raise ArgumentError("A ChatEnv has no examples to learn from. Pass rows=env.turns_of(conversations).")
    if not isinstance(policy_class, type) or not issubclass(policy_class, LanguageModelPolicy):
        raise ArgumentError(f"`policy_class` must be CausalLMPolicy or Seq2SeqLMPolicy, not {policy_class!r}.")
    th.manual_seed(seed)
    policy = policy_class(task.observation_space, task.action_space, lambda _: 0.0, model=model, reference_kl_coef=None)
    train(policy, task if rows is None else rows, seed=seed, **training)  # type: ignore[arg-type]
    policy.save_pretrained(folder)
    task.tokenizer.save_pretrained(folder)
    return Path(folder)
