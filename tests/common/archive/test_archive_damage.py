"""Archives and statistics are not lost when saving is interrupted, and what is not as it was saved is refused.

The cases are those of benchmarks/archives.py, where there are more of them, and SB3 beside ours.
"""

import importlib
import io
import os
import stat
import tempfile
import threading
from pathlib import Path

import pytest
import stable_baselines3
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from tiny_models import ALL, tiny

from sb3_pg import PPO
from sb3_pg.common.archive.atomic import filling, replacing, written
from sb3_pg.common.archive.container import ArchiveError
from sb3_pg.common.errors import ArgumentError
from sb3_pg.common.vec_env import VecNormalize

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(Path(__file__).parents[3] / "benchmarks")
    archives = importlib.import_module("archives")


@pytest.fixture
def folder():
    """A folder that another user can look into."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.parametrize("what", ["model", "VecNormalize"])
def test_killed_while_saving(what, folder):
    found = archives.kills("ours", what, 40, folder)
    assert sum(found.values()) == 40 and "lost" not in found
    assert found["as before"] > 0


@pytest.mark.parametrize("what", ["model", "VecNormalize"])
def test_saving_that_fails(what, folder):
    found = archives.faults("ours", what, folder)
    assert len(found) == 3
    assert all(its["as before"] and its["named"] for its in found.values()), found


@pytest.mark.parametrize("what, least", [("model", 250), ("VecNormalize", 55)])
def test_files_that_are_not_what_was_saved(what, least, folder, monkeypatch):
    monkeypatch.setattr(archives, "BOMB", 120 << 20)
    found = archives.mutate("ours", what, 25, folder)
    assert len(found) > least
    assert [its for its in found if its[2] not in ("refused", "equal")] == []
    loaded = {kind for kind, _, outcome in found if outcome == "equal"}
    assert not loaded & {
        "code",
        "weights",
        "optimizer",
        "statistics",
        "path name",
        "another algorithm",
        "later version",
    }


# ---------------------------------------------------------------------------------------------- how files are written


def test_a_file_is_replaced_when_it_is_whole(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), replacing(path) as file:
        file.write(b"new")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert [x.name for x in tmp_path.iterdir()] == ["file"]


def test_permissions_and_links_stay(tmp_path):
    path, link, dangling = tmp_path / "file", tmp_path / "link", tmp_path / "dangling"
    before = os.umask(0o027)
    try:
        with replacing(path) as file:
            file.write(b"1")
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o604)
        link.symlink_to("file")
        dangling.symlink_to("made")
        for target in (link, dangling):
            with replacing(target) as file:
                file.write(b"2")
    finally:
        os.umask(before)
    assert link.is_symlink() and dangling.is_symlink()
    assert path.read_bytes() == (tmp_path / "made").read_bytes() == b"2"
    assert stat.S_IMODE(path.stat().st_mode) == 0o604


def test_what_is_no_plain_file_is_written_to():
    with replacing(os.devnull) as file:
        file.write(b"x")
    assert not Path(os.devnull).is_file()


def test_a_long_name(tmp_path):
    path = tmp_path / ("x" * 251 + ".zip")
    with replacing(path) as file:
        file.write(b"x")
    assert path.exists()


@pytest.mark.filterwarnings("ignore:Path")
def test_paths_are_sb3s(tmp_path):
    (tmp_path / "folder.zip").mkdir()
    model, theirs = tiny(PPO, "CartPole-v1"), stable_baselines3.PPO("MlpPolicy", "CartPole-v1", n_steps=64)
    for name in ("model", "model.v1", "new/x/model.zip", "folder", "folder.zip"):
        found = []
        for saves, its in ((model, tmp_path / "ours"), (theirs, tmp_path / "theirs")):
            for taken in ("folder", "folder.zip"):
                (its / taken).mkdir(exist_ok=True, parents=True)
            saves.save(its / name)
            found.append({str(x.relative_to(its)) for x in its.rglob("*")})
        assert found[0] == found[1]


def test_a_model_that_was_saved_beside_a_folder_of_that_name_is_found(tmp_path):
    (tmp_path / "model").mkdir()
    model = tiny(PPO, "CartPole-v1").learn(16)
    model.save(tmp_path / "model")
    assert PPO.load(tmp_path / "model").num_timesteps == 16
    assert PPO.load(str(tmp_path / "model")).num_timesteps == 16
    (tmp_path / "model.zip").unlink()
    with pytest.raises(ArchiveError, match=r"model is a folder, and there is no .*model\.zip"):
        PPO.load(tmp_path / "model")


def test_open_files_are_written_to(tmp_path):
    model = tiny(PPO, "CartPole-v1")
    memory = io.BytesIO()
    model.save(memory)
    with (tmp_path / "model.zip").open("wb") as file:
        model.save(file)
    for source in (memory, tmp_path / "model.zip", (tmp_path / "model.zip").open("rb")):
        assert PPO.load(source, device="cpu").n_steps == model.n_steps


def test_an_attribute_is_named_before_an_open_file_is_written_to():
    model = tiny(PPO, "CartPole-v1")
    model.lock = threading.Lock()
    memory = io.BytesIO()
    with pytest.raises(ArgumentError, match=r"`lock` cannot be saved.*exclude=\['lock'\]"):
        model.save(memory)
    assert memory.getvalue() == b""
    model.save(memory, exclude=["lock"])
    PPO.load(memory)


def test_files_of_a_folder_are_replaced_together(tmp_path):
    (tmp_path / "a").write_text("old")
    (tmp_path / "other").write_text("stays")
    with pytest.raises(RuntimeError), filling(tmp_path) as beside:
        (beside / "a").write_text("new")
        raise RuntimeError
    assert {x.name: x.read_text() for x in tmp_path.iterdir()} == {"a": "old", "other": "stays"}
    with filling(tmp_path) as beside:
        (beside / "a").write_text("new")
        (beside / "b").write_text("new")
    assert {x.name: x.read_text() for x in tmp_path.iterdir()} == {"a": "new", "b": "new", "other": "stays"}


@pytest.fixture
def replaced_files(monkeypatch):
    """The names of files that take their place by renaming."""
    found, replace = [], Path.replace

    def noted(self, target):
        found.append(Path(target).name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", noted)
    return found


@ALL
def test_callbacks_and_policies_replace_files(algorithm, tmp_path, replaced_files):
    env = stable_baselines3.common.vec_env.VecNormalize(make_vec_env("CartPole-v1", 2))
    model = tiny(algorithm, env)
    evaluation = VecNormalize(make_vec_env("CartPole-v1", 1), training=False)
    best = EvalCallback(evaluation, n_eval_episodes=1, eval_freq=16, best_model_save_path=tmp_path, verbose=0)
    model.learn(64, callback=[CheckpointCallback(16, tmp_path, save_vecnormalize=True), best])
    model.policy.save(tmp_path / "policy.pt")
    written_files = {path.name for path in tmp_path.rglob("*.zip")} | {path.name for path in tmp_path.rglob("*.p*")}
    assert {
        "best_model.zip",
        "policy.pt",
        "rl_model_32_steps.zip",
        "rl_model_vecnormalize_32_steps.pkl",
    } <= written_files
    assert written_files == set(replaced_files)


def test_nothing_is_written_when_the_target_cannot_be(tmp_path):
    with pytest.raises(OSError, match=r"nothing was changed.*missing"), replacing(tmp_path / "missing" / "x"):
        pass
    with pytest.raises(FileNotFoundError, match="elsewhere"), written(tmp_path / "x", "zip") as file:
        file.write(b"x")
        Path(tmp_path / "elsewhere").read_bytes()
    assert list(tmp_path.iterdir()) == []
