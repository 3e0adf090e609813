"""What becomes of archives when saving is interrupted, and what loading makes of files that are not what was saved.

    python benchmarks/archives.py                  # everything, SB3 beside ours; a few minutes
    python benchmarks/archives.py --kills 20 --flips 20 --folder /tmp/archives

Saves and loads run in processes of their own (forked, so Unix only). **Kills**: a process saves over a good archive
and is killed at a random moment; lost is what then loads neither as it was nor as it was to become. **Mutations**: an
archive or a file of VecNormalize is damaged or made to harm, and loaded by the library that wrote it: many by one
process, and by one of its own what harms that process. Where a mutation changes what an entry says on purpose, its
checksum in our archive is made anew, as who wants to harm would do.
"""

import argparse
import base64
import functools
import io
import itertools
import json
import operator
import os
import pickle
import random
import resource
import signal
import tempfile
import threading
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from processes import with_one_thread

if __name__ == "__main__":
    with_one_thread()

import cloudpickle
import numpy as np
import sb3_contrib
import stable_baselines3
import torch as th
from gymnasium import spaces
from stable_baselines3.common import vec_env as sb3_vec_env
from stable_baselines3.common.env_util import make_vec_env

import sb3_pg
from sb3_pg.common import vec_env as our_vec_env
from sb3_pg.common.archive.container import SEAL, checksum

HERE = Path(__file__).parent / "archives"

#: Memory that a load may take beyond what the process has, in bytes: many times what the archives need.
MEMORY = 400 << 20

#: Bytes that a small file unpacks to.
BOMB = 300 << 20

SIDES = {"ours": (sb3_pg.PPO, our_vec_env.VecNormalize), "SB3": (stable_baselines3.PPO, sb3_vec_env.VecNormalize)}

OBSERVATIONS = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)


# ----------------------------------------------------------------------------------------------------- processes


