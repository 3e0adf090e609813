"""REINFORCE, TRPO and PPO for Stable-Baselines3: one family with one design."""

from sb3_pg import text  # registers its environments and imports nothing else
from sb3_pg.common.registry import (
    AUTOGRAD_PLACES,
    BUFFER_PLACES,
    ENGINE_PLACES,
    MAKER_PLACES,
    MEMORY_PLACES,
    OWN_PLACES,
    POLICY_PLACES,
    PRESET_PLACES,
)
from sb3_pg.ppo import PPO
from sb3_pg.reinforce import REINFORCE
from sb3_pg.trpo import TRPO
from sb3_pg.version import __version__

__all__ = ["PPO", "REINFORCE", "TRPO", "__version__", "text"]

for _name in ("CausalLMPolicy", "Seq2SeqLMPolicy"):
    POLICY_PLACES[_name] = f"sb3_pg.text.policies:{_name}"
MAKER_PLACES["sb3_pg.text.spaces:Vocabulary"] = "sb3_pg.text.spaces:vocabulary_of"
MAKER_PLACES["sb3_pg.text.kept:KeptTokenizer"] = "sb3_pg.text.kept:kept_tokenizer_of"
_LANGUAGE_MODEL = "sb3_pg.text.language_model:LanguageModelPolicy"
ENGINE_PLACES[_LANGUAGE_MODEL] = AUTOGRAD_PLACES[_LANGUAGE_MODEL] = "sb3_pg.text.engine:TextEngine"
PRESET_PLACES[_LANGUAGE_MODEL] = "sb3_pg.text.presets:preset_of"
BUFFER_PLACES[_LANGUAGE_MODEL] = "sb3_pg.text.rows:TextRolloutBuffer"
for _name in ("MlpLstmPolicy", "CnnLstmPolicy", "MultiInputLstmPolicy"):
    POLICY_PLACES[_name] = f"sb3_contrib.ppo_recurrent.policies:{_name}"
for _name in ("MlpGruPolicy", "CnnGruPolicy", "MultiInputGruPolicy"):
    POLICY_PLACES[_name] = f"sb3_pg.recurrent:{_name}"
_RECURRENT = "sb3_contrib.common.recurrent.policies:Recurrent"
for _name in ("ActorCritic", "ActorCriticCnn", "MultiInputActorCritic"):
    OWN_PLACES[f"{_RECURRENT}{_name}Policy"] = f"sb3_pg.recurrent:Quick{_name}LstmPolicy"
MEMORY_PLACES.add(f"{_RECURRENT}ActorCriticPolicy")
AUTOGRAD_PLACES[f"{_RECURRENT}ActorCriticPolicy"] = "sb3_pg.common.engines.recurrent:RecurrentEngine"
ENGINE_PLACES[f"{_RECURRENT}ActorCriticPolicy"] = "sb3_pg.common.engines.closed_recurrent:recurrent_engine"
