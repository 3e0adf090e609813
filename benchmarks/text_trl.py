"""RLOO and GRPO by TRL's trainers and by this library, on the same model, prompts and reward; writes text/trl.md.

    python benchmarks/text_trl.py                 # ten seeds of two tasks, then lengths; one run after the other
    python benchmarks/text_trl.py --only lengths  # the runs whose name contains a word
    python benchmarks/text_trl.py --seeds 3       # fewer seeds
    python benchmarks/text_trl.py --report        # the table again from the data
    python benchmarks/text_trl.py --device cuda   # lengths with a larger model on a GPU, into text/trl_cuda.md

RLOO is REINFORCE with a leave-one-out baseline, GRPO is PPO with ``baseline="group"`` and one pass over each rollout,
as TRL makes by default; GRPO's loss is TRL's ``loss_type="grpo"``, with the penalty for leaving the reference in it.
Both draw 4 responses to each of 16 prompts per update, with the same learning rate and optimizer, in float32 on one
thread. Runs of the two alternate, and CPU time counts, so that other work on the machine does not. TRL's gradient
checkpointing is off, which makes it faster.

The tasks are the small models' of ``text.py``; held-out prompts are answered by drawing, by the same code, whoever
trained the model. The lengths are those of responses of a new GPT-2 of 4 layers of 256, rewarded by the share of even
numbers among what it writes. On a GPU the clock is the wall's, of a GPU that has done what it was given,
and each run's first update, which warms it up, does not count.
"""

import argparse
import contextlib
import io
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

from text import (  # first, since it pins the threads
    OUT,
    PRETRAIN_STEPS,
    TASKS,
    evaluate,
    missing_runs,
    record,
    setup,
)

# isort: split
import torch as th
from datasets import Dataset
from processes import highest_memory, in_a_process
from scipy import stats
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.utils import set_random_seed
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from sb3_pg import PPO, REINFORCE
from sb3_pg.text import TextTask, TextVecEnv, word_tokenizer
from sb3_pg.text.supervised import pretrain

SIDES = ("ours", "trl")
COMPLETIONS, PER_PROMPT, LEARNING_RATE = 64, 4, 3e-4
SEEDS, UPDATES = 10, 100  # with three seeds the rewards could not be told apart


class Place(NamedTuple):
    """Where the lengths of responses are tried, and with what."""

    file: str  #: of the data and the report
    gpt2: dict[str, int]
    updates: dict[int, int]  #: at each length, few since one at the greatest takes long on a CPU
    seeds: int


PLACES = {
    "cpu": Place("trl", {"n_layer": 4, "n_embd": 256, "n_head": 4}, {32: 6, 128: 3, 512: 1}, 5),
    "cuda": Place("trl_cuda", {"n_layer": 12, "n_embd": 768, "n_head": 12}, {32: 5, 128: 4, 512: 3}, 1),
}

#: Of RLOO TRL's loss is a sum over the tokens of a response and ours a mean, so its clip of 1 is a much smaller number.
OURS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "rloo": (
        REINFORCE,
        {"baseline": "leave_one_out_same_start", "n_critic_updates": 0, "max_grad_norm": 0.05},
        {"reference_kl_coef": 0.05},
    ),
    "grpo": (
        PPO,
        {"baseline": "group", "loss_average": "sequence", "normalize_advantage": False, "n_epochs": 1},
        {"reference_kl_coef": 0.04, "reference_kl_in": "loss"},
    ),
}
THEIRS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "rloo": (RLOOTrainer, RLOOConfig, {"beta": 0.05}),
    "grpo": (
        GRPOTrainer,
        GRPOConfig,
        {"beta": 0.04, "loss_type": "grpo", "scale_rewards": "group", "use_bias_correction_kl": False},
    ),
}


def clock_of(device: str) -> Callable[[], float]:
    """Return what tells the time in seconds: CPU time, which other work does not add to, or a GPU's."""
    if device == "cpu":
        return time.process_time

    def now() -> float:
        th.cuda.synchronize()
        return time.perf_counter()

    return now