def in_a_process(work: Callable[[], Any], kill_after: float | None = None, memory: int | None = None) -> Any:
    """Return what ``work`` returns in a forked process; None if it was killed or died.

    :param kill_after: seconds after its start
    :param memory: bytes that it may take beyond what it has
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reader)
            if memory is not None:
                now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (now + memory, now + memory))
            os.write(writer, b" ")  # ready
            result = work()
            with os.fdopen(writer, "wb") as file:
                file.write(json.dumps(result).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        file.read(1)
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(child, signal.SIGKILL)
        answer = file.read()
    os.waitpid(child, 0)
    return json.loads(answer) if answer else None


# --------------------------------------------------------------------------------------------------- what is saved


class Kept(NamedTuple):
    """Something to be saved, and what tells one from another after loading."""

    save: Callable[[Path], None]
    load: Callable[[Path], Any]
    same: Callable[[Any], str]


def environment() -> Any:
    return make_vec_env("Pendulum-v1", 2, seed=0)


def model_of(side: str, seed: int) -> Any:
    env = SIDES[side][1](environment())
    model = SIDES[side][0]("MlpPolicy", env, n_steps=64, batch_size=64, n_epochs=2, seed=seed, device="cpu")
    return model.learn(256)


def fingerprint(model: Any) -> str:
    """Everything about a model that must be as it was, as a checksum."""
    optimizer = model.policy.optimizer.state_dict()
    arrays = [np.asarray(x) for its in optimizer["state"].values() for x in its.values()]
    arrays.append(th.nn.utils.parameters_to_vector(model.policy.parameters()).numpy(force=True))
    numbers = [model.gamma, model.gae_lambda, model.n_steps, model.batch_size, model.num_timesteps, model.n_epochs]
    numbers += [model.learning_rate, model._n_updates, optimizer["param_groups"][0]["lr"]]
    clip = model.clip_range(1.0) if callable(model.clip_range) else model.clip_range
    actions = model.predict(OBSERVATIONS, deterministic=True)[0]
    spaces_ = [model.observation_space.low.tolist(), model.action_space.high.tolist()]
    sizes = [(str(x.dtype), x.shape) for x in arrays]
    text = repr((sizes, numbers, float(clip), actions.tolist(), spaces_))
    return checksum(b"".join([text.encode(), *(x.tobytes() for x in arrays)]))


def statistics_fingerprint(env: Any) -> str:
    """Everything about a VecNormalize that must be as it was, as a checksum."""
    statistics = [np.asarray(x).tolist() for rms in (env.obs_rms, env.ret_rms) for x in (rms.mean, rms.var, rms.count)]
    settings = [env.clip_obs, env.clip_reward, env.gamma, env.epsilon, env.norm_obs, env.norm_reward, env.training]
    return checksum(repr((statistics, settings, env.normalize_obs(OBSERVATIONS).tolist())).encode())


def kept(side: str, what: str, model: Any) -> Kept:
    """The model, or its VecNormalize, with how it is saved and loaded."""
    if what == "model":
        load: Callable[[Path], Any] = functools.partial(SIDES[side][0].load, device="cpu")
        return Kept(model.save, load, fingerprint)
    statistics = model.get_vec_normalize_env()
    return Kept(
        lambda path: statistics.save(str(path)),
        lambda path: SIDES[side][1].load(str(path), environment()),
        statistics_fingerprint,
    )


# ----------------------------------------------------------------------------------------------------------- kills


def kills(side: str, what: str, n: int, folder: Path, seed: int = 0) -> dict[str, int]:
    """Kill ``n`` processes while they save over a good file; count what is then there."""
    old, new = (kept(side, what, model_of(side, number)) for number in (1, 2))
    path, rng, found = folder / f"{what}.zip", random.Random(seed), Counter[str]()
    old.save(path)
    before, good = path.read_bytes(), old.same(old.load(path))

    def seconds() -> float:
        start = time.perf_counter()
        new.save(path)
        return time.perf_counter() - start

    duration = sorted(in_a_process(seconds) for _ in range(9))[4]
    becomes = new.same(new.load(path))
    assert good != becomes

    @functools.cache  # the same file loads as the same
    def loaded(file: bytes) -> str:
        try:
            now = old.same(old.load(path))
        except Exception:
            now = "lost"
        return {good: "as before", becomes: "saved"}.get(now, "lost")

    for _ in range(n):
        path.write_bytes(before)
        in_a_process(lambda: new.save(path), kill_after=rng.uniform(0, duration))
        found[loaded(path.read_bytes())] += 1
    return dict(found)


def attempt(save: Callable[[Path], None], path: Path) -> str:
    """The error of saving, in one line."""
    try:
        save(path)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def faults(side: str, what: str, folder: Path, n: int = 10) -> dict[str, dict[str, Any]]:
    """Let saving fail over a good file; whether it is as before, and whether the error names it, or the attribute."""
    folder = folder / f"faults {side} {what}"
    folder.mkdir()
    model = model_of(side, 1)
    its, path = kept(side, what, model), folder / "good.zip"
    its.save(path)
    before, found = path.read_bytes(), {}

    def outcome(name: str, errors: list[str | None], wanted: str) -> None:
        whole = path.read_bytes() == before and [file.name for file in folder.iterdir()] == ["good.zip"]
        found[name] = {
            "tries": len(errors),
            "as before": whole,
            "named": all(error and wanted in error for error in errors),
        }
        path.write_bytes(before)

    def on_a_full_disk(bytes_left: int) -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, bytes_left))
        return attempt(its.save, path)

    limits = [int(len(before) * i / n) for i in range(n)]
    outcome("full disk", [in_a_process(functools.partial(on_a_full_disk, limit)) for limit in limits], "good.zip")

    def without_rights() -> str:
        if os.geteuid() == 0:
            os.setuid(65534)
        return attempt(its.save, path)

    path.chmod(0o644)
    folder.chmod(0o555)
    outcome("read-only folder", [in_a_process(without_rights)], "good.zip")
    folder.chmod(0o755)

    owner = model if what == "model" else model.get_vec_normalize_env()
    owner.cannot_be_pickled = threading.Lock()
    outcome("attribute that cannot be pickled", [attempt(its.save, path)], "cannot_be_pickled")
    return found


# ------------------------------------------------------------------------------------------------------- mutations


class Mutation(NamedTuple):
    """A damaged file, or one made to harm."""

    kind: str
    what: str
    file: bytes


def entries_of(archive: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        return {name: file.read(name) for name in file.namelist()}


def zipped(entries: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, entry in entries.items():
            archive.writestr(name, entry)
    return file.getvalue()


def changed(archive: bytes, changes: dict[str, bytes | None], sealed: bool = True) -> bytes:
    """The archive with other entries (None: without one), and with the right checksums if it has any."""
    entries: dict[str, Any] = {**entries_of(archive), **changes}
    entries = {name: entry for name, entry in entries.items() if entry is not None}
    if sealed and SEAL in entries:
        seal = json.loads(entries.pop(SEAL))
        seal["sha256"] = {name: checksum(entry) for name, entry in entries.items()}
        entries[SEAL] = json.dumps(seal).encode()
    return zipped(entries)


def with_data(archive: bytes, changes: dict[str, Any]) -> bytes:
    """The archive with other attributes: as JSON, or pickled if they are bytes."""
    data = json.loads(entries_of(archive)["data"])
    for name, value in changes.items():
        serialized = (
            {":type:": "x", ":serialized:": base64.b64encode(value).decode()} if type(value) is bytes else value
        )
        data[name] = serialized
    return changed(archive, {"data": json.dumps(data).encode()})


def with_tensors(archive: bytes, name: str, change: Callable[[Any], Any]) -> bytes:
    """The archive with what a function makes of one of its states."""
    state = th.load(io.BytesIO(entries_of(archive)[name]), weights_only=True)
    file = io.BytesIO()
    th.save(change(state) or state, file)
    return changed(archive, {name: file.getvalue()})


class Calls:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call

    def __call__(self) -> None:
        """So that what it returns when it is unpickled can be called there."""


def harm(mark: Path) -> dict[str, Any]:
    """Objects that make the folder ``mark`` when they are loaded by Python's own machine."""
    make = f"__import__('os').mkdir({str(mark)!r})"
    hidden = mark.with_name("hidden.npy")
    hidden.write_bytes(pickle.dumps(Calls(os.mkdir, str(mark))))
    tensors = io.BytesIO()
    th.save({"x": Calls(os.mkdir, str(mark))}, tensors)

    def schedule(progress: float) -> float:
        Path(mark).mkdir(exist_ok=True)
        return 1e-3

    return {
        "os.mkdir": Calls(os.mkdir, str(mark)),
        "eval": Calls(eval, make),
        "exec": Calls(exec, make),
        "partial": Calls(functools.partial(os.mkdir, str(mark))),
        "methodcaller": Calls(operator.methodcaller("mkdir"), mark),
        "getattr": Calls(Calls(getattr, mark, "mkdir")),
        "numpy.load": Calls(np.load, str(hidden), None, True),
        "torch": Calls(th.storage._load_from_bytes, tensors.getvalue()),
        "in a list": [1, {"x": (Calls(os.mkdir, str(mark)),)}],
        "in an array": np.array([Calls(os.mkdir, str(mark))], dtype=object),
        "a schedule": schedule,
    }


