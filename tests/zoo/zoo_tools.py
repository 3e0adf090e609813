"""What the tests of the zoo share. rl_zoo3 is imported by its commands only: it patches gymnasium for all."""

import os
import subprocess
import sys
from pathlib import Path

from sb3_pg import PPO, REINFORCE, TRPO
from sb3_pg.zoo import register
from sb3_pg.zoo.__main__ import main

ROOT = Path(__file__).parents[2]
ALGORITHMS = {"reinforce": REINFORCE, "trpo": TRPO, "ppo": PPO}


def python(code_or_module, *options, **environment):
    source = ["-c", code_or_module] if "\n" in code_or_module else ["-m", code_or_module]
    variables = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([sys.executable, *source, *options], capture_output=True, text=True, env=variables)


def constructor(tmp_path, monkeypatch):
    """A function that gives what ``train`` with these options would train."""
    register()
    models = []
    monkeypatch.setattr("rl_zoo3.exp_manager.ExperimentManager.learn", lambda self, model: models.append(model))
    monkeypatch.setattr("rl_zoo3.exp_manager.ExperimentManager.save_trained_model", lambda self, model: None)

    def construct(algo, env_id, *options):
        arguments = ["--algo", algo, "--env", env_id, "-f", str(tmp_path), "--eval-freq", "-1", *options]
        assert main(["train", *arguments]) == 0
        return models.pop()

    return construct
