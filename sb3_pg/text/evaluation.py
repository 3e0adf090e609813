"""Look at a language model on prompts that it is not trained on: figures and texts."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, EventCallback

from sb3_pg.common.errors import ArgumentError, check_count
from sb3_pg.text import metrics
from sb3_pg.text.chat import is_chat
from sb3_pg.text.environment import TextTask, check_task
from sb3_pg.text.generation import answers, ends_of, in_batches
from sb3_pg.text.language_model import LanguageModelPolicy, check_policy
from sb3_pg.text.prompts import Prompt, listed_prompts, read_prompts, shown
from sb3_pg.text.rewards import TOKEN_IDS, RewardFunction, as_rewards, scored
from sb3_pg.text.sequences import listed
from sb3_pg.text.settings import checked_settings


def complete(policy: LanguageModelPolicy, task: TextTask, numbers: Sequence[int], **settings: Any) -> np.ndarray:
    """Responses to the prompts with these numbers, (n, response_length); settings as for ``policy.generate``.

    Prompts and responses may be longer than those that the policy was made for, within the model's window.

    :raises ArgumentError: they are not, a setting cannot work, or the task has another tokenizer than the policy
    """
    if task.action_space.n != policy.n_tokens:
        raise ArgumentError(
            f"`task` has a tokenizer of {task.action_space.n} tokens, but the policy's has {policy.n_tokens}. Make the "
            "task with the policy's."
        )
    settings = checked_settings({"stop_strings": task.ends.strings, "tokenizer": task.tokenizer, **settings})
    return task.cut(in_batches(policy, task.rows[list(numbers)], task.response_length, settings))


def evaluate_texts(
    policy: LanguageModelPolicy,
    task: TextTask,
    n_prompts: int | None = None,
    names: Sequence[str | metrics.Metric] | None = None,
    **settings: Any,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Complete the first prompts of a task and measure the answers.

    :param policy: a language model policy
    :param task: with prompts to complete, such as the held-out ones
    :param n_prompts: how many; None takes all
    :param names: metrics of :mod:`sb3_pg.text.metrics`, and functions of your own; None takes all usual ones that the
        task allows
    :param settings: of ``policy.generate``; by default it samples as in training. ``do_sample=False`` is greedy
    :return: figures, among them "score" (the task's reward) and "length" in tokens, and a record of each answer
    :raises ArgumentError: an argument is of another kind, or there is no such metric or setting
    """
    check_policy(policy)
    check_task(task)
    metrics.check_names(names, task.references is not None)
    settings = checked_settings(settings, do_sample=True)
    if n_prompts is not None:
        check_count("n_prompts", n_prompts)
    count = min(n_prompts or len(task.prompts), len(task.prompts))
    numbers = [number for number in range(count) for _ in range(settings.get("num_return_sequences", 1))]
    responses = complete(policy, task, range(count), **settings)
    scores, texts = task.score(numbers, responses)
    references = None if task.references is None else [task.references[n] for n in numbers]
    figures = {"score": float(scores.mean()), "length": float((responses >= 0).sum(axis=1).mean())}
    figures.update(metrics.measure(texts, references, names))
    records = [
        {
            "prompt": task.prompts[number],
            "completion": text,
            "reference": None if references is None else references[i],
            "score": float(scores[i]),
        }
        for i, (number, text) in enumerate(zip(numbers, texts, strict=True))
    ]
    return figures, records


