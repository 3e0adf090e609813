"""Several workers compute what one does with all of their environments, and end together."""

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import together
from forked import forking, run_script
from stable_baselines3.common.callbacks import (
    CallbackList,
    CheckpointCallback,
    EveryNTimesteps,
    StopTrainingOnMaxEpisodes,
)
from torch.distributed import TCPStore

from sb3_pg import PPO
from sb3_pg.common.data_parallel import _of_all

FOLDER = Path(__file__).parent
PLACES = os.pathsep.join(str(x) for x in (FOLDER.parents[1], FOLDER.parent, FOLDER))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PLACES}


def torchrun(n: int, script: Path, *arguments: str) -> tuple[set[int], str, str]:
    """Run a script in so many workers; what they exit with and print."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
    command += [str(script), *arguments]
    with subprocess.Popen(command, env=ENVIRONMENT, text=True, stdout=-1, stderr=-1) as process:
        try:
            out, errors = process.communicate(timeout=180)
        finally:
            process.kill()
    return {process.returncode}, out, errors


def forked_workers(n: int, script: Path, *arguments: str) -> tuple[set[int], str, str]:
    """Do the same without torchrun: nothing but the workers themselves sees to their end."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def work(rank: int) -> None:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
        place |= {"WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "RANK": rank, "LOCAL_RANK": rank}
        os.environ.update({name: str(value) for name, value in place.items()})
        run_script(script, *arguments)

    with ExitStack() as stack:
        started = [stack.enter_context(forking(lambda rank=rank: work(rank))) for rank in range(n)]
        for process, _ in started:
            process.join(180)
        said = [said() for _, said in started]
        return {process.exitcode for process, _ in started}, *map("".join, zip(*said, strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    return tmp_path_factory.mktemp("workers")


@pytest.fixture(scope="module", params=[2, 3])
def found(request: Any, folder: Path) -> dict[str, np.ndarray]:
    """What several workers have found in all cases."""
    file = folder / f"{request.param}.npz"
    codes, out, errors = forked_workers(
        request.param, FOLDER / "together.py", str(file), str(folder / str(request.param))
    )
    assert codes == {0}, errors
    assert out.count("left") == request.param, out  # before the process ended, which gloo's threads would kill
    return dict(np.load(file))


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """What one worker finds, as it is asked for."""
    return {}


@pytest.mark.parametrize("name", together.CASES)
def test_several_workers_compute_what_one_does(name, found, alone, monkeypatch):
    together.prepare(monkeypatch.setattr)
    if name not in alone:
        alone[name] = together.CASES[name]()
    for key, expected in alone[name].items():
        np.testing.assert_allclose(found[f"{name}/{key}"], expected, rtol=2e-3, atol=2e-5, err_msg=key)


def test_running_statistics_are_those_of_all_workers(found, monkeypatch):
    """But for the observations before the first step, of which the first worker's alone count."""
    expected = together.statistics()
    for key, value in expected.items():
        np.testing.assert_allclose(found[f"statistics/{key}"], value, rtol=0.1, atol=0.05)


def test_workers_with_unequal_rollouts_take_the_same_steps(found):
    assert found["unequal/is_equal"]


def test_each_worker_keeps_to_a_core_if_there_are_as_many(found):
    assert found["cores/as_they_should_be"]


def test_workers_tune_one_language_model(found):
    assert found["texts/is_equal"]
    assert found["texts/has_moved"]


def test_all_stop_when_the_callback_of_one_does(found):
    assert found["stopped/updates"] == 1
    assert found["stopped/paused"]


def test_all_go_on_together_after_the_callback_of_one_has_stopped(found):
    """The last one in its second rollout, after 20 steps; the others have completed theirs."""
    assert found["went on/is_equal"]
    n_workers = {3: 2, 2: 3}[found["went on/n_envs"].item()]
    assert found["went on/stopped at"] == (20 + 32 * (n_workers - 1)) * (6 // n_workers)
    assert found["went on/ended at"] % (16 * 6) == 0 and found["went on/ended at"] >= found["went on/stopped at"] + 200


def test_workers_act_apart(found):
    """Where they have no seed, and when they go on from one archive, at which the first is where it was."""
    assert found["apart/unseeded"].all()
    assert found["apart/loaded"].all()
    assert found["apart/first"]


def test_the_first_worker_alone_saves(found, folder, request):
    written = folder / str(request.node.callspec.params["found"])
    assert {"model.zip", "best_model.zip", "progress.csv"} < {x.name for x in (written / "0").iterdir()}
    others = [x.name for x in (written / "1").iterdir()]
    assert others == ["progress.csv"]  # which the test itself made
    assert (written / "1" / "progress.csv").stat().st_size == 0
    assert len((written / "0" / "progress.csv").read_text().splitlines()) > 2


def test_callbacks_of_the_first_worker_alone_are_found_in_others():
    saving, others = CheckpointCallback(1, "x"), StopTrainingOnMaxEpisodes(1)
    every = EveryNTimesteps(10, CallbackList([saving, EveryNTimesteps(5, saving), others]))
    found = _of_all(every)
    assert found is every
    inner, last = found.callback.callbacks
    assert isinstance(inner, EveryNTimesteps) and inner.callback is None and last is others
    assert _of_all([saving, every]).callbacks == [every]


@pytest.mark.parametrize("several", [list, CallbackList])
def test_lists_within_lists_of_callbacks_are_callbacks_in_others(several):
    saving, others = CheckpointCallback(1, "x"), StopTrainingOnMaxEpisodes(1)
    found = _of_all(several([CallbackList([saving, CallbackList([others])])]))
    model = PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8)
    found.init_callback(model)
    assert others.model is model


SCRIPT = """
import os, signal, sys, time
sys.path.insert(0, {folder!r})
import torch as th
from together import PPO, BaseCallback, envs
from sb3_pg.common import workers
workers.join()
th.set_num_threads(1)
class Fault(BaseCallback):
    def _on_step(self):
        if workers.rank() == 1 and self.n_calls == 40:
            {fault}
        return True
model = PPO("MlpPolicy", envs(), n_steps=16, batch_size=16, seed=1, device="cpu")
model.learn(96)
model.save(sys.argv[1])
print("READY", flush=True)
model.learn(10**9, callback=Fault())
"""


@pytest.mark.parametrize(
    ("run", "fault", "message"),
    [
        (torchrun, "raise OSError('the disk is gone')", "the disk is gone"),
        (forked_workers, "os.kill(os.getpid(), signal.SIGKILL)", "has lost the others"),
        (forked_workers, "next(model.policy.parameters()).data.add_(1.0)", "no longer those of worker 0"),
    ],
)
def test_all_end_within_seconds_when_one_fails(run, fault, message, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(folder=str(FOLDER), fault=fault))
    archive = tmp_path / "model.zip"
    codes, out, errors = run(2, script, str(archive))
    assert not codes & {0, None}  # none succeeds, or goes on
    assert message in errors
    assert "READY" in out
    assert together.PPO.load(archive).num_timesteps == 96
