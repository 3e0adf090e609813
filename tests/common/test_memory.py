"""No more memory than the peers at the same rollout size."""

import tracemalloc

import numpy as np
import pytest
import sb3_contrib
import stable_baselines3
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv

from sb3_pg import PPO, TRPO
from sb3_pg.common import batch

N_STEPS = 64


def trained(algorithm, n_steps=N_STEPS, **kwargs):
    """A model after a rollout of images and its update."""
    env = make_vec_env(lambda: FakeImageEnv(screen_height=84, screen_width=84, n_channels=4, discrete=True), 2)
    model = algorithm("CnnPolicy", env, n_steps=n_steps, batch_size=32, device="cpu", seed=0, **kwargs)
    return model.learn(2 * n_steps)


def peak(algorithm, **kwargs):
    """Bytes of NumPy arrays at the worst moment of that."""
    tracemalloc.start()
    try:
        model = trained(algorithm, **kwargs)
        return tracemalloc.get_traced_memory()[1], model
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("ours", "theirs", "kwargs"),
    [
        (PPO, stable_baselines3.PPO, {"n_epochs": 2}),
        (TRPO, sb3_contrib.TRPO, {"cg_max_steps": 1, "n_critic_updates": 1, "sub_sampling_factor": 32}),
    ],
)
def test_images_stay_bytes(ours, theirs, kwargs):
    for algorithm in (ours, theirs):  # what is imported and cached at the first use does not count
        trained(algorithm, 32, **kwargs)
    found, model = peak(ours, **kwargs)
    assert model.rollout_buffer.observations.dtype == np.uint8
    assert found <= peak(theirs, **kwargs)[0]


def test_long_rollouts_are_gathered_piece_by_piece(monkeypatch):
    largest = []
    take = batch.Batch.__getitem__

    def spied(self, index):
        piece = take(self, index)
        if not isinstance(index, slice):
            largest.append(len(piece))
        return piece

    monkeypatch.setattr(batch.Batch, "__getitem__", spied)
    monkeypatch.setattr(batch, "_GATHERED_BYTES", 1 << 12)
    model = PPO("MlpPolicy", "CartPole-v1", n_steps=512, batch_size=32, n_epochs=1, seed=0, device="cpu")
    model.learn(512)
    assert sum(largest) == 512 and max(largest) < 128
