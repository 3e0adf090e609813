"""How far an update of REINFORCE may move the policy."""

import math

from sb3_pg.common.batch import Batch
from sb3_pg.common.engines.protocol import Engine
from sb3_pg.common.interrupts import uninterrupted

#: KL grows with the square of a short step, so that one shortening is usually enough. Of a long step it grows faster:
#: there the square says too little, so not less than this share is left at once.
_SHORTEST = 0.1
_MARGIN = 0.97
_MAX_SHORTENINGS = 10


class StepLimit:
    """Keep KL(old || new) of an update within ``target_kl`` by shortening it.

    The score function says in which direction to go but not how far. All the gradient steps of an update together are
    shortened along the straight line between old and new parameters; the optimizer's state stays as it is.

    :param engine: whose actor is held, at the parameters from which the update starts
    :param batch: the samples over which the KL is averaged
    :param target_kl: in nats, summed over action dimensions; None limits nothing and costs nothing
    """

    def __init__(self, engine: Engine, batch: Batch, target_kl: float | None) -> None:
        self._batch, self._target_kl = batch, target_kl
        self._actor = None if target_kl is None else engine.actor(batch)
        if self._actor is not None:
            self._start = self._actor.vector
            _ = self._actor.old  # the first look is the one that later ones are compared with

    def keep(self) -> tuple[float, float] | None:
        """Shorten the way from the start to where the actor is now, if that is too far.

        :return: the KL, and the share of the way that is left in (0, 1], or 0 if no share was short enough; None
            without a limit
        """
        if self._actor is None or self._target_kl is None:
            return None
        kl, share = self._kl(), 1.0
        if kl <= self._target_kl:
            return kl, share
        way = self._actor.vector - self._start
        for _ in range(_MAX_SHORTENINGS):
            share *= max(_MARGIN * math.sqrt(self._target_kl / kl), _SHORTEST) if math.isfinite(kl) else _SHORTEST
            with uninterrupted():
                self._actor.vector = self._start + share * way
            kl = self._kl()
            if kl <= self._target_kl:
                return kl, share
        with uninterrupted():
            self._actor.vector = self._start
        return 0.0, 0.0

    def _kl(self) -> float:
        assert self._actor is not None
        return self._batch.mean(self._actor.look().kl)
