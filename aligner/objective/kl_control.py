"""KL coefficient controllers: constant, or adaptive towards a target KL.

A controller is stateless; the loop keeps the coefficient (a float) and passes it back:

    kl_coef = control.initial
    ... kl_coef = control.update(kl_coef, kl)           after each batch
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class FixedKL:
    """A constant KL coefficient."""

    initial: float = 0.05
    """KL coefficient, in reward per nat."""

    def __post_init__(self) -> None:
        if not self.initial >= 0.0:
            raise ValueError(f"kl_control.initial={self.initial} must be 0 or more; 0.05 is usual.")

    def update(self, coefficient: float, kl: float) -> float:
        """Returns `coefficient` unchanged."""
        return coefficient


@dataclass(frozen=True)
class AdaptiveKL:
    """Adaptive KL coefficient, proportional control in log space: Ziegler et al. 2019, arXiv 1909.08593, section 2.2.

    e_t      = clip((KL_t - target) / target, -max_error, max_error)
    beta_t+1 = beta_t (1 + rate e_t)
    """

    initial: float = 0.2
    """KL coefficient of the first batch, in reward per nat."""
    target: float = 6.0
    """Target KL(policy || reference), in nats per response."""
    rate: float = 0.1
    """K_beta: relative change of the coefficient per batch and unit of error."""
    max_error: float = 0.2
    """Clip of the relative error, unitless; at rate 0.1 the default changes the coefficient by at most 2% per batch."""

    def __post_init__(self) -> None:
        for name, usual in (("initial", 0.2), ("target", 6.0), ("rate", 0.1), ("max_error", 0.2)):
            value = getattr(self, name)
            if not 0.0 < value < float("inf"):
                raise ValueError(f"kl_control.{name}={value} must be more than 0; {usual} is usual.")
        if self.rate * self.max_error >= 1.0:
            raise ValueError(
                f"kl_control.rate={self.rate} times kl_control.max_error={self.max_error} must be less than 1, or the "
                "coefficient could turn negative; 0.1 and 0.2 are usual."
            )

    def update(self, coefficient: float, kl: float) -> float:
        """The coefficient of the next batch.

        Args:
            kl: mean KL of this batch, in nats per response; the estimate may be negative.

        Raises:
            ValueError: `kl` is NaN, which would never leave the coefficient again.
        """
        if kl != kl:
            raise ValueError("the KL of this batch is NaN; skip the update for a batch without trained rows.")
        error = min(max(kl / self.target - 1.0, -self.max_error), self.max_error)
        return coefficient * (1.0 + self.rate * error)