class OurClock(BaseCallback):
    """When each update begins; stops after the last."""

    def __init__(self, updates: int, now: Callable[[], float]) -> None:
        super().__init__()
        self.updates, self.now = updates, now
        self.times: list[float] = []

    def _on_rollout_start(self) -> None:
        self.times.append(self.now())

    def _on_step(self) -> bool:
        return len(self.times) <= self.updates


class TheirClock(TrainerCallback):
    """The same of TRL's updates."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.times: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(self.now())

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(self.now())


class EvenNumbers:
    """Reward: the share of even numbers, of the greatest length. Remembers each score, and how many words there were.

    :param length: the greatest, in tokens
    """

    __name__ = "even_numbers"

    def __init__(self, length: int) -> None:
        self.length, self.scores, self.lengths = length, list[float](), list[float]()

    def __call__(self, prompts: list[str], completions: list[str], references: Any) -> list[float]:
        scores = [sum(int(x) % 2 == 0 for x in text.split() if x.isdigit()) / self.length for text in completions]
        self.scores += scores
        self.lengths += [float(len(text.split())) for text in completions]
        return scores


def of_updates(values: list[float], updates: int) -> list[float]:
    """Return the mean of each update's responses."""
    starts = range(0, updates * COMPLETIONS, COMPLETIONS)
    return [statistics.mean(values[start : start + COMPLETIONS]) for start in starts]


def train_ours(model: Any, task: Any, updates: int, method: str, seed: int) -> list[float]:
    clock = OurClock(updates, clock_of(model.device.type))
    model.learn(10**9, callback=clock)
    return clock.times


def train_theirs(model: Any, task: Any, updates: int, method: str, seed: int) -> list[float]:
    """TRL on the very model that the policy holds."""

    def reward(prompts: list[str], completions: list[str], reference: list[Any], **_: Any) -> list[float]:
        return task.reward(prompts, completions, reference)

    trainer_class, config_class, settings = THEIRS[method]
    config = config_class(
        output_dir="runs/trl",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        per_device_train_batch_size=COMPLETIONS,
        num_generations=PER_PROMPT,
        max_completion_length=task.response_length,
        max_grad_norm=1.0,
        max_steps=updates,
        seed=seed,
        bf16=False,
        use_cpu=model.device.type == "cpu",
        gradient_checkpointing=False,
        logging_steps=updates,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **settings,
    )
    clock, tokenizer = TheirClock(clock_of(model.device.type)), task.tokenizer
    tokenizer.padding_side = "left"
    references = task.references or [None] * len(task.prompts)
    data = Dataset.from_dict({"prompt": list(task.prompts), "reference": list(references)})
    trainer = trainer_class(model.policy.lm, reward, config, data, processing_class=tokenizer, callbacks=[clock])
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    return clock.times


def make_model(method: str, task: TextTask, seed: int, model: Any, device: str) -> Any:
    algorithm, settings, kwargs = OURS[method]
    settings = {"learning_rate": LEARNING_RATE, "max_grad_norm": 1.0, "gamma": 1.0, **settings}
    if algorithm is PPO:
        settings["batch_size"] = COMPLETIONS * task.response_length
    env = TextVecEnv(task, COMPLETIONS, PER_PROMPT, seed=seed)
    kwargs = {"model": model, **kwargs}
    set_random_seed(seed)
    made = algorithm(
        "CausalLMPolicy", env, n_episodes=COMPLETIONS, seed=seed, device=device, policy_kwargs=kwargs, **settings
    )
    made.set_logger(Logger(None, []))
    return made


def timed(model: Any, task: Any, updates: int, method: str, who: str, seed: int) -> dict[str, Any]:
    """Train; return CPU seconds of each update, and the wall's of all."""
    start = time.perf_counter()
    times = {"ours": train_ours, "trl": train_theirs}[who](model, task, updates, method, seed)
    seconds = [b - a for a, b in pairwise(times)]
    n_warm_up = int(model.device.type == "cuda")
    found = {"seconds_per_update": statistics.median(seconds[n_warm_up:]), "seconds": times[-1] - times[0]}
    return {**found, "updates": len(seconds), "wall_seconds": time.perf_counter() - start}


