"""What several workers gain, and what a message between them takes: ``python benchmarks/workers.py``.

Times ``learn()`` with one worker and with two, each on a core and a thread of its own, at the same settings per worker,
alternately; then messages of several sizes. From those and from the seconds that one worker computes the table says
what 8, 64 and 512 workers on as many cores would gain, if a sum over n workers takes log2(n) such messages. Writes
``benchmarks/workers/``. Needs two free cores.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch as th

FOLDER = Path(__file__).parent / "workers"

#: Algorithm, environment, environments of each worker, arguments
ROWS: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    f"{algorithm}, {env}, 8 environments, batch {batch_size}": (algorithm, env, 8, {"batch_size": batch_size})
    for algorithm, batch_sizes in {"PPO": (64, 4096), "TRPO": (128, 4096)}.items()
    for env in ("CartPole-v1", "HalfCheetah-v5")
    for batch_size in batch_sizes
}

#: Rollouts that are timed, after one that is not
UPDATES = 4

#: Numbers of float32 in a message: a few sums, and the gradients of [64, 64], of [256, 256] and of a small CNN.
MESSAGES = (4, 10_000, 140_000, 1_700_000)


def measure(name: str) -> None:
    """Print the steps a second of one row, and how many messages a step sends; run in each worker."""
    from stable_baselines3.common.env_util import make_vec_env

    import sb3_pg
    from sb3_pg.common import workers

    th.set_num_threads(1)
    algorithm, env, n_envs, arguments = ROWS[name]
    kind = getattr(sb3_pg, algorithm)
    model = kind("MlpPolicy", make_vec_env(env, n_envs), seed=1, device="cpu", **arguments)
    rollout = model.n_steps * n_envs * workers.size()
    model.learn(rollout)
    n_messages, add = 0, workers.add

    def counted(x: Any) -> None:
        nonlocal n_messages
        n_messages += 1
        add(x)

    workers.add = counted
    start = time.perf_counter()
    model.learn(UPDATES * rollout, reset_num_timesteps=False)
    seconds = (time.perf_counter() - start) / UPDATES
    if workers.rank() == 0:
        print(json.dumps({"speed": rollout / seconds, "messages": n_messages / UPDATES, "seconds": seconds}))


def time_messages() -> None:
    """Print the microseconds of a sum over all workers, by the numbers in it; run in each worker."""
    from sb3_pg.common import workers

    workers.join()
    found = {}
    for n in MESSAGES:
        x, times = np.zeros(n, np.float32), []
        for _ in range(200):
            start = time.perf_counter()
            workers.add(x)
            times.append(time.perf_counter() - start)
        found[n] = 1e6 * statistics.mean(times)
    workers.agree(True)  # one that ends early would be missed by the others' last message
    if workers.rank() == 0:
        print(json.dumps(found))


def started(n: int, *arguments: str) -> Any:
    """Return what the first of n workers has printed."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"] if n > 1 else []
    command = [sys.executable, "-W", "ignore", *torchrun, __file__, *arguments]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    if ended.returncode:
        sys.exit(f"{' '.join(arguments)} by {n} workers: {ended.stderr}")
    return json.loads([line for line in ended.stdout.splitlines() if line.startswith("{")][-1])


def table(results: dict[str, Any]) -> str:
    """Return the measurements and what follows from them as Markdown."""
    lines = ["# Several workers", "", "Made by `benchmarks/workers.py`, two workers on two cores.", ""]
    lines += ["| | steps/s, 1 worker | steps/s, 2 workers | ratio | messages per update |", "|---|---|---|---|---|"]
    for name, its in results["rows"].items():
        one, two = (statistics.median(x["speed"] for x in its[n]) for n in ("1", "2"))
        lines.append(f"| {name} | {one:,.0f} | {two:,.0f} | {two / one:.2f} | {its['2'][0]['messages']:.0f} |")
    lines += ["", "| numbers in a message | mean microseconds, 2 workers |", "|---|---|"]
    lines += [f"| {int(n):,} | {x:,.0f} |" for n, x in results["messages"].items()]
    lines += ["", "| computed: times as fast with | 8 | 64 | 512 workers |", "|---|---|---|---|"]
    message = results["messages"][str(MESSAGES[1])] / 1e6
    for name, its in results["rows"].items():
        alone = statistics.median(x["seconds"] for x in its["1"])
        gains = [n * alone / (alone + its["2"][0]["messages"] * message * math.log2(n)) for n in (8, 64, 512)]
        lines.append(f"| {name} | " + " | ".join(f"{x:.1f}" for x in gains) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure all rows, alternately, and write data and table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="measure the rows with this in their names, and keep the others")
    arguments = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    file = FOLDER / "results.json"
    results = json.loads(file.read_text()) if arguments.only else {"rows": {}}
    results["messages"] = started(2, "--messages")
    for name in ROWS:
        if arguments.only not in name:
            continue
        its: dict[str, Any] = {"1": [], "2": []}
        for _ in range(arguments.repeats):
            for n in (1, 2):
                its[str(n)].append(started(n, "--measure", name))
        print(name, *(round(statistics.median(x["speed"] for x in its[n])) for n in "12"), flush=True)
        results["rows"][name] = its
        file.write_text(json.dumps(results, indent=1) + "\n")
    (FOLDER / "table.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    if "--measure" in sys.argv:
        measure(sys.argv[-1])
    elif "--messages" in sys.argv:
        time_messages()
    else:
        main()
