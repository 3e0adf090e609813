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
from ctypes.util import find_library
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import gymnasium as gym

from sb3_pg.command_line import file_to_read, folder_to_write, missing_package, whole
from sb3_pg.common import workers
from sb3_pg.common.errors import ArgumentError, NonFiniteError, did_you_mean
from sb3_pg.common.interrupts import Interrupted
from sb3_pg.zoo import register
from sb3_pg.zoo.vec_envs import POOL, VEC_ENVS, make_known

PROGRAM = "python -m sb3_pg.zoo"

#: Commands that rl_zoo3 has a function of the same name for, and where.
FUNCTIONS = {
    "train": "rl_zoo3.train",
    "enjoy": "rl_zoo3.enjoy",
    "plot_train": "rl_zoo3.plots",
    "all_plots": "rl_zoo3.plots",
    "plot_from_file": "rl_zoo3.plots",
}

#: What each command does; those that are not functions are modules of rl_zoo3 to be run.
COMMANDS = {
    "train": "train with the settings of zoo_configs/, or search for better ones (-optimize)",
    "enjoy": "show a trained model at work, or print its returns (--no-render)",
    "record_video": "film a trained model, into the folder of its run",
    "record_training": "film the checkpoints of a run one after the other (needs ffmpeg)",
    "plot_train": "draw the returns while training",
    "all_plots": "draw the evaluations of several runs, print their table, and write both to a file (-o)",
    "plot_from_file": "draw what all_plots has written to a file",
    "benchmark": "evaluate all models in a folder, and write their table",
}

#: Our option for several workers.
DISTRIBUTED = "--distributed"

#: Lets archives and statistics be loaded that hold code.
TRUSTED = "--trusted"

#: rl_zoo3 does not check that these are told what to draw.
NEED_OPTIONS = ("all_plots", "plot_from_file")

#: What these draw, in the folder of each run; rl_zoo3 does not check that there is any.
DRAWN = {"all_plots": "evaluations.npz", "plot_train": "*.monitor.csv"}

#: Options that are numbers, and the lowest that makes sense; rl_zoo3 takes any.
LOWEST = {"--n-timesteps": 1, "--n-envs": 1, "--n-eval-envs": 1, "--eval-episodes": 1, "--n-trials": 1}
LOWEST |= {"--max-total-trials": 1, "--n-evaluations": 1, "--n-startup-trials": 0}
LOWEST |= {"--n-jobs": 1, "--log-interval": 1, "--save-freq": 1, "--num-threads": 1}

#: Options that are places, and what reads them.
PLACES = {"--log-folder": folder_to_write, "--output-folder": folder_to_write, "--trained-agent": file_to_read}


