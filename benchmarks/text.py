"""Tune small language models by all three algorithms and GRPO, and time decoding; writes benchmarks/text/.

    python benchmarks/text.py                    # twelve pairs of task and algorithm, three seeds, and the timings
    python benchmarks/text.py --only sentiment   # the pairs whose name contains a word
    python benchmarks/text.py --timings          # only the timings
    python benchmarks/text.py --smoke            # a few steps of everything, into benchmarks/text/smoke
    python benchmarks/text.py --report           # table and figure again from the data

Every run starts from the same kind of supervised model (made from the run's seed) and is judged on all held-out
prompts (of translation on 400), with answers drawn as in training, by the task's metric; that is the reward only in
sentiment. Finished runs are kept, so an interrupted benchmark goes on where it was. The settings are those of
``python -m sb3_pg.text.demo``, and for GRPO those of docs/text.md. Against the loss of diversity, which is largest in
sentiment, a few settings are compared there by GRPO.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from processes import highest_memory, in_a_process, machine, with_one_thread

if __name__ == "__main__":
    with_one_thread()

import numpy as np
import torch as th
import transformers
from stable_baselines3.common.logger import Logger

from sb3_pg import PPO
from sb3_pg.common.engines.protocol import Seen
from sb3_pg.text import TextVecEnv
from sb3_pg.text.demo import ALGORITHMS, N_ENVS, PRETRAIN_STEPS, TIMESTEPS
from sb3_pg.text.demo import make_model as make_demo_model
from sb3_pg.text.evaluation import evaluate_texts, table
from sb3_pg.text.metrics import self_bleu
from sb3_pg.text.policies import SMALL_CAUSAL
from sb3_pg.text.spaces import text_space
from sb3_pg.text.supervised import pretrain
from sb3_pg.text.tasks import TASKS

OUT = Path(__file__).parent / "text"
SEEDS = (0, 1, 2)
EVALUATIONS = 8  # during a run, and one before it


#: GRPO as docs/text.md states it: PPO that compares four responses to the same prompt.
GRPO: dict[str, Any] = {
    "n_episodes": 64,
    "batch_size": 512,
    "n_epochs": 2,
    "learning_rate": 3e-4,
    "max_grad_norm": 1.0,
    "gamma": 1.0,
    "baseline": "group",
    "normalize_advantage": False,
    "loss_average": "sequence",
}
GRPO_KWARGS = {"reference_kl_in": "loss", "reference_kl_coef": 0.04}
NAMES = (*ALGORITHMS, "grpo")
TOKENS = {**TIMESTEPS, "grpo": 40_000}

#: What may keep responses varied, by GRPO on sentiment: settings and arguments of the policy.
DIVERSITY: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "as above": ({}, {}),
    "KL weight 0.16": ({}, {"reference_kl_coef": 0.16}),
    "KL weight 0.64": ({}, {"reference_kl_coef": 0.64}),
    "entropy bonus 0.02": ({"ent_coef": 0.02}, {}),
    "temperature 1.5": ({}, {"temperature": 1.5}),
}
DIVERSITY_TOKENS = 20_000


def make_model(algo: str, task: Any, folder: Path, seed: int, settings: Any = None, kwargs: Any = None) -> Any:
    """Return an algorithm of the demonstration, or GRPO, which may have other settings."""
    if algo != "grpo":
        return make_demo_model(algo, task, folder, seed)
    env = TextVecEnv(task, N_ENVS, completions_per_prompt=4, seed=seed)
    policy_kwargs = {"model": str(folder), **GRPO_KWARGS, **(kwargs or {})}
    settings = {**GRPO, **(settings or {})}
    return PPO("CausalLMPolicy", env, seed=seed, device="cpu", policy_kwargs=policy_kwargs, **settings)


def metric_of(task: str) -> str:
    """The metric's name in the figures; sentiment is the score itself."""
    return {"sentiment": "score"}.get(TASKS[task].metric, TASKS[task].metric)


# --------------------------------------------------------------------- learning


def evaluate(model: Any, task: Any) -> tuple[dict[str, float], list[dict[str, Any]]]:
    th.manual_seed(0)
    names = ["distinct_2"] if task.references is None else ["exact_match", "bleu", "chrf", "token_f1", "distinct_2"]
    times = 1 if len(task.prompts) > 200 else 8
    return evaluate_texts(model.policy, task, 400, names, num_return_sequences=times)


def varied(records: list[dict[str, Any]]) -> dict[str, float]:
    """Self-BLEU among a hundred texts, as many to each prompt as were drawn."""
    return {"self_bleu": self_bleu([record["completion"] for record in records[:100]])}