def payloads(mark: Path) -> dict[str, bytes]:
    """The same as pickles, and one that names a function within a module that is known."""
    found = {name: cloudpickle.dumps(x) for name, x in harm(mark).items()}
    module, name, argument = b"stable_baselines3.common.save_util", b"os.mkdir", str(mark).encode()
    texts = [b"\x8c" + bytes([len(x)]) + x for x in (module, name, argument)]
    found["a dotted name"] = b"\x80\x04" + texts[0] + texts[1] + b"\x93" + texts[2] + b"\x85R."
    return found


def pickle_bombs() -> dict[str, bytes]:
    """Short pickles of what is long."""
    laughs = b"\x80\x04]" + b"".join(b"\x94](" + bytes([104, i]) * 10 + b"e" for i in range(12)) + b"."
    shape = Calls(np.ndarray, (1 << 31,))
    return {
        "bytearray": pickle.dumps(Calls(bytearray, 1 << 31)),
        "bytes": pickle.dumps(Calls(bytes, 1 << 31)),
        "array": pickle.dumps(shape),
        "zeros": pickle.dumps(Calls(np.zeros, 1 << 31, np.int8)),
        "memo": b"\x80\x02Nr\x00\x00\x00\x08.",
        "laughs": laughs,
        "deep": b"\x80\x04" + b"]\x94" * 100_000 + b"a" * 99_999 + b".",
        "long number": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    }


