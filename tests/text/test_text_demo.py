import pytest

from sb3_pg.text.demo import ALGORITHMS, SETTINGS, main


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_demo(algo, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sb3_pg.text.demo.N_ENVS", 8)
    small = {"n_episodes": 8} if algo == "reinforce" else {"n_steps": 8, "batch_size": 64}
    monkeypatch.setitem(SETTINGS, algo, {**SETTINGS[algo], **small})
    arguments = ["--task", "sentiment", "--algo", algo, "--timesteps", "64", "--pretrain-steps", "2"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "Before tuning: score" in printed
    assert "| prompt | completion | score |" in printed
    assert (tmp_path / "model.zip").exists()
    assert (tmp_path / "supervised" / "config.json").exists()
    assert ALGORITHMS[algo].load(tmp_path / "model.zip").policy.lm.config.model_type == "llama"