def run(task: str, algo: str, seed: int, folder: Path, timesteps: int) -> dict[str, Any]:
    """One run: the learning curve, and texts before and after."""
    train, held_out = TASKS[task].make("train"), TASKS[task].make("test")
    model = make_model(algo, train, folder, seed)
    model.set_logger(Logger(None, []))
    figures, records = evaluate(model, held_out)
    curve, before = [{"timesteps": 0, **figures, **varied(records)}], records[:8]
    for step in range(EVALUATIONS):
        goal = timesteps * (step + 1) // EVALUATIONS
        model.learn(max(goal - model.num_timesteps, 0), reset_num_timesteps=step == 0)
        figures, records = evaluate(model, held_out)
        logged = {k.split("/")[1]: v for k, v in model.logger.name_to_value.items() if k.startswith("text/")}
        kept = {name: logged[name] for name in ("kl", "reference_perplexity", "ended", "response_length")}
        curve.append({"timesteps": model.num_timesteps, **figures, **kept})
    curve[-1] |= varied(records)
    return {"curve": curve, "before": before, "after": records[:8]}


def run_diversity(name: str, seed: int, folder: Path, timesteps: int) -> dict[str, float]:
    """Sentiment by GRPO with other settings: figures on held-out prompts after it."""
    train, held_out = TASKS["sentiment"].make("train"), TASKS["sentiment"].make("test")
    model = make_model("grpo", train, folder, seed, *DIVERSITY[name])
    model.set_logger(Logger(None, []))
    model.learn(timesteps)
    model.policy.temperature = 1.0  # judged alike
    figures, records = evaluate(model, held_out)
    return {**figures, **varied(records), "kl": model.logger.name_to_value["text/kl"]}


# ---------------------------------------------------------------------- timings


def cpu_seconds(function: Callable[[], Any], repeats: int) -> float:
    """Median of several calls, on one thread, whatever else the machine does."""
    function()
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        taken.append(time.process_time() - start)
    return statistics.median(taken)


def decoding(repeats: int) -> list[dict[str, Any]]:
    """Tokens per second of acting and of the model's own ``generate``, at the same batch and lengths."""
    task = TASKS["sentiment"].make("train")
    found = []
    shapes = {"small": None, "medium": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6}}
    task.response_length = 32
    width = task.width + 32
    task.observation_space = text_space(task.width, 32, len(task.tokenizer))
    for name, change in shapes.items():
        config = {**SMALL_CAUSAL, **(change or {}), "vocab_size": len(task.tokenizer), "bos_token_id": None}
        config |= {"eos_token_id": task.end_token, "max_position_embeddings": width}
        for n in (1, 16, 64):
            env = TextVecEnv(task, n, seed=0)
            kwargs = {"model": config, "reference_kl_coef": None}
            model = PPO("CausalLMPolicy", env, n_steps=32, batch_size=32 * n, device="cpu", policy_kwargs=kwargs)
            policy, rows = model.policy, env.reset()

            def act(model: Any = model, rows: Any = rows, width: int = task.width) -> None:
                seen = rows.copy()
                model.network.refresh()
                for step in range(32):
                    tokens = model.network.act(Seen(seen)).actions
                    seen[:, width + step] = np.where(tokens == 1, 3, 4)

            def generate(policy: Any = policy, rows: Any = rows) -> None:
                policy.generate(rows, do_sample=True, min_new_tokens=32)

            ours, theirs = cpu_seconds(act, repeats), cpu_seconds(generate, repeats)
            row = {"model": name, "batch": n, "acting": 32 * n / ours, "generate": 32 * n / theirs}
            found.append(row)
            print(f"decoding {name} x{n}: {row['acting']:.0f} and {row['generate']:.0f} tokens/s", flush=True)
    return found


def update_cost(algo: str, folder: Path) -> dict[str, float]:
    """Sequences that an update reads and pushes gradients through, and the memory of a process that does it."""
    th.set_num_threads(1)
    model: Any = make_model(algo, TASKS["translation"].make("train"), folder, 0)
    model.set_logger(Logger(None, []))
    loaded = highest_memory()
    _, callback = model._setup_learn(10**6)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    batch = model.network.batch(model.rollout, model.horizon.keep(model.rollout))
    sequences = len(np.unique(batch.sequences))
    forward, backward, original = [], [], model.policy.read_sequences

    def counted(lm: Any, rows: np.ndarray) -> th.Tensor:
        states = original(lm, rows)
        forward.append(len(rows))
        if states.requires_grad:
            states.register_hook(lambda _: backward.append(len(rows)))
        return states

    model.policy.read_sequences = counted
    model.train()
    found = {"sequences": sequences, "forward": sum(forward), "backward": sum(backward)}
    return {**found, "epochs": getattr(model, "n_epochs", 1), "loaded_mb": loaded, "peak_mb": highest_memory()}