def run_task(method: str, name: str, seed: int, who: str) -> dict[str, Any]:
    """A small model of a built-in task, with scores on held-out prompts."""
    folder = Path("runs/text-benchmark") / f"{name}-{seed}"
    if not (folder / "config.json").exists():
        pretrain(TASKS[name].make("train"), folder, n_steps=PRETRAIN_STEPS[name], seed=seed)
    task, held_out = TASKS[name].make("train"), TASKS[name].make("test")
    model = make_model(method, task, seed, str(folder), "cpu")
    before, _ = evaluate(model, held_out)
    found = timed(model, task, UPDATES, method, who, seed)
    return {**found, "before": before, "after": evaluate(model, held_out)[0]}


def run_length(method: str, length: int, seed: int, who: str, device: str) -> dict[str, Any]:
    """A new GPT-2 and responses up to a length, with the scores of each update's rollout."""
    place = PLACES[device]
    words, reward, updates = [str(n) for n in range(1000)], EvenNumbers(length), place.updates[length]
    prompts = [" ".join(words[(37 * n + k) % 1000] for k in range(8)) for n in range(64)]
    task = TextTask(prompts, reward, word_tokenizer(words), response_length=length)
    config: dict[str, Any] = {**place.gpt2, "vocab_size": len(task.tokenizer), "n_positions": task.width + length}
    config |= {"bos_token_id": None, "eos_token_id": task.end_token, "pad_token_id": task.tokenizer.pad_token_id}
    folder = f"runs/text-{place.file}/gpt2-{length}-{seed}"  # TRL reads the reference from where the model is from
    set_random_seed(seed)
    GPT2LMHeadModel(GPT2Config(**config)).save_pretrained(folder)
    model = make_model(method, task, seed, folder, device)
    found = timed(model, task, updates, method, who, seed)
    scores, lengths = of_updates(reward.scores, updates), of_updates(reward.lengths, updates)
    peak = highest_memory() if device == "cpu" else th.cuda.max_memory_allocated() / 2**20
    return {**found, "scores": scores, "lengths": lengths, "peak_mb": peak}


def difference(values: list[float]) -> str:
    low, high = stats.t.interval(0.95, len(values) - 1, statistics.mean(values), stats.sem(values))
    return f"{statistics.mean(values):+.4f} [{low:+.4f}, {high:+.4f}]"


def pairs(data: dict[str, Any], key: str, seeds: int) -> list[tuple[int, dict[str, Any], dict[str, Any]]]:
    """Return the seeds that both have run, with what they found."""
    both = [(seed, *(data["runs"].get(f"{key} {seed} {who}") for who in SIDES)) for seed in range(seeds)]
    return [(seed, ours, theirs) for seed, ours, theirs in both if ours and theirs]


def medians(rows: list[list[float]]) -> list[float]:
    return [statistics.median(column) for column in zip(*rows, strict=True)]


def cells(row: list[float]) -> str:
    return " | ".join(f"{x:.3f}" for x in row)


