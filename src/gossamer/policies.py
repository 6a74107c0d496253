"""Methods that act through policies on a model's attention and cache: their base, and how several are attached together.

The attention and cache families build on this; a recipe stacks methods of both in one runtime.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from torch import Tensor, nn

from gossamer.calibration import Calibration
from gossamer.errors import RecipeError
from gossamer.hf import AttentionRuntime, CachePolicy, DecodePolicy, ModelShape, PrefillPolicy
from gossamer.registry import Handle, Method

PHASES = ("decode", "prefill", "cache")


class PolicyMethod(Method):
    """Base of these methods: one fills one or more of `decode_policy`, `prefill_policy`, `cache_policy`."""

    def calibrate(self, model: nn.Module, tokens: Tensor) -> Calibration:
        """Learn what `attach` needs from token blocks ``[count, block]``.

        Raises:
            RecipeError: this method needs no calibration.
        """
        raise RecipeError(f"{self.slug} needs no calibration")

    def decode_policy(self, model: nn.Module, calibration: Calibration | None) -> DecodePolicy | None:
        """The policy for single queries, or None."""
        return None

    def prefill_policy(self, model: nn.Module, calibration: Calibration | None) -> PrefillPolicy | None:
        """The policy for blocks of queries, or None."""
        return None

    def cache_policy(self, model: nn.Module, calibration: Calibration | None) -> CachePolicy | None:
        """The policy for what the cache keeps, or None."""
        return None

    def policies(self, model: nn.Module, calibration: Calibration | None) -> dict[str, Any]:
        """All policies by phase. Override this where one object serves several phases and shares its state."""
        made = {phase: getattr(self, f"{phase}_policy")(model, calibration) for phase in PHASES}
        return {phase: policy for phase, policy in made.items() if policy is not None}

    def attach(self, model: nn.Module, calibration: Calibration | None = None) -> PolicyHandle:
        """Put the method on a model; the handle takes it off again, bit for bit."""
        return attach(model, [(self, calibration)])

    def with_rows(self, rows: int) -> Self:
        """The same settings with so many rows read at each selection; for methods whose budget is called `tokens`."""
        return self.model_copy(update={"tokens": rows})

    def io_bytes(self, length: int, shape: ModelShape, element_size: int) -> dict[str, int]:
        """Bytes that one decode step of one sparse layer and one sequence must read at this context length.

        Returns:
            ``{"rows": key and value rows, "scores": what is read to choose them}``.
        """
        return {"rows": length * shape.kv_heads * 2 * shape.head_dim * element_size, "scores": 0}


@dataclass(eq=False)
class PolicyHandle(Handle):
    """Attached methods, with the runtime that measures and records them."""

    runtime: AttentionRuntime = field(kw_only=True)


def attach(model: nn.Module, chosen: Sequence[tuple[PolicyMethod, Calibration | None]]) -> PolicyHandle:
    """Attach methods together, at most one for each of decode, prefill and cache.

    Raises:
        RecipeError: two methods claim the same phase.
    """
    policies: dict[str, Any] = {}
    owner: dict[str, str] = {}
    for method, calibration in chosen:
        for phase, policy in method.policies(model, calibration).items():
            if phase in policies:
                where = "the cache" if phase == "cache" else f"attention in {phase}"
                hint = (
                    " (prompt='block' leaves prefill free)"
                    if any("prompt" in type(m).model_fields for m, _ in chosen)
                    else ""
                )
                raise RecipeError(f"{owner[phase]} and {method.slug} both claim {where}: choose one{hint}")
            policies[phase], owner[phase] = policy, method.slug
    runtime = AttentionRuntime(model, **policies)

    def report() -> dict[str, Any]:
        stats = runtime.stats
        facts = {
            "kv_bytes_read": stats.kv_bytes,
            "score_bytes_read": stats.score_bytes,
            "dense_bytes": stats.dense_bytes,
            "rows_kept": stats.rows / stats.dense_rows if stats.dense_rows else 1.0,
        }
        for policy in policies.values():
            facts.update(policy.report())
        return facts

    return PolicyHandle(undo=[runtime.detach], reports=[report], runtime=runtime)