def best_of_n(
    policy: LanguageModelPolicy,
    prompts: Sequence[Prompt],
    reward: RewardFunction | Sequence[RewardFunction],
    n: int = 4,
    references: Sequence[Any] | None = None,
    **settings: Any,
) -> tuple[list[str], np.ndarray]:
    """Sample several responses to each prompt and keep the one with the highest reward.

    :param policy: a language model policy with a tokenizer
    :param prompts: texts or conversations
    :param reward: as that of a TextTask, or several, which are added
    :param n: responses for each prompt. More cost more, and find what the reward likes, its faults too
    :param references: for the reward, one for each prompt
    :param settings: of ``policy.generate``; by default it samples as in training
    :return: the texts, one for each prompt, and their rewards, float64 (n_prompts,)
    :raises ArgumentError: an argument is of another kind, there are not as many references as prompts, or the reward
        returns something else than a number for each
    :raises NonFiniteError: it returns one that is not finite
    """
    check_policy(policy)
    check_count("n", n)
    rewards, prompts = as_rewards(reward, None, []), listed_prompts(prompts)
    if not len(prompts):
        return [], np.zeros(0)
    references = read_prompts(prompts, references, None, None).references or [None] * len(prompts)
    settings = checked_settings({**settings, "num_return_sequences": n}, do_sample=True)
    responses = answers(policy, prompts, settings)
    texts = ends_of(policy, settings).decode(responses)
    given: dict[str, list[Any]] = {
        "prompts": [prompt for prompt in prompts for _ in range(n)],
        "completions": texts,
        "references": [reference for reference in references for _ in range(n)],
        TOKEN_IDS: listed(responses),
    }
    scores = scored(rewards, given).totals
    best = scores.reshape(-1, n).argmax(axis=1) + np.arange(0, len(texts), n)
    return [texts[i] for i in best], scores[best]


