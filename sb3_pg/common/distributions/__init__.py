"""Action distributions as formulas, and which of them one of SB3's distribution objects is."""

from sb3_pg.common.distributions.bernoulli import Bernoulli
from sb3_pg.common.distributions.categorical import Categorical
from sb3_pg.common.distributions.family import Family, Likelihood, Parameters, draw
from sb3_pg.common.distributions.gaussian import Gaussian
from sb3_pg.common.distributions.masks import masked
from sb3_pg.common.distributions.recognition import describe, family_of

__all__ = [
    "Bernoulli",
    "Categorical",
    "Family",
    "Gaussian",
    "Likelihood",
    "Parameters",
    "describe",
    "draw",
    "family_of",
    "masked",
]
