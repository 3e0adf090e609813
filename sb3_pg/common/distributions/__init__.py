"""Action distributions as formulas, and which of them one of SB3's distribution objects is."""

from sb3_pg.common.distributions.bernoulli import Bernoulli
from sb3_pg.common.distributions.beta import Beta
from sb3_pg.common.distributions.box import BoxDistribution, BoxOptions, BoxPolicy
from sb3_pg.common.distributions.categorical import Categorical
from sb3_pg.common.distributions.family import Family, Likelihood, Parameters, draw
from sb3_pg.common.distributions.gaussian import Gaussian
from sb3_pg.common.distributions.masks import masked, masking
from sb3_pg.common.distributions.recognition import describe, family_of
from sb3_pg.common.distributions.squashed_gaussian import SquashedGaussian

__all__ = [
    "Bernoulli",
    "Beta",
    "BoxDistribution",
    "BoxOptions",
    "BoxPolicy",
    "Categorical",
    "Family",
    "Gaussian",
    "Likelihood",
    "Parameters",
    "SquashedGaussian",
    "describe",
    "draw",
    "family_of",
    "masked",
    "masking",
]
