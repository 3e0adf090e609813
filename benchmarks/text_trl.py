"""RLOO by TRL's trainer and by REINFORCE, on the same model, prompts and reward; writes benchmarks/text/trl.md.

    python benchmarks/text_trl.py           # translation and sentiment, ten seeds, one run after the other
    python benchmarks/text_trl.py --report  # the table again from the data

Both draw 4 responses to each of 16 prompts per update, with the same learning rate, optimizer and weight of the
penalty, in float32 on one thread. Runs of the two alternate, and CPU time counts, so that other work on the machine
does not. TRL's gradient checkpointing is off, which makes it faster. Held-out prompts are answered by drawing, by the
same code, whoever trained the model.
"""

import argparse
import contextlib
import io
import json
import statistics
import time
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

from text import OUT, PRETRAIN_STEPS, TASKS, evaluate, record, setup  # first, since it pins the threads

# isort: split
from datasets import Dataset
from scipy import stats
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from transformers import TrainerCallback
from trl import RLOOConfig, RLOOTrainer

from sb3_pg.text.demo import REFERENCE_KL_COEF, make_model
from sb3_pg.text.supervised import pretrain

#: TRL's loss is a sum over the tokens of a response and ours a mean, so its clip of 1 is a much smaller number here.
MAX_GRAD_NORM = 0.05
UPDATES, COMPLETIONS, PER_PROMPT, LEARNING_RATE = 100, 64, 4, 3e-4
SEEDS = range(10)  # with three the rewards could not be told apart


class OurClock(BaseCallback):
    """When each update begins; stops after the last."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def _on_rollout_start(self) -> None:
        self.times.append(time.process_time())

    def _on_step(self) -> bool:
        return len(self.times) <= UPDATES


class TheirClock(TrainerCallback):
    """The same of TRL's updates."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time.process_time())

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time.process_time())


def train_ours(model: Any, task: Any, seed: int) -> list[float]:
    clock = OurClock()
    model.learn(10**9, callback=clock)
    return clock.times


def train_theirs(model: Any, task: Any, seed: int) -> list[float]:
    """TRL on the very model that the policy holds."""

    def reward(prompts: list[str], completions: list[str], reference: list[Any], **_: Any) -> list[float]:
        return task.reward(prompts, completions, reference)

    config = RLOOConfig(
        output_dir="runs/trl",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        per_device_train_batch_size=COMPLETIONS,
        num_generations=PER_PROMPT,
        max_completion_length=task.response_length,
        beta=REFERENCE_KL_COEF,
        max_steps=UPDATES,
        seed=seed,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        logging_steps=UPDATES,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    clock, tokenizer = TheirClock(), task.tokenizer
    tokenizer.padding_side = "left"
    references = task.references or [None] * len(task.prompts)
    data = Dataset.from_dict({"prompt": list(task.prompts), "reference": list(references)})
    trainer = RLOOTrainer(model.policy.lm, reward, config, data, processing_class=tokenizer, callbacks=[clock])
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    return clock.times


def run(name: str, who: str, seed: int, folder: Path) -> dict[str, Any]:
    task, held_out = TASKS[name].make("train"), TASKS[name].make("test")
    settings = {"learning_rate": LEARNING_RATE, "max_grad_norm": MAX_GRAD_NORM}
    model = make_model("reinforce", task, folder, seed, **settings)
    model.set_logger(Logger(None, []))
    before, _ = evaluate(model, held_out)
    start = time.perf_counter()
    times = {"ours": train_ours, "trl": train_theirs}[who](model, task, seed)
    wall = time.perf_counter() - start
    after, _ = evaluate(model, held_out)
    updates = [b - a for a, b in pairwise(times)]
    found = {"seconds_per_update": statistics.median(updates), "seconds": times[-1] - times[0], "wall_seconds": wall}
    return {**found, "updates": len(updates), "before": before, "after": after}


def difference(values: list[float]) -> str:
    low, high = stats.t.interval(0.95, len(values) - 1, statistics.mean(values), stats.sem(values))
    return f"{statistics.mean(values):+.4f} [{low:+.4f}, {high:+.4f}]"


def report(data: dict[str, Any]) -> None:
    trl = data["trl_version"]
    lines = ["# RLOO by TRL and by REINFORCE", "", f"{data['machine']}, trl {trl}", ""]
    lines += [
        f"{UPDATES} updates of {COMPLETIONS} completions, {PER_PROMPT} to a prompt; the two in turn; CPU seconds.",
        "",
    ]
    lines += ["| task | seed | seconds per update: ours | TRL | ratio | score before | after: ours | TRL |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    differences = []
    for task in TASKS:
        rows = []
        for seed in SEEDS:
            ours, trl = (data["runs"].get(f"{task} {seed} {who}") for who in ("ours", "trl"))
            if ours is None or trl is None:
                continue
            seconds = ours["seconds_per_update"], trl["seconds_per_update"]
            scores = ours["before"]["score"], ours["after"]["score"], trl["after"]["score"]
            rows.append([*seconds, seconds[1] / seconds[0], *scores])
            lines.append(f"| {task} | {seed} | " + " | ".join(f"{x:.3f}" for x in rows[-1]) + " |")
        if rows:
            medians = [statistics.median(column) for column in zip(*rows, strict=True)]
            lines.append(f"| {task} | median | " + " | ".join(f"{x:.3f}" for x in medians) + " |")
            differences.append(f"- {task}: {difference([row[4] - row[5] for row in rows])}")
    lines += [
        "",
        "Our score after less TRL's, mean over seeds with its 95 % interval by Student's t:",
        "",
        *differences,
    ]
    (OUT / "trl.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args = setup(parser)
    path = OUT / "trl.json"
    data = record(path) | {"trl_version": version("trl")}
    runs = [
        (f"{task} {seed} {who}", task, who, seed)
        for seed in SEEDS
        for task in ("translation", "sentiment")
        for who in (("ours", "trl") if seed % 2 else ("trl", "ours"))
    ]
    for name, task, who, seed in [] if args.report else runs:
        if name not in data["runs"]:
            folder = Path("runs/text-benchmark") / f"{task}-{seed}"
            if not (folder / "config.json").exists():
                pretrain(TASKS[task].make("train"), folder, n_steps=PRETRAIN_STEPS[task], seed=seed)
            data["runs"][name] = found = run(task, who, seed, folder)
            path.write_text(json.dumps(data, indent=1))
            seconds, score = found["seconds_per_update"], found["after"]["score"]
            print(f"{name}: {seconds:.3f} s per update, score {score:.3f}", flush=True)
    report(data)


if __name__ == "__main__":
    main()