def flips(file: bytes, n: int, rng: random.Random) -> Iterator[Mutation]:
    for _ in range(n):
        at, bit = rng.randrange(len(file)), rng.randrange(8)
        yield Mutation(
            "bit flipped", f"bit {bit} of byte {at}", file[:at] + bytes([file[at] ^ 1 << bit]) + file[at + 1 :]
        )
    for _ in range(n // 3):
        at = rng.randrange(len(file))
        yield Mutation("cut short", f"after {at} bytes", file[:at])
    for _ in range(n // 5):
        at, length = rng.randrange(len(file)), rng.randrange(1, 400)
        noise = rng.randbytes(length) if rng.random() < 0.5 else bytes(length)
        yield Mutation("overwritten", f"{length} bytes at {at}", (file[:at] + noise + file[at + length :])[: len(file)])


def damaged_entries(archive: bytes, other: bytes) -> Iterator[Mutation]:
    theirs = entries_of(other)
    for name, entry in entries_of(archive).items():
        yield Mutation("entry of another archive", name, changed(archive, {name: theirs[name]}, sealed=False))
        yield Mutation("entry missing", name, changed(archive, {name: None}, sealed=False))
        yield Mutation("entry empty", name, changed(archive, {name: b""}, sealed=False))
        yield Mutation("entry cut short", name, changed(archive, {name: entry[: len(entry) // 2]}, sealed=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("policy.pth", "data"):
            twice = io.BytesIO(archive)
            with zipfile.ZipFile(twice, "a") as file:
                file.writestr(name, theirs[name])
            yield Mutation("entry twice", name, twice.getvalue())
    for name in ("../../evil.pth", "/evil.pth", "..\\evil.pth", "C:\\evil.pth", "a/../../data"):
        yield Mutation("path name", name, changed(archive, {name: theirs["policy.pth"]}))
    for name in ("evil.pth", "predict.pth", "policy.__dict__.pth", "env.pth"):
        yield Mutation("unknown state", name, changed(archive, {name: theirs["policy.pth"]}))


def harmful(archive: bytes, mark: Path) -> Iterator[Mutation]:
    data, choice = json.loads(entries_of(archive)["data"]), itertools.cycle(payloads(mark).items())
    for name in data:
        how, payload = next(choice)
        yield Mutation("code in an attribute", f"{name}: {how}", with_data(archive, {name: payload}))
    for how, payload in payloads(mark).items():
        for name in ("observation_space", "policy_class", "learning_rate"):
            yield Mutation("code in an attribute", f"{name}: {how}", with_data(archive, {name: payload}))
        for name in ("policy.pth", "policy.optimizer.pth", "pytorch_variables.pth"):
            record = zipped({"archive/data.pkl": payload, "archive/version": b"3\n", "archive/byteorder": b"little"})
            yield Mutation("code in a state", f"{name}: {how}", changed(archive, {name: record}))
        if SEAL in entries_of(archive):
            yield Mutation("code in a state", f"resume: {how}", changed(archive, {"resume": payload}))
    for name in ("predict", "save", "learn", "env", "policy", "_setup_model"):
        yield Mutation("attribute that is none", name, with_data(archive, {name: "CartPole-v1"}))
    model = {"model": "evil/model", "model_kwargs": {"trust_remote_code": True}, "action_space": 1}
    extractor = cloudpickle.dumps({"features_extractor_class": th.optim.Adam, "features_extractor_kwargs": model})
    yield Mutation("class in another's place", "features extractor", with_data(archive, {"policy_kwargs": extractor}))
    for name in ("policy_class", "rollout_buffer_class"):
        yield Mutation("class in another's place", name, with_data(archive, {name: cloudpickle.dumps(th.optim.Adam)}))


def bombs(archive: bytes) -> Iterator[Mutation]:
    many, size = b" " * BOMB, f"{BOMB >> 20} MB"
    for name in ("data", "policy.pth", "evil.pth", "system_info.txt"):
        unsealed = {key: entry for key, entry in entries_of(archive).items() if key != SEAL}
        packed = zipped({**unsealed, name: many}, zipfile.ZIP_DEFLATED)
        yield Mutation("bomb", f"{name} unpacks to {size} from {len(packed) >> 10} kB", packed)
    state = entries_of(entries_of(archive)["policy.pth"])
    number = next(name for name in state if "/data/" in name)
    inner = zipped({**state, number: many}, zipfile.ZIP_DEFLATED)
    yield Mutation("bomb", f"policy.pth packs {size}", changed(archive, {"policy.pth": inner}))
    for how, bomb in pickle_bombs().items():
        for name in ("policy_kwargs", "ep_info_buffer"):
            yield Mutation("bomb", f"{name}: {how}", with_data(archive, {name: bomb}))
        record = zipped({"archive/data.pkl": bomb, "archive/version": b"3\n", "archive/byteorder": b"little"})
        yield Mutation("bomb", f"policy.pth: {how}", changed(archive, {"policy.pth": record}))
    for width in (10**5, 10**7, 10**9, 10**12):
        yield Mutation("bomb", f"net_arch {width}", with_data(archive, {"policy_kwargs": {"net_arch": [width, width]}}))
        space = cloudpickle.dumps(spaces.Discrete(width))
        yield Mutation("bomb", f"{width} actions", with_data(archive, {"action_space": space}))
        yield Mutation("bomb", f"{width} observations", with_data(archive, {"observation_space": space}))
        yield Mutation("bomb", f"n_steps {width**2}", with_data(archive, {"n_steps": width**2}))
    yield Mutation("bomb", "JSON nested deeply", changed(archive, {"data": b"[" * 200_000 + b"]" * 200_000}))
    yield Mutation("bomb", "JSON with a long number", changed(archive, {"data": b'{"n_steps": ' + b"9" * 10**6 + b"}"}))


def bad_states(archive: bytes) -> Iterator[Mutation]:
    names = list(th.load(io.BytesIO(entries_of(archive)["policy.pth"]), weights_only=True))
    for name in names:
        for what, change in {
            "NaN": lambda x: x.fill_(float("nan")),
            "one infinite": lambda x: x.view(-1)[:1].fill_(float("inf")),
            "another shape": lambda x: x.reshape(-1)[:-1],
            "turned": lambda x: x[None],
        }.items():

            def alter(state: Any, name: str = name, change: Any = change, what: str = what) -> Any:
                made = change(state[name])
                return {**state, name: made} if "one" not in what else None

            yield Mutation("weights", f"{name}: {what}", with_tensors(archive, "policy.pth", alter))
        without = functools.partial(
            lambda state, left_out: {k: x for k, x in state.items() if k != left_out}, left_out=name
        )
        yield Mutation("weights", f"{name}: missing", with_tensors(archive, "policy.pth", without))
    for key in ("exp_avg", "exp_avg_sq"):
        for what, value in {"NaN": float("nan"), "shape": None}.items():

            def spoil(state: Any, key: str = key, value: Any = value) -> None:
                x = state["state"][3][key]
                state["state"][3][key] = x[:1] if value is None else x.fill_(value)

            yield Mutation("optimizer", f"{key}: {what}", with_tensors(archive, "policy.optimizer.pth", spoil))
    for what, change in {
        "lr NaN": lambda state: state["param_groups"][0].update(lr=float("nan")),
        "no groups": lambda state: state.pop("param_groups") and None,
        "too few parameters": lambda state: state["param_groups"][0].update(params=[0]),
        "a list": lambda state: [1, 2],
    }.items():
        yield Mutation("optimizer", what, with_tensors(archive, "policy.optimizer.pth", change))
    for name, value in itertools.product(
        ("n_steps", "batch_size", "gamma", "learning_rate", "n_epochs", "num_timesteps", "vf_coef", "_n_updates"),
        ("text", [1, 2], {"a": 1}),
    ):
        yield Mutation("attribute of another type", f"{name}={value!r}", with_data(archive, {name: value}))
    for name in ("observation_space", "action_space", "policy_class", "policy_kwargs", "n_steps", "gamma"):
        yield Mutation("attribute of another type", f"{name}=-3", with_data(archive, {name: -3}))


def other_archives() -> Iterator[Mutation]:
    kinds: list[tuple[Any, str, dict[str, Any]]] = [
        (stable_baselines3.A2C, "CartPole-v1", {}),
        (stable_baselines3.DQN, "CartPole-v1", {"buffer_size": 10}),
        (stable_baselines3.SAC, "Pendulum-v1", {"buffer_size": 10}),
        (stable_baselines3.TD3, "Pendulum-v1", {"buffer_size": 10}),
        (stable_baselines3.DDPG, "Pendulum-v1", {"buffer_size": 10}),
        (sb3_contrib.QRDQN, "CartPole-v1", {"buffer_size": 10}),
        (sb3_contrib.TQC, "Pendulum-v1", {"buffer_size": 10}),
        (sb3_contrib.CrossQ, "Pendulum-v1", {"buffer_size": 10}),
        (sb3_contrib.ARS, "CartPole-v1", {}),
        (sb3_contrib.TRPO, "CartPole-v1", {}),
        (sb3_pg.TRPO, "CartPole-v1", {}),
        (sb3_pg.REINFORCE, "CartPole-v1", {}),
    ]
    for kind, env, options in kinds:
        file = io.BytesIO()
        kind("LinearPolicy" if kind is sb3_contrib.ARS else "MlpPolicy", env, device="cpu", **options).save(file)
        yield Mutation("another algorithm", f"{kind.__module__.split('.')[0]} {kind.__name__}", file.getvalue())
    yield Mutation("no archive", "empty", b"")
    yield Mutation("no archive", "text", b"not an archive\n" * 100)
    yield Mutation("no archive", "a zip of text", zipped({"readme.txt": b"hello"}))


def archive_mutations(archive: bytes, other: bytes, n_flips: int, mark: Path) -> Iterator[Mutation]:
    """All that is done to an archive.

    :param other: another of the same shapes
    :param mark: the folder that code in it makes
    """
    yield from flips(archive, n_flips, random.Random(0))
    yield from damaged_entries(archive, other)
    yield from harmful(archive, mark)
    yield from bombs(archive)
    yield from bad_states(archive)
    yield from other_archives()
    if SEAL in entries_of(archive):
        seal = json.loads(entries_of(archive)[SEAL])
        later = json.dumps({**seal, "format": 99, "version": "9.0"}).encode()
        yield Mutation("later version", "format 99", changed(archive, {SEAL: later}, sealed=False))


def statistics_mutations(file: bytes, n_flips: int, mark: Path) -> Iterator[Mutation]:
    """All that is done to a file of VecNormalize."""
    yield from flips(file, n_flips, random.Random(1))
    for how, payload in (payloads(mark) | pickle_bombs()).items():
        yield Mutation("bomb" if how in pickle_bombs() else "code", how, payload)
    loaded = pickle.loads(file)

    def saved(**changes: Any) -> bytes:
        twin = sb3_vec_env.VecNormalize.__new__(sb3_vec_env.VecNormalize)
        twin.__dict__ = {**loaded.__dict__, "class_attributes": {}, "returns": 0, **changes}
        return cloudpickle.dumps(twin)

    for how, payload in harm(mark).items():
        yield Mutation("code", f"metadata: {how}", saved(metadata=payload))
    for statistic, (name, change) in itertools.product(
        ("obs_rms", "ret_rms"),
        {
            "NaN mean": lambda rms: rms.__dict__.update(mean=rms.mean * np.nan),
            "infinite variance": lambda rms: rms.__dict__.update(var=rms.var + np.inf),
            "negative variance": lambda rms: rms.__dict__.update(var=-1 - np.abs(rms.var)),
            "another shape": lambda rms: rms.__dict__.update(mean=np.zeros(7)),
            "no count": lambda rms: rms.__dict__.update(count=np.nan),
            "text": lambda rms: rms.__dict__.update(var="1.0"),
        }.items(),
    ):
        rms = pickle.loads(pickle.dumps(getattr(loaded, statistic)))
        change(rms)
        yield Mutation("statistics", f"{statistic}: {name}", saved(**{statistic: rms}))
    for name, value in {
        "clip_obs": -1.0,
        "gamma": np.nan,
        "epsilon": "x",
        "obs_rms": 3,
        "observation_space": 3,
    }.items():
        yield Mutation("statistics", f"{name}={value}", saved(**{name: value}))
    yield Mutation("no file of VecNormalize", "a list", pickle.dumps([1, 2, 3]))
    yield Mutation("no file of VecNormalize", "empty", b"")
    if b'"sha256"' in file:
        later = file.replace(b'"format": 1', b'"format": 99')
        yield Mutation("later version", "format 99", later)


class Good(NamedTuple):
    """A file as it was saved, and the fingerprint of what it loads as."""

    file: bytes
    same: str


def judged(its: Kept, good: Good, mutations: list[Mutation], path: Path, mark: Path) -> list[str]:
    """What becomes of files: refused, equal, wrong, raw (an error that is not one line with the file's name), ...

    One process loads them all, and then the good one. If it died, ran code, took too much memory or could not load
    the good one any more, each half of them is judged by itself.
    """

    def load(file: bytes) -> str:
        path.write_bytes(file)
        try:
            return "equal" if its.same(its.load(path)) == good.same else "wrong"
        except Exception as error:
            message = str(error)
            clear = "\n" not in message and path.name in message and isinstance(error, ValueError)
            if os.environ.get("SHOW"):
                traceback.print_exc()
            return "refused" if clear else f"raw: {type(error).__name__}"

    def load_all() -> tuple[list[str], float, bool]:
        warnings.simplefilter("ignore")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        outcomes = [load(mutation.file) for mutation in mutations]
        megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        return outcomes, megabytes, len(mutations) == 1 or load(good.file) == "equal"

    answer, ran = in_a_process(load_all, memory=MEMORY), mark.exists()
    if ran:
        mark.rmdir()
    outcomes, megabytes, is_whole = answer or ([], 0.0, False)
    if len(mutations) > 1:
        if is_whole and not ran and megabytes <= 100:
            return outcomes
        middle = len(mutations) // 2
        return [x for half in (mutations[:middle], mutations[middle:]) for x in judged(its, good, half, path, mark)]
    if ran:
        return ["code ran"]
    if answer is None:
        return ["died"]
    return [f"memory: {megabytes:.0f} MB"] if megabytes > 100 + 2 * len(mutations[0].file) / (1 << 20) else outcomes


def mutate(side: str, what: str, n_flips: int, folder: Path) -> list[tuple[str, str, str]]:
    """Mutate what a side has written, and let it load that; kind, what and outcome of each mutation."""
    its, other = (kept(side, what, model_of(side, seed)) for seed in (1, 2))
    path, mark = folder / f"mutated {side} {what}.zip", folder / "ran"
    other.save(path)
    of_other = path.read_bytes()
    its.save(path)
    good = Good(path.read_bytes(), its.same(its.load(path)))
    assert judged(its, good, [Mutation("", "", good.file)], path, mark) == ["equal"]
    mutations = (
        archive_mutations(good.file, of_other, n_flips, mark)
        if what == "model"
        else statistics_mutations(good.file, n_flips, mark)
    )
    found = []
    while some := list(itertools.islice(mutations, 32)):
        outcomes = judged(its, good, some, path, mark)
        found += [(m.kind, m.what, outcome) for m, outcome in zip(some, outcomes, strict=True)]
    return found


# ---------------------------------------------------------------------------------------------------------- report

OUTCOMES = {
    "refused": "one line with the file's name",
    "equal": "loads exactly as saved",
    "wrong": "loads silently wrong",
    "raw": "another error",
    "died": "the process died",
    "memory": "over 100 MB",
    "code": "code ran",
}


def table(heads: list[str], rows: list[list[Any]]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in [heads, ["---"] * len(heads), *rows]]
    return "\n".join(lines) + "\n"


def tables(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    of_kills, of_faults, of_mutations = results["kills"], results["faults"], results["mutations"]
    counts = {
        key: Counter((kind, outcome.split(":")[0].split(" ")[0]) for kind, _, outcome in its)
        for key, its in of_mutations.items()
    }
    text = (
        "# Archives: what is lost, and what is refused\n\nWritten by `python benchmarks/archives.py`; the data are in "
    )
    text += "results.json.\n\n## Killed while saving over a good file\n\n"
    rows = [
        [key, sum(its.values()), *(its.get(x, 0) for x in ("as before", "saved", "lost"))]
        for key, its in of_kills.items()
    ]
    text += table(["", "kills", "as before", "saved", "lost"], rows)
    text += "\n## Saving that fails over a good file\n\n"
    rows = [
        [key, name, its["tries"], "yes" if its["as before"] else "**no**", "yes" if its["named"] else "**no**"]
        for key, faults in of_faults.items()
        for name, its in faults.items()
    ]
    text += table(["", "fault", "tries", "file as before", "error names file or attribute"], rows)
    text += "\n## Files that are not what was saved\n\n"
    rows = []
    for key, its in counts.items():
        total = Counter(outcome for (_, outcome), n in its.items() for _ in range(n))
        rows.append([key, sum(total.values()), *(total.get(outcome, 0) for outcome in OUTCOMES)])
    text += table(["", "files", *OUTCOMES.values()], rows)
    for key, its in counts.items():
        text += f"\n### {key}, by kind\n\n"
        kinds = dict.fromkeys(kind for kind, *_ in of_mutations[key])
        rows = [[kind, *(its.get((kind, outcome), 0) for outcome in OUTCOMES)] for kind in kinds]
        text += table(["", *OUTCOMES.values()], rows)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="of each kind of file and side")
    parser.add_argument("--flips", type=int, default=300, help="bits flipped in each kind of file")
    parser.add_argument("--folder", type=Path, default=HERE, help="of the results")
    options = parser.parse_args()
    th.set_num_threads(1)
    warnings.simplefilter("ignore")
    results: dict[str, Any] = {"kills": {}, "faults": {}, "mutations": {}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        folder.chmod(0o755)
        for what, side in itertools.product(("model", "VecNormalize"), SIDES):
            key = f"{what}, {side}"
            results["kills"][key] = kills(side, what, options.kills, folder)
            results["faults"][key] = faults(side, what, folder)
            results["mutations"][key] = mutate(side, what, options.flips, folder)
            print(key, results["kills"][key], results["faults"][key], Counter(x for *_, x in results["mutations"][key]))
    options.folder.mkdir(exist_ok=True)
    lines = [f'"{key}": {json.dumps(value)}' for key, value in results.items()]
    (options.folder / "results.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    (options.folder / "table.md").write_text(tables(results))


if __name__ == "__main__":
    main()
