"""Archives that name the pretrained model instead of holding it."""

import copy
import json
import shutil
import zipfile

import numpy as np
import pytest
import torch as th
from conftest import silent
from safetensors.torch import load_file, save_file
from text_models import SHAPES, config_of, letters_task, make
from tiny_models import weights

from sb3_pg import PPO
from sb3_pg.common.archive.container import ArchiveError
from sb3_pg.common.errors import ArgumentError
from sb3_pg.text import TextVecEnv
from sb3_pg.text.base import can_be_named, fingerprint
from sb3_pg.text.policies import CausalLMPolicy

LORA = {"r": 2}
KINDS = pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])


@pytest.fixture(scope="module", params=["gpt2"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / request.param
    make(request.param).policy.save_pretrained(path)
    return path


def tuned(folder, lora=None, shape="gpt2", **kwargs):
    return make(shape, policy_kwargs={"model": str(folder), "lora": lora, **kwargs}).learn(52)


def names_in(path):
    with zipfile.ZipFile(path) as archive, archive.open("policy.pth") as file:
        return set(th.load(file, weights_only=True))


@pytest.mark.parametrize("shape", SHAPES)
@KINDS
def test_what_does_not_change_is_named(shape, lora, tmp_path):
    make(shape).policy.save_pretrained(tmp_path / "base")
    model = tuned(tmp_path / "base", lora, shape)
    rows = model.env.task.observations()
    expected = [model.policy.hidden_states(rows).detach(), model.policy.reference_log_prob(rows, np.full(len(rows), 3))]
    model.save(tmp_path / "model.zip")
    own = names_in(tmp_path / "model.zip")
    if lora:
        assert own == {n for n, p in model.policy.named_parameters() if p.requires_grad} | {"reference_kl_coef"}
    else:
        assert not any(name.startswith("reference.") for name in own) and len(own) > 10
    loaded = PPO.load(tmp_path / "model.zip", env=model.env, device="cpu")
    found = [loaded.policy.hidden_states(rows).detach(), loaded.policy.reference_log_prob(rows, np.full(len(rows), 3))]
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_array_equal(x, y)
    loaded.save(tmp_path / "again.zip")
    assert names_in(tmp_path / "again.zip") == own
    assert PPO.load(tmp_path / "again.zip").policy.base == model.policy.base


@KINDS
def test_in_half_precision(lora, folder, tmp_path):
    model = tuned(folder, lora, model_kwargs={"dtype": th.bfloat16})
    rows = model.env.task.observations()
    expected = model.policy.reference_log_prob(rows, np.full(len(rows), 3))
    model.save(tmp_path / "model")
    loaded = PPO.load(tmp_path / "model", device="cpu")
    assert loaded.policy.base == model.policy.base is not None
    np.testing.assert_array_equal(loaded.policy.reference_log_prob(rows, np.full(len(rows), 3)), expected)
    assert loaded.policy.generate(["a b", "c"]) == model.policy.generate(["a b", "c"])
    types = {(name, p.dtype) for name, p in model.policy.named_parameters()}
    assert {(name, p.dtype) for name, p in loaded.policy.named_parameters()} == types


@KINDS
def test_learning_goes_on_exactly(lora, folder, tmp_path):
    model = tuned(folder, lora)
    model.save(tmp_path / "model")
    copied = silent(copy.deepcopy(model)).learn(52, reset_num_timesteps=False)
    loaded = silent(PPO.load(tmp_path / "model", env=copy.deepcopy(model.env), device="cpu"))
    loaded.learn(52, reset_num_timesteps=False)
    np.testing.assert_array_equal(np.sort(weights(loaded)), np.sort(weights(copied)))
    assert not np.array_equal(np.sort(weights(loaded)), np.sort(weights(model)))


@KINDS
def test_archives_may_hold_it(lora, folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "base")
    model = tuned(copied, lora, save_base=True)
    model.save(tmp_path / "model.zip")
    expected = model.policy.generate(["a b"])
    small = tuned(folder, lora)
    small.save(tmp_path / "small.zip")
    shutil.rmtree(copied)
    assert model.policy.base is None
    assert PPO.load(tmp_path / "model.zip").policy.generate(["a b"]) == expected
    saved_bytes = (tmp_path / "model.zip").stat().st_size - (tmp_path / "small.zip").stat().st_size
    assert saved_bytes > 0.9 * (folder / "model.safetensors").stat().st_size


def test_a_policy_file_names_it_too(folder, tmp_path):
    policy = tuned(folder, LORA).policy
    policy.save(tmp_path / "policy.pt")
    loaded = CausalLMPolicy.load(tmp_path / "policy.pt", device="cpu")
    assert loaded.generate(["a b", "c"]) == policy.generate(["a b", "c"])
    assert (tmp_path / "policy.pt").stat().st_size < 60_000


def test_without_its_reference_a_model_answers_but_does_not_learn(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "base")
    model = tuned(copied)
    model.save(tmp_path / "model")
    expected = model.policy.generate(["a b"])
    shutil.rmtree(copied)
    loaded = PPO.load(tmp_path / "model", env=model.env)
    assert loaded.policy.generate(["a b"]) == expected
    with pytest.raises(ArgumentError, match=r"needs its base model '.*/base', which is not on this machine") as caught:
        loaded.learn(52)
    assert "\n" not in str(caught.value)
    shutil.copytree(folder, copied)
    loaded.learn(52)


def test_an_adapter_needs_its_base(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "base")
    model = tuned(copied, LORA)
    model.save(tmp_path / "model")
    copied.rename(tmp_path / "elsewhere")
    with pytest.raises(ArgumentError, match="not on this machine"):
        PPO.load(tmp_path / "model")
    kwargs = {"model": str(tmp_path / "elsewhere"), "lora": LORA, "temperature": 0.7}
    loaded = PPO.load(tmp_path / "model", custom_objects={"policy_kwargs": kwargs})
    assert loaded.policy.generate(["a b"]) == model.policy.generate(["a b"])


def test_the_folder_may_be_relative(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder.parent)
    model = tuned(folder.name, LORA)
    model.save(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert PPO.load("model").policy.generate(["a b"]) == model.policy.generate(["a b"])


@KINDS
def test_another_base_is_noticed(lora, folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "base")
    model = tuned(copied, lora)
    model.save(tmp_path / "model")
    held = load_file(copied / "model.safetensors")
    name = sorted(held)[-1]
    held[name][0] += 1e-6
    save_file(held, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArgumentError, match="is not the one that the archive was saved with"):
        loaded = PPO.load(tmp_path / "model", env=model.env)
        loaded.learn(52)
        assert lora is None


def test_a_base_that_was_changed_in_memory_is_held(folder, tmp_path):
    model = tuned(folder, LORA)
    with th.no_grad():
        model.policy.lm.transformer.wte.weight += 0.1
    expected = model.policy.generate(["a b", "c", "d"])
    model.save(tmp_path / "model")
    assert "language_model.base_model.model.transformer.wte.weight" in names_in(tmp_path / "model.zip")
    assert PPO.load(tmp_path / "model").policy.generate(["a b", "c", "d"]) == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_the_folder_of_an_adapter_is_a_model(shape, tmp_path):
    """It goes on from what was tuned, all of it, which is its reference then; archives hold it."""
    make(shape).policy.save_pretrained(tmp_path / "base")
    policy = tuned(tmp_path / "base", LORA, shape, temperature=1.0).policy
    with th.no_grad():
        for name, p in policy.named_parameters():
            p += 0.1 * ("lora" in name)
    policy.save_pretrained(tmp_path / "adapter")
    rows, actions = letters_task().observations(), th.full((5,), 4)
    expected = policy.evaluate_actions(rows, actions)[1].detach().numpy()
    assert np.abs(expected - policy.reference_log_prob(rows, actions)).max() > 0.1
    for lora in (None, LORA):
        env = TextVecEnv(letters_task(), 4)
        kwargs = {"model": str(tmp_path / "adapter"), "lora": lora}
        model = PPO(type(policy), env, n_steps=13, learning_rate=1e-2, seed=1, policy_kwargs=kwargs)
        found = model.policy.evaluate_actions(rows, actions)[1].detach().numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(model.policy.reference_log_prob(rows, actions), found, rtol=1e-5, atol=1e-6)
        assert model.policy.base is None
        silent(model).learn(104)
        learned = model.policy.evaluate_actions(rows, actions)[1].detach().numpy()
        assert np.abs(learned - found).max() > 1e-2
        np.testing.assert_allclose(model.policy.reference_log_prob(rows, actions), found, rtol=1e-5, atol=1e-6)
        model.save(tmp_path / "model")
        loaded = PPO.load(tmp_path / "model", device="cpu").policy
        np.testing.assert_array_equal(loaded.evaluate_actions(rows, actions)[1].detach().numpy(), learned)
        np.testing.assert_allclose(loaded.reference_log_prob(rows, actions), found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_adapter_whose_base_is_in_no_folder_is_written_with_it(shape, tmp_path):
    """The model of a configuration, and one from an archive that holds the base."""
    make(shape).policy.save_pretrained(tmp_path / "base")
    tuned(tmp_path / "base", LORA, shape, save_base=True).save(tmp_path / "held")
    shutil.rmtree(tmp_path / "base")
    made = make(shape, policy_kwargs={"lora": LORA}).policy
    for policy in (made, PPO.load(tmp_path / "held", device="cpu").policy):
        before = [p.clone() for p in policy.parameters()]
        policy.save_pretrained(tmp_path / "whole")
        lm = policy.auto_model.from_pretrained(tmp_path / "whole")
        ids = th.tensor([[3, 4, 5]])
        asked = {"input_ids": ids} | ({"decoder_input_ids": ids} if shape == "t5" else {})
        np.testing.assert_allclose(lm(**asked).logits.detach(), policy.lm(**asked).logits.detach(), atol=1e-5)
        assert all(th.equal(p, q) for p, q in zip(policy.parameters(), before, strict=True))
        shutil.rmtree(tmp_path / "whole")


def test_a_reference_that_has_followed_goes_with_the_parameters(folder, tmp_path):
    options = {"ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0}
    model, other = tuned(folder, **options), make("gpt2", policy_kwargs={"model": str(folder), **options})
    rows, actions = letters_task().observations(), np.full(5, 4)
    expected = model.policy.reference_log_prob(rows, actions)
    make("gpt2", policy_kwargs={"model": str(folder), **options}).save(tmp_path / "fresh")
    for to in (other, PPO.load(tmp_path / "fresh", device="cpu")):  # the second reads its reference when it needs it
        to.set_parameters(model.get_parameters())
        np.testing.assert_array_equal(to.policy.reference_log_prob(rows, actions), expected)
        third = make("gpt2", policy_kwargs={"model": str(folder), **options})
        third.set_parameters(to.get_parameters())
        np.testing.assert_array_equal(third.policy.reference_log_prob(rows, actions), expected)
    assert np.abs(expected - make("gpt2").policy.reference_log_prob(rows, actions)).max() > 1e-3


def test_models_that_are_more_than_their_folder_are_held():
    assert can_be_named("x", {"dtype": th.bfloat16}, {"init_lora_weights": "gaussian"})
    assert not can_be_named("x", {"gguf_file": "y"}, None)
    assert not can_be_named("x", None, {"init_lora_weights": "pissa"})  # which changes the base
    assert not can_be_named({"model_type": "gpt2"}, None, None)
    policy = make("gpt2", policy_kwargs={"lora": LORA}).policy
    assert policy.base is None and any("wte" in name for name in policy.state_dict())


def test_fingerprints():
    parts = [("a", th.ones(2, 3)), ("b", th.ones(3, 2))]
    assert fingerprint(parts) == fingerprint(parts[::-1])
    others = [[("a", th.ones(3, 2)), parts[1]], [("a", th.ones(2, 3).double()), parts[1]], parts[:1]]
    assert len({fingerprint(some) for some in [parts, *others]}) == 4
    transposed = [("a", th.arange(6.0).reshape(2, 3).T)]
    assert fingerprint(transposed) == fingerprint([("a", transposed[0][1].contiguous())])
    assert fingerprint([("a", th.zeros((), dtype=th.bfloat16))]) != fingerprint([("a", th.zeros(()))])


# ---------------------------------------------------------------------- trust


@pytest.mark.parametrize(
    "base, wanted",
    [
        ({"name": "x"}, "its base model would be"),
        ({"name": 3, "fingerprint": "x"}, "its base model would be"),
        ({"name": "x", "fingerprint": "x", "trust_remote_code": True}, "its base model would be"),
        ("x", "its base model would be"),
    ],
    ids=["no fingerprint", "number", "more", "text"],
)
def test_a_file_says_name_and_fingerprint_and_no_more(base, wanted):
    model = make("gpt2")
    kwargs = {**model.policy.portable_kwargs(model.policy_kwargs), "base": base}
    assert wanted in CausalLMPolicy.not_portable(kwargs)


def test_only_plain_safetensors_are_read(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "base")
    tuned(copied, LORA).save(tmp_path / "model")
    (copied / "adapter_config.json").write_text(json.dumps({"auto_mapping": {"parent_library": "os"}}))
    with pytest.raises(ArgumentError, match="must be a folder with a model in safetensors"):
        PPO.load(tmp_path / "model")
    (copied / "adapter_config.json").unlink()
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(ArgumentError, match="must be a folder with a model in safetensors"):
        PPO.load(tmp_path / "model")


def test_the_configuration_is_the_archives(folder, tmp_path):
    """That of the folder could name code."""
    copied = shutil.copytree(folder, tmp_path / "base")
    model = tuned(copied, LORA)
    model.save(tmp_path / "model")
    path = copied / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    (copied / "evil.py").write_text("raise SystemExit('code ran')")
    assert PPO.load(tmp_path / "model").policy.generate(["a b"]) == model.policy.generate(["a b"])


def test_a_base_gives_no_room_for_a_policy_that_is_much_larger(folder, tmp_path):
    model = tuned(folder)  # full: the base is read later, if ever
    data = model.policy._get_constructor_parameters()
    data["model"] = config_of("gpt2", letters_task(), n_embd=4096, n_layer=20)
    th.save({"state_dict": model.policy.state_dict(), "data": data}, tmp_path / "policy.pt")
    with pytest.raises(ArchiveError, match="much larger than its"):
        CausalLMPolicy.load(tmp_path / "policy.pt")
