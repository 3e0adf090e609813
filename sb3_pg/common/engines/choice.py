"""Choose the engine that computes a policy."""

import copyreg
from collections.abc import Callable

from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_pg.common.engines.autograd import AutogradEngine
from sb3_pg.common.engines.blueprint import reason_against
from sb3_pg.common.engines.closed_form import ClosedFormEngine
from sb3_pg.common.engines.protocol import Engine
from sb3_pg.common.registry import AUTOGRAD_PLACES, ENGINE_PLACES, entered_for


def make_engine(policy: ActorCriticPolicy, engine: str = "auto") -> Engine:
    """Return the fastest engine that computes exactly what ``policy`` does.

    :param policy: any ActorCriticPolicy; one with an engine of its own, see :mod:`sb3_pg.common.registry`, gets that
    :param engine: "autograd" always takes torch's
    """
    own: Callable[..., Engine] | None = entered_for(
        type(policy), AUTOGRAD_PLACES if engine == "autograd" else ENGINE_PLACES
    )
    if own is not None:
        return own(policy)
    if engine == "autograd":
        return AutogradEngine(policy, "engine='autograd'")
    reason = reason_against(policy)
    return ClosedFormEngine(policy) if reason is None else AutogradEngine(policy, reason, is_stopgap=True)


# A copy of views would see the original's memory: a copied or unpickled engine is made anew for its own policy.
copyreg.pickle(ClosedFormEngine, lambda engine: (make_engine, (engine.policy,)))  # type: ignore[arg-type, return-value]
