"""The pruning methods by name, for the matrices that read one input."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cap_llm.config import OneshotConfig
from cap_llm.solvers import scores
from cap_llm.solvers.admm import admm_grad, alps
from cap_llm.solvers.hessian import Moments, factorize
from cap_llm.solvers.refit import refit
from cap_llm.solvers.sparsegpt import sparsegpt
from cap_llm.sparsity.choose import choose
from cap_llm.sparsity.pattern import Pattern


class Solver:
    """The configured method, with the Hessian of one input factorized once.

    Args:
        config: method and pattern.
        moments: of the input, full or diagonal as the method needs; None for magnitude.
        name: of a layer that reads the input, for errors.
        needs_factor: factorize the Hessian although the method does not need it.
        sample: full moments for `error` where `moments` has only the diagonal.
    """

    def __init__(
        self,
        config: OneshotConfig,
        moments: Moments | None,
        name: str,
        needs_factor: bool = False,
        sample: Moments | None = None,
    ):
        self.config, self.error_moments = config, moments if moments and moments.full else sample
        self.pattern = pattern_of(config)
        self.factor = self.ridge = None
        if moments and (needs_factor or config.second_order):
            self.mean_square = moments.diagonal.clone()
            self.factor = factorize(moments.hessian, config.damping, name)
            self.ridge = self.factor.hessian.diagonal() - self.mean_square
        elif moments:
            self.mean_square = moments.diagonal

    @property
    def damping(self) -> float | None:
        """The damping of the factor, or None without one."""
        return self.factor.damping if self.factor else None

    def __call__(
        self,
        weight: torch.Tensor,
        sparsity: float,
        allowed: torch.Tensor | None = None,
        target: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prunes a weight [R, C].

        Args:
            weight: W, fp32.
            sparsity: fraction of zeros; ignored for N:M.
            allowed: mask [R, C] that the new mask must be a subset of.
            target: weights [R, C] whose outputs a refit matches; default: `weight`.

        Returns:
            The pruned weight and its mask, both [R, C].
        """
        new, mask = METHODS[self.config.method](self, weight, sparsity, allowed)
        if self.config.refits:
            new = self.refit(new, mask, weight if target is None else target)
        return new, mask

    def keep_highest(
        self,
        score: torch.Tensor,
        weight: torch.Tensor,
        sparsity: float,
        allowed: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Removes the weights with the lowest scores [R, C]. Returns weight and mask."""
        mask = choose(score, self.pattern, sparsity, allowed)
        return weight * mask, mask

    def refit(self, weight: torch.Tensor, mask: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Returns the least-squares weights [R, C] on `mask` for the outputs of `target`."""
        return refit(weight, mask, target, self.factor.hessian, self.factor.inverse)

    def error(self, dense: torch.Tensor, new: torch.Tensor) -> float | None:
        """Relative squared output error under the undamped Hessian; None without full moments."""
        if self.error_moments is None:
            return None

        def energy(w: torch.Tensor) -> torch.Tensor:
            total = (w @ self.error_moments.hessian * w).sum()
            return total if self.ridge is None else total - (w.square() @ self.ridge).sum()

        return (energy(dense - new) / energy(dense).clamp(min=1e-30)).item()


# per `oneshot.method`: (solver, weight [R, C], sparsity, allowed) -> weight and mask
METHODS: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    "magnitude": lambda s, w, *args: s.keep_highest(scores.magnitude(w), w, *args),
    "wanda": lambda s, w, *args: s.keep_highest(scores.wanda(w, s.mean_square), w, *args),
    "sparsegpt": lambda s, w, *args: sparsegpt(w, s.factor, s.pattern, *args, s.config.block_size),
    "admm_grad": lambda s, w, *args: admm_grad(w, s.factor.hessian, s.pattern, *args),
    "alps": lambda s, w, *args: alps(w, s.factor.hessian, s.pattern, *args),
}


def pattern_of(config: OneshotConfig) -> Pattern:
    """Returns the sparsity pattern; Wanda compares weights within an output row only."""
    pattern = Pattern.parse(config.pattern)
    per_row = config.method == "wanda" and pattern.kind == "unstructured"
    return Pattern("row") if per_row else pattern
