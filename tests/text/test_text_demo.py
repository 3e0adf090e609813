import pytest

from sb3_pg.text.demo import ALGORITHMS, SETTINGS, main


def small_run(monkeypatch, algo="ppo"):
    monkeypatch.setattr("sb3_pg.text.demo.N_ENVS", 8)
    small = {"n_episodes": 8} if algo == "reinforce" else {"n_steps": 8, "batch_size": 64}
    monkeypatch.setitem(SETTINGS, algo, {**SETTINGS[algo], **small})


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_demo(algo, tmp_path, capsys, monkeypatch):
    small_run(monkeypatch, algo)
    arguments = ["--task", "sentiment", "--algo", algo, "--timesteps", "64", "--pretrain-steps", "2"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "Before tuning: score" in printed
    assert "| prompt | completion | score |" in printed
    assert (tmp_path / "model.zip").exists()
    assert (tmp_path / "supervised" / "config.json").exists()
    assert ALGORITHMS[algo].load(tmp_path / "model.zip").policy.lm.config.model_type == "llama"


def test_its_last_lines_ask_the_tuned_model_something(tmp_path, capsys, monkeypatch):
    small_run(monkeypatch)
    assert main(["--task", "sentiment", "--timesteps", "64", "--pretrain-steps", "2", "--out", str(tmp_path)]) == 0
    exec("\n".join(line.strip() for line in capsys.readouterr().out.splitlines()[-2:]), {})
    assert "generated_text" in capsys.readouterr().out


def test_zero_steps_are_no_steps(tmp_path, capsys, monkeypatch):
    small_run(monkeypatch)
    assert main(["--task", "sentiment", "--timesteps", "0", "--pretrain-steps", "0", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "Supervised start: 0 steps" in printed and "After 0 tokens" in printed


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--timesteps", "-1"], "must be a whole number >= 0, not '-1'"),
        (["--pretrain-steps", "-5"], "must be a whole number >= 0, not '-5'"),
        (["--seed", "-1"], "must be a whole number >= 0, not '-1'"),
        (["--out", "/dev/null/x"], "/dev/null/x"),
        (["--task", "poems"], "poems"),
    ],
)
def test_wrong_input_gets_one_line(arguments, says, capsys, monkeypatch):
    monkeypatch.setattr("sb3_pg.text.demo.pretrain", None)  # it is noticed before
    assert main(arguments) == 2
    errors = capsys.readouterr().err
    assert says in errors and errors.count("\n") == 1