def one_line_error(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """``ArgumentParser.error`` without the list of all options."""
    parser.exit(2, f"{parser.prog}: {message}\n")


def add_checked(add: Callable[..., argparse.Action]) -> Callable[..., argparse.Action]:
    """Return ``ArgumentParser.add_argument`` with more ``--vec-env``, and numbers that make sense."""

    def add_argument(self: argparse.ArgumentParser, *names: str, **settings: Any) -> argparse.Action:
        if "--vec-env" in names:
            settings["choices"] = [*settings["choices"], *VEC_ENVS, POOL]
        for name in {*names} & LOWEST.keys():
            settings["type"] = partial(whole, low=LOWEST[name], besides=settings.get("default"))
        for name in {*names} & PLACES.keys():
            settings["type"] = PLACES[name]
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


def check_runs(command: str, options: list[str]) -> None:
    """See that there is something to draw.

    :raises ArgumentError: there is not
    """
    parser = argparse.ArgumentParser(prog=f"{PROGRAM} {command}", add_help=False)
    for names in (("-a", "--algos", "--algo"), ("-e", "--env"), ("-f", "--exp-folders", "--exp-folder")):
        parser.add_argument(*names, nargs="+", default=[])
    asked, _ = parser.parse_known_args(options)
    if not (asked.algos and asked.env and asked.exp_folders):
        raise ArgumentError("needs -a, -e and -f: the algorithms, environments and folders to draw.")
    places = [f"{algo.lower()}/*{env}*/{DRAWN[command]}" for algo in asked.algos for env in asked.env]
    if not any(path for folder in asked.exp_folders for place in places for path in Path(folder).glob(place)):
        hint = " Train with --eval-freq above 0." if command == "all_plots" else ""
        raise ArgumentError(
            f"There is no run to draw: nothing in {', '.join(asked.exp_folders)} is named {' or '.join(places)}.{hint}"
        )


def make_pools_known(options: list[str]) -> None:
    """Let rl-zoo find a task that EnvPool alone has, if it is asked for there.

    :raises ImportError: EnvPool is not installed
    """
    if not any(option.endswith(POOL) for option in options):
        return
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--env", default="")
    parser.add_argument("--vec-env")
    asked, _ = parser.parse_known_args(options)
    if asked.vec_env == POOL and asked.env:
        make_known(asked.env)


def has_screen() -> bool:
    """Return whether windows can be opened; anywhere but on Linux one can only try."""
    return not sys.platform.startswith("linux") or bool({"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys())


def do_without_screen(command: str, options: list[str]) -> list[str]:
    """Return options that need no screen, and let MuJoCo draw without one: it would end the program."""
    if command == "enjoy" and not {"--no-render", "-h", "--help"} & {*options}:
        print("There is no screen: nothing is shown, as with --no-render; record_video films it.", flush=True)
        return [*options, "--no-render"]
    if command == "plot_train":
        print("There is no screen: nothing is shown. The returns are in the monitor.csv files of each run.", flush=True)
    if command in ("record_video", "record_training") and "MUJOCO_GL" not in os.environ:
        library = next((name for name in ("EGL", "OSMesa") if find_library(name)), None)
        if library is not None:
            os.environ["MUJOCO_GL"] = library.lower()
    return options


def run(command: str, options: list[str]) -> None:
    """Run a script of rl_zoo3 as if from the command line, with our algorithms in it and in its children."""
    trusted, options = TRUSTED in options, [option for option in options if option != TRUSTED]
    if command in NEED_OPTIONS and not options:
        options = ["--help"]
    if command == "record_training" and shutil.which("ffmpeg") is None and not {"-h", "--help"} & {*options}:
        raise ArgumentError("record_training joins its videos with the program ffmpeg, which is not installed.")
    if not has_screen():
        options = do_without_screen(command, options)
    if command in DRAWN and not {"-h", "--help"} & {*options}:
        check_runs(command, options)
    make_pools_known(options)
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
        checked = add_checked(argparse.ArgumentParser.add_argument)
        stack.enter_context(replaced(argparse.ArgumentParser, "add_argument", checked))
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


def explain(error: Exception) -> str | None:
    """Return the line that tells the user what to change; None for an error that only its traceback explains."""
    message = " ".join(str(error).split())
    if isinstance(error, (ImportError, gym.error.DependencyNotInstalled)):
        return f"{message.rstrip('.')}.{missing_package(error)}"
    if isinstance(error, (ArgumentError, NonFiniteError, gym.error.Error)):
        return message.replace("trusted=True", TRUSTED)
    package = package_that_raised(error.__traceback__)
    if type(error).__name__ == "FatalError" and "OpenGL" in message:
        hint = "Install EGL or OSMesa (Debian: libegl1, libosmesa6), or use xvfb-run."
        return f"MuJoCo cannot draw here ({message.rstrip('.')}). {hint}"
    if package.startswith(("huggingface_hub", "requests", "httpx", "urllib3")):
        hint = "Name the folder of your own by -f (benchmark: with --no-hub), or look at the connection."
        return f"rl-zoo's agents cannot be downloaded ({message}). {hint}"
    if package not in ("rl_zoo3", "huggingface_sb3"):
        return None  # in lines of rl_zoo3 and of its downloads the message is meant for the user
    if isinstance(error, (NameError, SyntaxError)):
        return f"{message}. The values of -params are Python: text is quoted twice, learning_rate:\"'lin_3e-4'\"."
    if "ALE/" in message or "NoFrameskip" in message:
        message += " Atari games need: pip install ale-py opencv-python"
    return message if isinstance(error, (ValueError, AssertionError, OSError)) else None


def distributed(options: list[str]) -> tuple[int, list[str]]:
    """Return the number of workers that ``--distributed`` asks for, 0 without it, and the other options.

    Without a number it is that of the cores that may be used.

    :raises ArgumentError: a number that cannot be
    """
    if DISTRIBUTED not in options:
        return 0, options
    place = options.index(DISTRIBUTED)
    number = options[place + 1 : place + 2]
    if not number or not re.fullmatch(r"[+-]?[\d.]+", number[0]):
        return workers.cores(), options[:place] + options[place + 1 :]
    try:
        return whole(number[0], low=1), options[:place] + options[place + 2 :]
    except argparse.ArgumentTypeError as error:
        raise ArgumentError(f"argument {DISTRIBUTED}: {error}") from None


def usage() -> str:
    """Return what the commands do."""
    lines = [f"  {name:<17}{what}" for name, what in COMMANDS.items()]
    return "\n".join(
        (
            f"usage: {PROGRAM} COMMAND [options]",
            "",
            "rl-zoo's commands with REINFORCE, TRPO and PPO:",
            *lines,
            "",
            f"{PROGRAM} COMMAND --help lists the options, which are rl-zoo's. Of ours are:",
            f"  {DISTRIBUTED + ' N':<17}train with N processes",
            f"  {TRUSTED:<17}run the code that archives hold, which are refused without it",
            f"  {'--vec-env':<17}has sync, async (gymnasium's) and envpool, too",
            "",
            "For example:",
            f"  {PROGRAM} train --algo trpo --env CartPole-v1 -f logs/ -P",
            f"  {PROGRAM} enjoy --algo trpo --env CartPole-v1 -f logs/ --no-render",
        )
    )


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code: 0, 2 for input that cannot work, 130 or 143 after ctrl-C or SIGTERM."""
    command, *options = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help"):
        print(usage())
        return 0
    if command not in COMMANDS:
        hint = did_you_mean(command, [*COMMANDS]) or f" The commands are {', '.join(COMMANDS)}."
        print(f"{PROGRAM}: there is no command {command!r}.{hint}", file=sys.stderr)
        return 2
    try:
        n_workers, options = distributed(options)
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