def report_tasks(data: dict[str, Any]) -> list[str]:
    lines = [
        f"{UPDATES} updates of {COMPLETIONS} completions, {PER_PROMPT} to a prompt; a small model of each task.",
        "",
    ]
    lines += ["| method | task | seed | seconds per update: ours | TRL | ratio | score before | after: ours | TRL |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    differences = []
    for method in OURS:
        for task in ("translation", "sentiment"):
            rows = []
            for seed, ours, trl in pairs(data, f"{method} {task}", SEEDS):
                seconds = ours["seconds_per_update"], trl["seconds_per_update"]
                scores = ours["before"]["score"], ours["after"]["score"], trl["after"]["score"]
                rows.append([*seconds, seconds[1] / seconds[0], *scores])
                lines.append(f"| {method} | {task} | {seed} | {cells(rows[-1])} |")
            if rows:
                lines.append(f"| {method} | {task} | median | {cells(medians(rows))} |")
                differences.append(f"- {method}, {task}: {difference([row[4] - row[5] for row in rows])}")
    lines += ["", "Our score after less TRL's, mean over seeds with its 95 % interval by Student's t:", ""]
    return lines + differences


def report_lengths(data: dict[str, Any], device: str) -> list[str]:
    place = PLACES[device]
    lines = ["", "## Lengths of responses", ""]
    lines += [
        f"A new GPT-2 of {place.gpt2['n_layer']} layers of {place.gpt2['n_embd']}, {COMPLETIONS} responses, "
        f"{PER_PROMPT} to a prompt. The score is the mean of each update's responses; peak memory is that of "
        + ("the process." if device == "cpu" else "the GPU."),
        "",
        "TRL's key/value cache is copied at each token, ours now and then.",
        "",
        "| method | length | seed | updates | seconds per update: ours | TRL | ratio | first score: ours | TRL "
        "| last: ours | TRL | peak MB: ours | TRL |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    differences = []
    for method in OURS:
        for length, updates in place.updates.items():
            rows = []
            for seed, *both in pairs(data, f"{method} lengths {length}", place.seeds):
                ours, trl = both
                seconds = [ours["seconds_per_update"], trl["seconds_per_update"]]
                seconds.append(seconds[1] / seconds[0])
                scores = [x["scores"][which] for which in (0, -1) for x in both]
                rows.append([*seconds, *scores, *(x["peak_mb"] for x in both)])
                lines.append(length_row(f"| {method} | {length} | {seed} | {updates}", rows[-1]))
            if len(rows) > 1:
                lines.append(length_row(f"| {method} | {length} | median | {updates}", medians(rows)))
                differences.append(f"- {method}, {length} tokens: {difference([row[5] - row[6] for row in rows])}")
    if differences:
        lines += ["", "Our last score less TRL's, mean over seeds with its 95 % interval by Student's t:", ""]
    return lines + differences


def length_row(start: str, row: list[float]) -> str:
    return f"{start} | {cells(row[:7])} | {row[7]:.0f} | {row[8]:.0f} |"


def report(data: dict[str, Any], device: str) -> None:
    where = data["machine"] if device == "cpu" else f"{data['gpu']}; {data['machine']}"
    title = "# RLOO and GRPO by TRL and by this library" + (", on a GPU" if device == "cuda" else "")
    lines = [title, "", f"{where}, trl {data['trl_version']}", ""]
    if device == "cpu":
        lines += ["Seconds of CPU time, the two in turn; a ratio above 1 is faster than TRL.", "", *report_tasks(data)]
    else:
        lines += ["Seconds of wall-clock time, the two in turn; a ratio above 1 is faster than TRL."]
        lines += ["The first update of a run, which warms the GPU up, does not count."]
    lines += report_lengths(data, device)
    (OUT / f"{PLACES[device].file}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def wanted_runs(seeds: int, device: str) -> dict[str, Callable[[], Any]]:
    """Return what does each run, of tasks and of lengths, by name and in their order."""
    runs: dict[str, Callable[[], Any]] = {}
    place = PLACES[device]
    for seed in range(seeds):
        in_turn = SIDES[:: 1 if seed % 2 else -1]
        for task in ("translation", "sentiment") if device == "cpu" else ():
            for method, who in product(OURS, in_turn):
                run = partial(in_a_process, run_task, method, task, seed, who, start_method="fork")
                runs[f"{method} {task} {seed} {who}"] = run
        for length in place.updates if seed < place.seeds else ():
            for method, who in product(OURS, in_turn):
                run = partial(in_a_process, run_length, method, length, seed, who, device, start_method="fork")
                runs[f"{method} lengths {length} {seed} {who}"] = run
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="runs such as 'grpo lengths 32 0 ours' whose name contains this")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"default: {SEEDS}")
    parser.add_argument("--device", choices=PLACES, default="cpu")
    args = setup(parser)
    path = OUT / f"{PLACES[args.device].file}.json"
    data = record(path, args.report)
    if not args.report:
        data["trl_version"] = version("trl")
        if args.device == "cuda":  # asked in another process: this one forks, which one that uses a GPU cannot
            data["gpu"] = in_a_process(th.cuda.get_device_name, start_method="fork")
    for name, found in missing_runs(data, path, wanted_runs(args.seeds, args.device), args):
        score = found["scores"][-1] if "scores" in found else found["after"]["score"]
        print(f"{name}: {found['seconds_per_update']:.3f} s per update, score {score:.3f}", flush=True)
    report(data, args.device)


if __name__ == "__main__":
    main()