# ----------------------------------------------------------------------- report


def over(values: list[float | None]) -> str:
    """Return the mean over seeds, and each of them; a dash where it has not been measured."""
    if None in values:
        return "-"
    return f"{statistics.mean(values):.3g} ({', '.join(f'{v:.3g}' for v in values)})"  # type: ignore[type-var]


def report_diversity(data: dict[str, Any]) -> list[str]:
    found = data.get("diversity", {})
    if not found:
        return []
    lines = ["", "## Against the loss of diversity", ""]
    lines += [f"Sentiment by GRPO after {DIVERSITY_TOKENS:,} tokens, drawn at temperature 1.", ""]
    lines += ["| setting | score | KL | distinct-2 | self-BLEU |", "|---|---|---|---|---|"]
    start = [run["curve"][0] for name, run in data["runs"].items() if name.startswith("sentiment grpo ")]
    rows = {"before tuning": start} | {
        name: [found[f"{name} {seed}"] for seed in SEEDS if f"{name} {seed}" in found] for name in DIVERSITY
    }
    for name, runs in rows.items():
        if runs:
            cells = [over([r.get(key) for r in runs]) for key in ("score", "kl", "distinct_2", "self_bleu")]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def report(data: dict[str, Any], out: Path) -> None:
    lines = ["# Small language models, tuned", "", data["machine"], ""]
    lines += ["Mean over seeds (each of them) on held-out prompts; KL of the last rollout in nats per response.", ""]
    lines += ["Diversity: distinct-2, higher is more varied, and self-BLEU of 100 texts, lower is; - is not measured."]
    lines += ["Tokens written: " + ", ".join(f"{name} {TOKENS[name]:,}" for name in NAMES) + ".", ""]
    lines += [
        "| task | algorithm | metric | before | after | KL | distinct-2 before | after | self-BLEU before | after |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|---|"]
    for task in TASKS:
        for algo in NAMES:
            runs = [data["runs"][f"{task} {algo} {s}"] for s in SEEDS if f"{task} {algo} {s}" in data["runs"]]
            if not runs:
                continue
            places = [(metric_of(task), 0), (metric_of(task), -1), ("kl", -1)]
            places += [(name, place) for name in ("distinct_2", "self_bleu") for place in (0, -1)]
            cells = [over([r["curve"][place].get(key) for r in runs]) for key, place in places]
            lines.append(f"| {task} | {algo} | {TASKS[task].metric} | " + " | ".join(cells) + " |")
    lines += report_diversity(data)
    if "updates" in data:
        lines += ["", "## Decoding", "", "Tokens per second of CPU time, sampling 32 tokens to each prompt.", ""]
        lines += ["| model | batch | acting | model.generate() | ratio |", "|---|---|---|---|---|"]
        lines += [
            f"| {r['model']} | {r['batch']} | {r['acting']:.0f} | {r['generate']:.0f} "
            f"| {r['acting'] / r['generate']:.2f} |"
            for r in data["decoding"]
        ]
        lines += [
            "",
            "## An update",
            "",
            "The first on translation, counted in sequences; memory of the process in MB.",
        ]
        lines += ["Equal responses are read once. TRPO reads again for its solve, line search and critic.", ""]
        lines += ["| algorithm | sequences | epochs | forward | backward | memory before acting | peak |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for algo, cost in data["updates"].items():
            names = ("sequences", "epochs", "forward", "backward", "loaded_mb", "peak_mb")
            lines.append(f"| {algo} | " + " | ".join(f"{cost[name]:.0f}" for name in names) + " |")
    for name, result in data["runs"].items():
        if name.endswith(" 0"):
            lines += ["", f"## {name[:-2]}, seed 0", "", "Before:", "", table(result["before"][:4])]
            lines += ["", "After:", "", table(result["after"][:4])]
    (out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw(data, out)


def draw(data: dict[str, Any], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(TASKS), figsize=(11, 3.4), layout="constrained")
    colors = {"reinforce": "#4477aa", "trpo": "#228833", "ppo": "#cc6677", "grpo": "#aa8800"}
    for axis, task in zip(axes, TASKS, strict=True):
        for algo, color in colors.items():
            runs = [r["curve"] for name, r in data["runs"].items() if name.startswith(f"{task} {algo} ")]
            for number, curve in enumerate(runs):
                x = [point["timesteps"] / 1000 for point in curve]
                y = [point[metric_of(task)] for point in curve]
                axis.plot(x, y, color=color, lw=0.9, label=algo.upper() if number == 0 else None)
        axis.set(
            title=task.replace("_", " "),
            xlabel="thousand tokens written",
            ylabel=TASKS[task].metric.replace("_", " "),
        )
        axis.grid(alpha=0.3)
    if data["runs"]:
        axes[0].legend(fontsize=8)
    figure.suptitle("Score on prompts that were held out; a line for each of three seeds", fontsize=11)
    figure.savefig(out / "learning.png", dpi=150)
    plt.close(figure)


def record(path: Path, only_report: bool) -> dict[str, Any]:
    """What has been measured so far, with the machine of today if there will be more."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = json.loads(path.read_text()) if path.exists() else {"runs": {}}
    return data if only_report else {**data, "machine": machine("transformers")}


def setup(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the command line, and leave one thread and no bars of progress."""
    parser.add_argument("--report", action="store_true", help="only write the report again")
    transformers.utils.logging.disable_progress_bar()
    th.set_num_threads(1)
    return parser.parse_args()


def missing_runs(
    data: dict[str, Any], path: Path, wanted: Mapping[str, Callable[[], Any]], args: argparse.Namespace
) -> Iterator[tuple[str, Any]]:
    """Do the runs that are wanted and not there; yield each when it is in the data and in their file.

    :param wanted: what does each, by name
    """
    for name, run in wanted.items():
        if not args.report and name not in data["runs"] and args.only in name:
            data["runs"][name] = found = run()
            path.write_text(json.dumps(data, indent=1))
            yield name, found


def command_line(
    doc: str | None,
    file: str,
    wanted: Mapping[str, Callable[[], Any]],
    report: Callable[[dict[str, Any]], None],
    only: str,
    line: Callable[[str, Any], str] = lambda name, _: name,
) -> None:
    """Read the command line of a benchmark, do the runs that are not in its file, and write its report.

    :param only: what names of runs are like, for the help of ``--only``
    :param line: printed after each run, from its name and what it found
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=only)
    args, path = setup(parser), OUT / file
    data = record(path, args.report)
    for name, found in missing_runs(data, path, wanted, args):
        print(line(name, found), flush=True)
    report(data)


def before_and_after(runs: Mapping[str, Any]) -> list[str]:
    """Return the texts of runs as lines of a report."""
    lines = []
    for name, found in runs.items():
        for when in ("before", "after"):
            lines += ["", f"## {name}, {when}", "", table(found[when]["texts"])]
    return lines


def started(models: Path, task: str, seed: int, smoke: bool) -> Path:
    """Return the folder of a supervised model, which is made if it is not there."""
    folder = models / f"{task}-{seed}"
    if not (folder / "config.json").exists():
        steps = 5 if smoke else PRETRAIN_STEPS[task]
        pretrain(TASKS[task].make("train"), folder, n_steps=steps, seed=seed)
    return folder


def run_all(data: dict[str, Any], path: Path, models: Path, args: argparse.Namespace) -> None:
    """Make the runs that are wanted and not there yet."""
    kept, diversity = data["runs"], data.setdefault("diversity", {})
    for seed in SEEDS[:1] if args.smoke else () if args.timings else SEEDS:
        for name, task, algo in [(f"{task} {algo} {seed}", task, algo) for task in TASKS for algo in NAMES]:
            if name not in kept and args.only in name:
                folder = started(models, task, seed, args.smoke)
                kept[name] = result = run(task, algo, seed, folder, 4000 if args.smoke else TOKENS[algo])
                first, last = (result["curve"][i][metric_of(task)] for i in (0, -1))
                print(f"{name}: {metric_of(task)} {first:.3g} -> {last:.3g}", flush=True)
                path.write_text(json.dumps(data, indent=1))
        for setting in DIVERSITY:
            name = f"{setting} {seed}"
            if name not in diversity and args.only in f"diversity {name}":
                folder = started(models, "sentiment", seed, args.smoke)
                tokens = 2000 if args.smoke else DIVERSITY_TOKENS
                diversity[name] = run_diversity(setting, seed, folder, tokens)
                print(f"diversity {name}: {diversity[name]}", flush=True)
                path.write_text(json.dumps(data, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", default="", help="'diversity', and pairs such as 'translation ppo', whose name contains this"
    )
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything")
    parser.add_argument("--timings", action="store_true", help="only time decoding and count what an update does")
    args = setup(parser)
    out = OUT / "smoke" if args.smoke else OUT
    path = out / "results.json"
    data = record(path, args.report)
    if not args.report:
        models = Path("runs") / ("text-smoke" if args.smoke else "text-benchmark")
        run_all(data, path, models, args)
        if "decoding" not in data and not args.only:
            data["decoding"] = decoding(1 if args.smoke else 9)
            path.write_text(json.dumps(data, indent=1))
        if "updates" not in data and not args.only:
            data["updates"] = {a: in_a_process(update_cost, a, models / "translation-0") for a in ALGORITHMS}
            path.write_text(json.dumps(data, indent=1))
    report(data, out)


if __name__ == "__main__":
    main()
