"""From nothing to a tuned small language model: ``python -m sb3_pg.text.demo --task translation --algo ppo``.

Makes a small model, teaches it a task for a quarter of a minute, tunes it with a policy gradient for a minute or
two, and shows what it answers to held-out prompts before and after.
"""

import argparse
import importlib.util
import io
import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch as th

from sb3_pg import PPO, REINFORCE, TRPO
from sb3_pg.command_line import CommandError, Parser, make_writable, missing_package, read_own, seed_number, whole
from sb3_pg.common.interrupts import Interrupted, interrupts_raised, saved_when_interrupted
from sb3_pg.common.policy_gradient import PolicyGradientAlgorithm

if TYPE_CHECKING:  # transformers takes seconds, and may be missing: functions import what needs it
    from sb3_pg.text.environment import TextTask, TextVecEnv

PROGRAM = "python -m sb3_pg.text.demo"

ALGORITHMS: dict[str, type[PolicyGradientAlgorithm]] = {"reinforce": REINFORCE, "trpo": TRPO, "ppo": PPO}

#: Gradient steps of the supervised start: enough to get the form right and to be wrong often.
PRETRAIN_STEPS = {"question_answering": 600, "translation": 400, "sentiment": 250}

#: Tokens acted while tuning, about a minute each.
TIMESTEPS = {"reinforce": 150_000, "trpo": 60_000, "ppo": 100_000}

#: Environments side by side, and how many of them are shown the same prompts.
N_ENVS = 64
COMPLETIONS_PER_PROMPT = {"reinforce": 4, "trpo": 1, "ppo": 1}

SETTINGS: dict[str, dict[str, Any]] = {
    "reinforce": {
        "n_episodes": 64,
        "baseline": "leave_one_out_same_start",
        "learning_rate": 3e-4,
        "n_critic_updates": 0,
    },
    "trpo": {
        "n_steps": 32,
        "batch_size": 1024,
        "gae_lambda": 1.0,
        "target_kl": 0.02,
        "sub_sampling_factor": 4,
        "cg_max_steps": 15,
        "n_critic_updates": 5,
    },
    "ppo": {
        "n_steps": 64,
        "batch_size": 512,
        "n_epochs": 4,
        "learning_rate": 1e-4,
        "max_grad_norm": 1.0,
    },
}

#: Weight of the penalty for leaving the supervised model.
REFERENCE_KL_COEF = 0.05


def make_model(algo: str, task: "TextTask", folder: Path, seed: int, **changes: Any) -> PolicyGradientAlgorithm:
    """Return the algorithm with the settings above on a pretrained model.

    :param changes: of the settings
    """
    kwargs = {"model": str(folder), "reference_kl_coef": REFERENCE_KL_COEF}
    settings: dict[str, Any] = {"gamma": 1.0, "seed": seed, "device": "cpu", **SETTINGS[algo], **changes}
    return ALGORITHMS[algo]("CausalLMPolicy", environments(algo, task, seed), policy_kwargs=kwargs, **settings)


def environments(algo: str, task: "TextTask", seed: int) -> "TextVecEnv":
    """Return those that the algorithm is tuned in."""
    from sb3_pg.text.environment import TextVecEnv

    return TextVecEnv(task, N_ENVS, COMPLETIONS_PER_PROMPT[algo], seed=seed)


def show(when: str, model: Any, task: "TextTask", metric: str) -> dict[str, float]:
    """Print figures and some texts; all held-out prompts, answers drawn as in training."""
    from sb3_pg.text.evaluation import evaluate_texts, table

    th.manual_seed(0)
    figures, records = evaluate_texts(model.policy, task, 200)
    if metric not in figures:  # the sentiment is the score itself
        metric = "score"
    named = {name: figures[name] for name in dict.fromkeys((metric, "score", "distinct_2", "length"))}
    print(f"\n{when}: " + ", ".join(f"{name} {value:.3g}" for name, value in named.items()))
    print(table(records[:6]))
    return figures


def run(options: argparse.Namespace) -> None:
    """Run the whole demonstration."""
    if not options.resume:
        make_writable(options.out)
    from sb3_pg.text.tasks import TASKS

    built_in, path = TASKS[options.task], options.out / "model.zip"
    task, held_out = built_in.make("train"), built_in.make("test")
    timesteps = TIMESTEPS[options.algo] if options.timesteps is None else options.timesteps
    with told_when_interrupted("there is nothing new to save"):
        model = load_again(options, task, path) if options.resume else set_up(options, task)
        before = show("Before going on" if options.resume else "Before tuning", model, held_out, built_in.metric)
    start, n_before = time.perf_counter(), model.num_timesteps
    with saved_when_interrupted(lambda: save_for_later(model, path, options)):
        model.learn(max(0, timesteps - n_before), reset_num_timesteps=not options.resume, progress_bar=options.progress)
    model.save(path)
    seconds, n_tokens = time.perf_counter() - start, model.num_timesteps - n_before
    with told_when_interrupted(f"the model is saved as {path}"):
        when = f"After {n_tokens:,} {'more ' if n_before else ''}tokens of {type(model).__name__} in {seconds:.0f} s"
        after = show(when, model, held_out, built_in.metric)
        metric = built_in.metric if built_in.metric in after else "score"
        print(
            f"\n{metric} on held-out prompts: {before[metric]:.3g} before, {after[metric]:.3g} after. Saved as {path}"
        )
        print(how_to_ask(model, held_out, path, options.out / "tuned"))


