"""Engines act, judge and step with a policy: any torch policy by autograd, SB3's MlpPolicy in closed form.

:mod:`~sb3_pg.common.engines.protocol` says what an engine is, :mod:`~sb3_pg.common.engines.choice` chooses one.
"""
