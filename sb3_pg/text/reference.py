"""The model that a tuned one is kept near to: how far it is from it, where that enters, and when it follows."""

from dataclasses import dataclass

import torch as th

from sb3_pg.common.errors import ArgumentError, check_choice, check_count, check_number
from sb3_pg.common.interrupts import uninterrupted
from sb3_pg.common.objectives import KL_ESTIMATORS

#: The estimator that each place takes if none is named.
_USUAL = {"reward": "k1", "loss": "k3"}


@dataclass(frozen=True)
class ReferenceSettings:
    """The arguments of a policy that concern its reference.

    See :class:`sb3_pg.text.language_model.LanguageModelPolicy`.

    :raises ArgumentError: one of them is of no use
    """

    kl_coef: float | None
    kl_target: float | None
    kl_in: str
    kl_estimator: str | None
    sync_steps: int | None
    mixup_alpha: float
    is_adapter: bool

    def __post_init__(self) -> None:
        for name, value in (("reference_kl_coef", self.kl_coef), ("reference_kl_target", self.kl_target)):
            if value is not None:
                check_number(name, value, above_low=name == "reference_kl_target")
        check_choice("reference_kl_in", self.kl_in, _USUAL)
        check_choice("reference_kl_estimator", self.kl_estimator, (*KL_ESTIMATORS, None))
        check_number("ref_model_mixup_alpha", self.mixup_alpha, high=1.0, above_low=True)
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ArgumentError(
                "`reference_kl_estimator='k1'` does nothing with reference_kl_in='loss': the mean of its gradient is "
                "zero. Use 'k2' or 'k3', or reference_kl_in='reward'."
            )
        if self.sync_steps is not None:
            check_count("ref_model_sync_steps", self.sync_steps)
            if self.is_adapter:
                raise ArgumentError(
                    f"`ref_model_sync_steps={self.sync_steps}` needs a reference of its own, but with `lora` that is "
                    "the model without its adapter, which stays as it is. Leave one of them out."
                )
        if self.kl_coef is None:
            self._refuse_without_reference()
        elif self.kl_target is not None and self.kl_coef == 0:
            raise ArgumentError(
                f"`reference_kl_target={self.kl_target!r}` needs a weight above 0 to start from, not "
                f"reference_kl_coef={self.kl_coef!r}. Pass a larger one, or leave out reference_kl_target."
            )

    def _refuse_without_reference(self) -> None:
        for name, value, neutral in (
            ("reference_kl_target", self.kl_target, None),
            ("reference_kl_in", self.kl_in, "reward"),
            ("reference_kl_estimator", self.kl_estimator, None),
            ("ref_model_sync_steps", self.sync_steps, None),
        ):
            if value != neutral:
                raise ArgumentError(
                    f"`{name}={value!r}` needs a reference, but reference_kl_coef=None has none. Pass a number, or "
                    f"leave out {name}."
                )

    @property
    def estimator(self) -> str:
        """Return the name of the estimator that is used."""
        return self.kl_estimator or _USUAL[self.kl_in]


@th.no_grad()
def mix(reference: th.nn.Module, model: th.nn.Module, alpha: float) -> None:
    """Move the parameters of a reference by this share of the way to those of a model."""
    with uninterrupted():
        for old, new in zip(reference.parameters(), model.parameters(), strict=True):
            old.copy_(old.float().lerp(new.float(), alpha) if old.dtype is th.bfloat16 else old.lerp(new, alpha))