def set_up(options: argparse.Namespace, task: "TextTask") -> PolicyGradientAlgorithm:
    """Return a model that has been taught the task, to be tuned."""
    from sb3_pg.text.supervised import pretrain

    folder, start = options.out / "supervised", time.perf_counter()
    steps = PRETRAIN_STEPS[options.task] if options.pretrain_steps is None else options.pretrain_steps
    print(f"{options.task}: {len(task.prompts):,} prompts to train on")
    pretrain(task, folder, n_steps=steps, seed=options.seed, report=report_every_hundredth)
    print(f"Supervised start: {steps} steps in {time.perf_counter() - start:.0f} s, saved in {folder}")
    return make_model(options.algo, task, folder, options.seed)


def load_again(options: argparse.Namespace, task: "TextTask", path: Path) -> PolicyGradientAlgorithm:
    """Return the model of an interrupted run."""
    if not path.exists():
        raise CommandError(f"there is no {path} to go on with: leave out --resume")
    algorithm = ALGORITHMS[options.algo]
    read_own(path, algorithm)
    model = algorithm.load(path, env=environments(options.algo, task, options.seed), device="cpu")
    print(f"Going on with {path} after {model.num_timesteps:,} tokens")
    return model


@contextmanager
def told_when_interrupted(what: str) -> Iterator[None]:
    """Say in one line what there is when ctrl-C or SIGTERM ends the block."""
    try:
        with interrupts_raised():
            yield
    except Interrupted:
        print(f"{PROGRAM}: interrupted; {what}", file=sys.stderr)
        raise


def report_every_hundredth(step: int, loss: float) -> None:
    """Print how far the supervised start is."""
    if step % 100 == 99:
        print(f"  step {step + 1}: {loss:.3f} nats per token")


def how_to_ask(model: Any, task: "TextTask", path: Path, folder: Path) -> str:
    """Write a folder for transformers; return the lines that load the model and ask it something."""
    model.policy.save_pretrained(folder)
    name = type(model).__name__
    return (
        f"{folder} is for other programs: model and tokenizer as transformers reads them. "
        "Ask the tuned model something in Python:\n"
        f"  from sb3_pg import {name}\n"
        f"  model = {name}.load({str(path)!r})\n"
        f"  print(model.policy.generate([{task.prompts[0]!r}]))"
    )


def save_for_later(model: PolicyGradientAlgorithm, path: Path, options: argparse.Namespace) -> str:
    """Save an interrupted run; return where, and how to go on."""
    model.save(path)
    go_on = f"{PROGRAM} --resume --task {options.task} --algo {options.algo} --out {shlex.quote(str(options.out))}"
    timesteps = "" if options.timesteps is None else f" --timesteps {options.timesteps}"
    return f"{path} after {model.num_timesteps:,} tokens; go on with {go_on}{timesteps}"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(prog=PROGRAM, description=__doc__.split("\n")[0])
    parser.add_argument("--task", default="translation", choices=PRETRAIN_STEPS, help="default: translation")
    parser.add_argument("--algo", type=str.lower, default="ppo", choices=ALGORITHMS, help="default: ppo")
    parser.add_argument("--timesteps", type=whole, metavar="N", help="tokens acted while tuning; default: a minute's")
    parser.add_argument("--pretrain-steps", type=whole, metavar="N", help="supervised gradient steps; 0 for none")
    parser.add_argument("--seed", type=seed_number, default=0, metavar="S", help="default: 0")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder, up to --timesteps")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/text-TASK-ALGO-SEED")
    has_bar = all(importlib.util.find_spec(name) for name in ("tqdm", "rich"))
    bar = argparse.BooleanOptionalAction
    parser.add_argument("--progress", action=bar, default=has_bar, help="a progress bar (needs tqdm and rich)")
    options = parser.parse_args(arguments)
    if options.out is None:
        options.out = Path("runs") / f"text-{options.task}-{options.algo}-{options.seed}"
    return options


def prepare_transformers() -> None:
    """Import what the extra ``text`` brings, and keep the bars of transformers off the screen.

    :raises ImportError: a package of the extra ``text`` is missing
    """
    from transformers.utils import logging

    import sb3_pg.text.language_model  # noqa: F401

    for package in ("peft", "sacrebleu", "rouge_score", "num2words", "vaderSentiment"):
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"{package} is not installed.", name=package)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def main(arguments: list[str] | None = None) -> int:
    """Run the demonstration; the exit code: 0, 2 for input that cannot work, 130 or 143 after ctrl-C or SIGTERM."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may not have the letters of a language
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        options = parse(arguments)
        prepare_transformers()
        run(options)
    except Interrupted as interrupt:
        return interrupt.exit_status
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; there is nothing new to save", file=sys.stderr)
        return 130
    except ImportError as error:
        print(f"{PROGRAM}: {' '.join(str(error).split())}{missing_package(error)}", file=sys.stderr)
        return 2
    except (CommandError, OSError, ValueError) as error:
        print(f"{PROGRAM}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
