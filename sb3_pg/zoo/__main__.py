"""rl-zoo's commands with REINFORCE, TRPO and PPO: ``python -m sb3_pg.zoo train --algo trpo --env Pendulum-v1``.

Every option is rl_zoo3's own and passes through; ``python -m sb3_pg.zoo train --help`` lists them. One more is ours:
``--trusted`` runs the code that archives and statistics may hold, which are refused without it. ``--vec-env``
knows gymnasium's environments (sync, async) and envpool, too. ``train --distributed N`` trains with N processes.
"""

import argparse
import importlib
import io
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from types import TracebackType
from typing import Any, NoReturn

import gymnasium as gym

from sb3_pg.common import workers
from sb3_pg.common.errors import ArgumentError, NonFiniteError
from sb3_pg.common.interrupts import Interrupted
from sb3_pg.zoo import register
from sb3_pg.zoo.vec_envs import POOL, VEC_ENVS

PROGRAM = "python -m sb3_pg.zoo"

#: Commands that rl_zoo3 has a function of the same name for, and where.
FUNCTIONS = {
    "train": "rl_zoo3.train",
    "enjoy": "rl_zoo3.enjoy",
    "plot_train": "rl_zoo3.plots",
    "all_plots": "rl_zoo3.plots",
    "plot_from_file": "rl_zoo3.plots",
}

#: Commands that are modules of rl_zoo3 to be run.
MODULES = ("record_video", "record_training", "benchmark")

COMMANDS = (*FUNCTIONS, *MODULES)

#: Our option for several workers.
DISTRIBUTED = "--distributed"

#: Lets archives and statistics be loaded that hold code.
TRUSTED = "--trusted"

#: rl_zoo3 does not check that these are told what to draw.
NEED_OPTIONS = ("all_plots", "plot_from_file")

#: Packages that come with an extra of ours, and which.
EXTRAS = {"optuna": "zoo", "rl_zoo3": "zoo", "huggingface_sb3": "zoo", "box2d": "zoo", "moviepy": "zoo"}
EXTRAS |= {"pygame": "zoo", "mujoco": "mujoco", "envpool": "envpool"}