def table(records: Sequence[dict[str, Any]]) -> str:
    """Prompts, completions, references and scores as a Markdown table."""

    def cell(x: Any) -> str:
        if x and isinstance(x, list) and is_chat(x):
            x = shown(x)
        text = x if isinstance(x, str) else f"{x:.2f}" if isinstance(x, float) else (x[0] if x else "")
        return str(text).replace("|", "\\|").replace("\n", " ")

    columns = ["prompt", "completion", "reference", "score"]
    if all(not isinstance(record["reference"], str) for record in records):
        columns.remove("reference")
    lines = [columns, ["---"] * len(columns), *([cell(record[c]) for c in columns] for record in records)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


class TextEvalCallback(EventCallback):
    """Evaluate on held-out prompts every so many steps, and log figures and sample texts.

    Figures are logged as ``eval/<metric>``, a table of texts as ``eval/texts`` where the log takes text (TensorBoard).
    Watch a metric that is not the reward: a model that learns to fool the reward shows there. The run is the same with
    and without it.

    :param task: with prompts that are not trained on
    :param eval_freq: calls of the environment between two evaluations; the first is before training
    :param n_prompts: how many prompts
    :param n_texts: texts in the table
    :param names: metrics, and functions of your own; None takes all usual ones that the task allows
    :param settings: of ``policy.generate``; by default it samples
    :param log_path: folder for ``evaluations.jsonl`` (figures) and ``texts.md``; None writes none
    :param best_model_save_path: folder for the model with the best ``best_by`` so far; None writes none
    :param best_by: a metric, higher being better. The best so far is ``best_mean_reward``, for SB3's callbacks
    :param callback_on_new_best: called then, such as SB3's StopTrainingOnRewardThreshold
    :param callback_after_eval: called after each evaluation, such as SB3's StopTrainingOnNoModelImprovement: early
        stopping
    :param verbose: 1 prints figures and texts
    :param log_name: in place of "eval" in the log, to tell several evaluations apart
    :raises ArgumentError: an argument is of another kind, or there is no such metric or setting; before training, the
        policy is no language model or ``best_by`` not among the metrics
    """

    def __init__(
        self,
        task: TextTask,
        eval_freq: int = 1000,
        n_prompts: int | None = 128,
        n_texts: int = 5,
        names: Sequence[str | metrics.Metric] | None = None,
        settings: dict[str, Any] | None = None,
        log_path: str | Path | None = None,
        best_model_save_path: str | Path | None = None,
        best_by: str = "score",
        callback_on_new_best: BaseCallback | None = None,
        callback_after_eval: BaseCallback | None = None,
        verbose: int = 0,
        log_name: str = "eval",
    ) -> None:
        check_task(task)
        check_count("eval_freq", eval_freq)
        check_count("n_texts", n_texts, low=0)
        checked_settings({} if settings is None else settings, do_sample=True)
        if n_prompts is not None:
            check_count("n_prompts", n_prompts)
        metrics.check_names(names, task.references is not None)
        for name, callback in {"after_eval": callback_after_eval, "on_new_best": callback_on_new_best}.items():
            if not isinstance(callback, BaseCallback | None):
                raise ArgumentError(f"`callback_{name}` must be a callback of SB3, not {callback!r}.")
        super().__init__(callback_after_eval, verbose=verbose)
        self.callback_on_new_best = callback_on_new_best
        if callback_on_new_best is not None:
            callback_on_new_best.parent = self
        self.task = task
        self.eval_freq = eval_freq
        self.n_prompts = n_prompts
        self.n_texts = n_texts
        self.names = names
        self.settings = dict(settings or {})
        self.log_path = None if log_path is None else Path(log_path)
        self.best_model_save_path = None if best_model_save_path is None else Path(best_model_save_path)
        self.best_by = best_by
        self.log_name = log_name
        self.best_mean_reward = -np.inf
        self.history: list[dict[str, float]] = []
        self.goes_on = True  # until a callback of the first evaluation, which is before the first step, wants to stop

    def _init_callback(self) -> None:
        super()._init_callback()
        check_policy(self.model.policy)
        if self.callback_on_new_best is not None:
            self.callback_on_new_best.init_callback(self.model)

    def _on_training_start(self) -> None:
        self.goes_on = True if self.history else self.evaluate()

    def _on_step(self) -> bool:
        return self.goes_on and (self.evaluate() if self.n_calls % self.eval_freq == 0 else True)

    def update_child_locals(self, locals_: dict[str, Any]) -> None:
        """Show the callbacks what this one is shown."""
        super().update_child_locals(locals_)
        if self.callback_on_new_best is not None:
            self.callback_on_new_best.update_locals(locals_)

    def evaluate(self) -> bool:
        """Evaluate now; False if one of the two callbacks wants to stop."""
        policy: Any = self.model.policy
        gpus = [policy.device] if policy.device.type == "cuda" else []
        with th.random.fork_rng(gpus):  # a run does not depend on who watches it
            figures, records = evaluate_texts(policy, self.task, self.n_prompts, self.names, **self.settings)
        self.history.append({"timesteps": self.num_timesteps, **figures})
        texts = table(records[: self.n_texts])
        for name, value in figures.items():
            self.logger.record(f"{self.log_name}/{name}", value)
        self.logger.record(f"{self.log_name}/texts", texts, exclude=("stdout", "log", "json", "csv"))
        if self.log_path is not None:
            self.log_path.mkdir(parents=True, exist_ok=True)
            with (self.log_path / "evaluations.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.history[-1]) + "\n")
            with (self.log_path / "texts.md").open("a", encoding="utf-8") as file:
                file.write(f"After {self.num_timesteps} steps:\n\n{texts}\n\n")
        if self.verbose:
            print(f"After {self.num_timesteps} steps: " + ", ".join(f"{k} {v:.3f}" for k, v in figures.items()))
            print(texts)
        goes_on = self._note_best(figures)
        return self._on_event() and goes_on

    def _note_best(self, figures: dict[str, float]) -> bool:
        if self.best_by not in figures:
            raise ArgumentError(f"`best_by` must be one of {', '.join(figures)}, not {self.best_by!r}.")
        if not figures[self.best_by] > self.best_mean_reward:  # nor if it is NaN
            return True
        self.best_mean_reward = figures[self.best_by]
        if self.best_model_save_path is not None:
            self.best_model_save_path.mkdir(parents=True, exist_ok=True)
            self.model.save(self.best_model_save_path / "best_model")
        return self.callback_on_new_best.on_step() if self.callback_on_new_best is not None else True
