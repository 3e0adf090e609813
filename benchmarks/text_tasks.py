"""A summary, a classification and a conversation, learned by small models; writes benchmarks/text/tasks.md.

    python benchmarks/text_tasks.py                 # all runs, three seeds each
    python benchmarks/text_tasks.py --only summary  # those whose name contains a word
    python benchmarks/text_tasks.py --report        # the table again from the data

All are made here and need no download. The summary and the classification begin with a supervised model that has
imitated answers half of which are wrong, and are judged on held-out prompts by metrics that are not the reward. The
guessing game begins with a new model and is judged by conversations: who remembers the answers and halves what is left
finds each number in four turns, who never asks the same twice four of ten, and who guesses at random a third.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from text import OUT, SEEDS, command_line, make_model, over, varied  # first: it pins the threads

# isort: split
import numpy as np
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import Logger

from sb3_pg import PPO, REINFORCE, TRPO
from sb3_pg.text import TextTask, evaluate_texts, word_tokenizer
from sb3_pg.text.evaluation import table
from sb3_pg.text.supervised import pretrain
from sb3_pg.text.tasks import ADVERBS, BAD, GOOD, THEMES, VERBS, sentence_chrf
from sb3_pg.text.tokenizers import words_of

#: A prompt, its answers to imitate and the right one.
Example = tuple[str, list[str], str]

# -------------------------------------------------------------------------- data

NAMES = ["anna", "ben", "clara", "david", "emma", "felix", "greta", "henry"]
PLACES = ["airport", "bakery", "cinema", "harbour", "library", "market", "museum", "station"]
DAYS = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
WEATHER = ["cold", "cloudy", "foggy", "rainy", "sunny", "windy"]
DEEDS = ["bought", "found", "lost", "sold"]
THINGS = ["bags", "books", "cakes", "hats", "lamps", "plates", "ropes", "shoes"]
NUMBERS = ["two", "three", "four", "five", "six", "seven", "eight", "nine"]


def summaries(rng: np.random.Generator) -> list[Example]:
    """Return reports of three sentences; of who did what to how many things where, one detail is wrong in half."""
    examples = []
    for _ in range(2000):
        name, place, day, weather, deed, thing, number = (
            str(rng.choice(words)) for words in (NAMES, PLACES, DAYS, WEATHER, DEEDS, THINGS, NUMBERS)
        )
        sentences = [
            f"on {day} {name} went to the {place} .",
            f"the weather was {weather} .",
            f"{name} {deed} {number} {thing} there .",
        ]
        right = f"{name} {deed} {number} {thing} at the {place}"
        wrong = [name, deed, number, thing, place]
        which = int(rng.integers(5))
        wrong[which] = str(rng.choice((NAMES, DEEDS, NUMBERS, THINGS, PLACES)[which]))
        flawed = "{} {} {} {} at the {}".format(*wrong)
        examples.append((" ".join(sentences) + " summary :", [right, flawed], right))
    return examples


def reviews(rng: np.random.Generator) -> list[Example]:
    """Return reviews of two or three things, as many of each label; one of three labels to imitate is any."""
    labels, examples = ("bad", "good", "mixed"), []
    for _ in range(2000):
        right, n = str(rng.choice(labels)), int(rng.integers(2, 4))
        kinds = [labels.index(right)] * n if right != "mixed" else rng.permutation([0, 1, rng.integers(2)][:n]).tolist()
        parts = [
            f"the {rng.choice(THEMES)} {rng.choice(VERBS)} {rng.choice(ADVERBS)} {rng.choice((BAD, GOOD)[kind])}"
            for kind in kinds
        ]
        examples.append((" and ".join(parts) + " . this is", [right, right, str(rng.choice(labels))], right))
    return examples


def is_right(prompts: list[str], completions: list[str], references: list[Any]) -> list[float]:
    """Return 1 for the right label, 0 for another, -1 for what is none."""
    labels = ("good", "bad", "mixed")
    return [
        float(text == right) if text in labels else -1.0 for text, right in zip(completions, references, strict=True)
    ]


def make_task(name: str, split: str) -> TextTask:
    """Return a task of four fifths of the examples, or of the rest, which share no prompt."""
    make, reward, length, _ = TASKS[name]
    found = {example[0]: example for example in make(np.random.default_rng(0))}
    examples = list(found.values())
    part = [example for number, example in enumerate(examples) if (number % 5 == 0) == (split == "test")]
    words = words_of(text for prompt, answers, _ in examples for text in (prompt, *answers))
    return TextTask(
        [example[0] for example in part],
        reward,
        word_tokenizer(words | {"good", "bad", "mixed"}),
        references=[example[2] for example in part],
        examples=[example[1] for example in part],
        prompt_length=max(len(example[0].split()) for example in examples),
        response_length=length,
        name=name,
    )


#: Examples, reward, greatest length, and by which metrics a model is judged.
TASKS: dict[str, tuple[Callable[[Any], list[Example]], Any, int, list[str]]] = {
    "summary": (summaries, sentence_chrf, 10, ["rouge1", "rouge2", "rougeL", "exact_match", "distinct_2"]),
    "classification": (reviews, is_right, 3, ["classification"]),
}
SHOWN = {
    "summary": ("rouge1", "rouge2", "rougeL", "exact_match", "distinct_2", "self_bleu"),
    "classification": (
        "classification/macro_f1",
        "classification/accuracy",
        *(f"classification/f1/{label}" for label in ("good", "bad", "mixed")),
    ),
}
PRETRAIN_STEPS = {"summary": 400, "classification": 800}
TOKENS = {"summary": 30_000, "classification": 20_000}
ALGORITHMS = ("grpo",)

# -------------------------------------------------------------------------- runs


def run_task(name: str, algo: str, seed: int) -> dict[str, Any]:
    """Figures and texts before and after, on 300 held-out prompts, drawn as in training."""
    task, held_out, folder = make_task(name, "train"), make_task(name, "test"), Path(f"runs/text-tasks/{name}-{seed}")
    if not (folder / "config.json").exists():
        pretrain(task, folder, n_steps=PRETRAIN_STEPS[name], seed=seed)
    model = make_model(algo, task, folder, seed)
    model.set_logger(Logger(None, []))
    found: dict[str, Any] = {}
    for when in ("before", "after"):
        th.manual_seed(0)
        figures, records = evaluate_texts(model.policy, held_out, 300, TASKS[name][3])
        if name == "summary":
            figures |= varied(records)
        found[when] = {"figures": figures, "texts": records[:5]}
        if when == "before":
            model.learn(TOKENS[name])
    return {**found, "kl": model.logger.name_to_value["text/kl"], "tokens": model.num_timesteps}


GAMES: dict[str, tuple[Any, dict[str, Any]]] = {
    "reinforce": (REINFORCE, {"n_episodes": 64, "baseline": "leave_one_out", "learning_rate": 1e-3}),
    "trpo": (
        TRPO,
        {
            "n_steps": 32,
            "batch_size": 1024,
            "target_kl": 0.05,
            "sub_sampling_factor": 4,
            "n_critic_updates": 2,
            "cg_max_steps": 6,
        },
    ),
    "ppo": (PPO, {"n_steps": 32, "batch_size": 256, "n_epochs": 4, "learning_rate": 1e-3, "ent_coef": 0.01}),
}
GAME_TOKENS, N_ENVS, CONVERSATIONS = 40_000, 64, 200


def run_game(algo: str, seed: int) -> dict[str, Any]:
    """Share of conversations in which the number is found, drawn as in training, before and after."""
    algorithm, settings = GAMES[algo]
    env, kwargs = make_vec_env("GuessingGame-v0", N_ENVS, seed=seed), {"reference_kl_coef": None}
    model = algorithm("CausalLMPolicy", env, gamma=1.0, seed=seed, device="cpu", policy_kwargs=kwargs, **settings)
    model.set_logger(Logger(None, []))
    found: dict[str, Any] = {}
    for when in ("before", "after"):
        th.manual_seed(0)
        judging = make_vec_env("GuessingGame-v0", N_ENVS, seed=1000)
        rewards, lengths = evaluate_policy(
            model, judging, CONVERSATIONS, deterministic=False, return_episode_rewards=True
        )
        found[when] = {"found": float(np.mean(np.array(rewards) > 0.2)), "reward": float(np.mean(rewards))}
        found[when]["tokens"] = float(np.mean(lengths))
        if when == "before":
            model.learn(GAME_TOKENS)
    return found


# ------------------------------------------------------------------------ report


def report_task(data: dict[str, Any], name: str) -> list[str]:
    lines = ["", f"## {name.capitalize()}", "", f"{TOKENS[name]:,} tokens.", ""]
    lines += ["| algorithm | when | score | KL | " + " | ".join(x.split("/", 1)[-1] for x in SHOWN[name]) + " |"]
    lines += ["|---" * (4 + len(SHOWN[name])) + "|"]
    runs = {algo: of_seeds(data, f"{name} {algo}") for algo in ALGORITHMS}
    for algo, its in runs.items():
        for when in ("before", "after") if its else ():
            figures = [run[when]["figures"] for run in its]
            kl = over([run["kl"] for run in its]) if when == "after" else "0"
            cells = [over([x["score"] for x in figures]), kl, *(over([x[m] for x in figures]) for m in SHOWN[name])]
            lines.append(f"| {algo} | {when} | " + " | ".join(cells) + " |")
    for algo, its in runs.items():
        for when in ("before", "after") if its else ():
            lines += ["", f"{algo}, seed {SEEDS[0]}, {when}:", "", table(its[0][when]["texts"])]
    return lines


def of_seeds(data: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [data["runs"][f"{name} {seed}"] for seed in SEEDS if f"{name} {seed}" in data["runs"]]


def report(data: dict[str, Any]) -> None:
    lines = ["# A summary, a classification and a conversation", "", data["machine"], ""]
    lines += ["Mean over seeds (each of them), drawn as in training; KL in nats per response."]
    for name in TASKS:
        lines += report_task(data, name)
    lines += ["", "## Guessing game", ""]
    lines += [f"{CONVERSATIONS} conversations after {GAME_TOKENS:,} tokens from a new model.", ""]
    lines += ["| algorithm | number found: before | after | reward: before | after | tokens: before | after |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for algo in GAMES:
        its = of_seeds(data, f"game {algo}")
        if its:
            keys = [(key, when) for key in ("found", "reward", "tokens") for when in ("before", "after")]
            lines.append(
                f"| {algo} | " + " | ".join(over([run[when][key] for run in its]) for key, when in keys) + " |"
            )
    (OUT / "tasks.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    wanted: dict[str, Callable[[], Any]] = {}
    for seed in SEEDS:
        wanted |= {
            f"{name} {algo} {seed}": partial(run_task, name, algo, seed) for name in TASKS for algo in ALGORITHMS
        }
        wanted |= {f"game {algo} {seed}": partial(run_game, algo, seed) for algo in GAMES}

    def line(name: str, found: Any) -> str:
        return f"{name}: {json.dumps({w: found[w].get('figures', found[w]) for w in ('before', 'after')})}"

    command_line(__doc__, "tasks.json", wanted, report, "runs such as 'summary grpo 0' whose name contains this", line)


if __name__ == "__main__":
    main()