def one_line_error(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """``ArgumentParser.error`` without the list of all options."""
    parser.exit(2, f"{parser.prog}: {message}\n")


def add_with_vec_envs(add: Callable[..., argparse.Action]) -> Callable[..., argparse.Action]:
    """Return ``ArgumentParser.add_argument`` with more to choose from for ``--vec-env``."""

    def add_argument(self: argparse.ArgumentParser, *names: str, **settings: Any) -> argparse.Action:
        if "--vec-env" in names:
            settings["choices"] = [*settings["choices"], *VEC_ENVS, POOL]
        return add(self, *names, **settings)

    return add_argument


def our_command(command: Any) -> Any:
    """Return what rl_zoo3's scripts start as children (``python -m rl_zoo3.x``, ``x.py``), with our algorithms."""
    match command:
        case ["python", "-m", str(module), *options] if module.startswith("rl_zoo3."):
            return [sys.executable, "-m", "sb3_pg.zoo", module.removeprefix("rl_zoo3."), *options]
        case ["python", str(file), *options] if file.endswith(".py"):
            return [sys.executable, "-m", "sb3_pg.zoo", file.removesuffix(".py"), *options]
    return command


def run(command: str, options: list[str]) -> None:
    """Run a script of rl_zoo3 as if from the command line, with our algorithms in it and in its children."""
    trusted, options = TRUSTED in options, [option for option in options if option != TRUSTED]
    if command in NEED_OPTIONS and not options:
        options = ["--help"]
    if command == "record_training" and shutil.which("ffmpeg") is None and not {"-h", "--help"} & {*options}:
        raise ArgumentError("record_training joins its videos with the program ffmpeg, which is not installed.")
    register()
    from sb3_pg.zoo.files import replaced, running_no_settings, trusting_files  # after the extra was asked for

    call = subprocess.call

    def call_with_ours(command: Any, *more: Any, **settings: Any) -> int:
        own = our_command(command)
        return call([*own, TRUSTED] if trusted and own is not command else own, *more, **settings)

    with ExitStack() as stack:
        workers.join()
        if workers.rank():
            stack.enter_context(redirect_stdout(io.StringIO()))
        stack.enter_context(trusting_files() if trusted else running_no_settings())
        stack.enter_context(replaced(sys, "argv", [f"{PROGRAM} {command}", *options]))
        stack.enter_context(replaced(argparse.ArgumentParser, "error", one_line_error))
        more_choices = add_with_vec_envs(argparse.ArgumentParser.add_argument)
        stack.enter_context(replaced(argparse.ArgumentParser, "add_argument", more_choices))
        if command in FUNCTIONS:
            getattr(importlib.import_module(FUNCTIONS[command]), command)()
        else:
            stack.enter_context(replaced(subprocess, "call", call_with_ours))
            runpy.run_module(f"rl_zoo3.{command}", run_name="__main__")


def package_that_raised(traceback: TracebackType | None) -> str:
    """Return the package whose lines raised an error."""
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    package = traceback.tb_frame.f_globals.get("__package__") if traceback else None
    return (package or "").split(".")[0]


def missing_package(error: ImportError | gym.error.DependencyNotInstalled) -> str:
    """Return what to install, if an extra of ours has it."""
    names = [error.name or ""] if isinstance(error, ImportError) else re.findall(r"\w+", str(error))
    extras = [EXTRAS[name.split(".")[0].lower()] for name in names if name.split(".")[0].lower() in EXTRAS]
    return f" Install it with: pip install 'sb3_pg[{extras[0]}]'" if extras else ""


def explain(error: Exception) -> str | None:
    """Return the line that tells the user what to change; None for an error that only its traceback explains."""
    message = " ".join(str(error).split())
    if isinstance(error, (ImportError, gym.error.DependencyNotInstalled)):
        return f"{message.rstrip('.')}.{missing_package(error)}"
    if isinstance(error, (ArgumentError, NonFiniteError, gym.error.Error)):
        return message.replace("trusted=True", TRUSTED)
    package = package_that_raised(error.__traceback__)
    if package.startswith(("huggingface_hub", "requests", "httpx", "urllib3")):
        return f"rl-zoo's agents cannot be downloaded ({message}). Pass --no-hub, or look at the connection."
    if package not in ("rl_zoo3", "huggingface_sb3"):
        return None  # in lines of rl_zoo3 and of its downloads the message is meant for the user
    if isinstance(error, (NameError, SyntaxError)):
        return f"{message}. The values of -params are Python: text is quoted twice, learning_rate:\"'lin_3e-4'\"."
    if "ALE/" in message or "NoFrameskip" in message:
        message += " Atari games need: pip install ale-py opencv-python"
    return message if isinstance(error, (ValueError, AssertionError, OSError)) else None


def distributed(options: list[str]) -> tuple[int, list[str]]:
    """Return the number of workers that ``--distributed`` asks for, 0 without it, and the other options.

    Without a number it is that of the processor's cores.
    """
    if DISTRIBUTED not in options:
        return 0, options
    place = options.index(DISTRIBUTED)
    number = options[place + 1 : place + 2]
    has_number = bool(number) and number[0].isdecimal()
    return int(number[0]) if has_number else os.cpu_count() or 1, options[:place] + options[place + 1 + has_number :]


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code: 0, 2 for input that cannot work, 130 or 143 after ctrl-C or SIGTERM."""
    command, *options = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    usage = f"{PROGRAM} COMMAND [options]; the commands are {', '.join(COMMANDS)}"
    usage += f". {DISTRIBUTED} N trains with N processes."
    usage += f" {TRUSTED} runs the code that archives hold."
    if command in ("-h", "--help"):
        print(usage)
        return 0
    if command not in COMMANDS:
        print(f"{PROGRAM}: there is no command {command!r}. Usage: {usage}", file=sys.stderr)
        return 2
    n_workers, options = distributed(options)
    try:
        if n_workers and "RANK" not in os.environ:
            return workers.start(n_workers, "sb3_pg.zoo", [command, *options])
        run(command, options)
    except Interrupted as interrupt:
        return interrupt.exit_status
    except KeyboardInterrupt:
        print(f"{PROGRAM} {command}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        print(f"{PROGRAM} {command}: {line}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
