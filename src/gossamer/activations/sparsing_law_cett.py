"""Which neurons of an MLP count as inactive: the four rules, and the search of one layer's CETT threshold.

A gated MLP is a sum over neurons, ``FFN(x) = Σ_i n_i`` with ``n_i = W_out[:, i]·a_i`` and ``a_i = s_i·(W_in[i]·x)``,
``s_i = σ(W_gate[i]·x)``. Hence ``‖n_i‖ = |a_i|·‖W_out[:, i]‖``: no neuron's output has to be written down to know its length.
In a plain MLP ``a_i = s_i`` is the activated value. A bias of the output belongs to no neuron and is left out.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from gossamer.errors import CalibrationError, InputError
from gossamer.hf import MLPView, mlp_views, watch
from gossamer.hf.mlp_views import by_input
from gossamer.patterns import MagnitudeSketch, NeuronRule

Progress = Callable[[str, int, int], None]

#: Values of ‖n‖ that the upper end of the candidates is estimated from, and the quantile taken.
QUANTILE_SAMPLE, QUANTILE = 65_536, 0.99


def no_progress(what: str, done: int, total: int) -> None:
    """Tell nobody."""


# -- the four rules ---------------------------------------------------------------------------------------------------


def zeros_rule() -> NeuronRule:
    """Straightforward ReLU: inactive where ``s_i = 0``."""
    return NeuronRule(threshold=torch.tensor(0.0))


def top_k_rule(k: int) -> NeuronRule:
    """Inactive: all but each token's k largest ``|s_i|``.

    The released code takes the largest entries of the whole batch × sequence × neurons tensor; the paper's rule is per token.
    """
    return NeuronRule(count=k)


def fat_rule(epsilon: float) -> NeuronRule:
    """FAT-ε: inactive where ``|s_i| < ε``; at ε = 0 exact zeros are (the released code adds 1e-18 to ε).

    >>> fat_rule(0.5).mask(torch.tensor([0.5, 0.49, 0.0])).tolist()
    [True, False, False]
    """
    below = torch.nextafter(torch.tensor(epsilon), torch.tensor(0.0))
    return NeuronRule(threshold=below)


def cett_rule(epsilon: float, out_norms: Tensor) -> NeuronRule:
    """CETT: inactive where ``‖n_i‖ ≤ ε``, as a threshold on ``|a_i|`` for each neuron."""
    return NeuronRule(threshold=neuron_thresholds(epsilon, out_norms), on="product")


def neuron_thresholds(epsilon: float, out_norms: Tensor) -> Tensor:
    """``θ_i = ε / ‖W_out[:, i]‖``, float32 ``[D]``; neurons that write nothing get the largest float (0 at ε = 0).

    >>> neuron_thresholds(1.0, torch.tensor([2.0, 0.5])).tolist()
    [0.5, 2.0]
    """
    return (epsilon / out_norms.float()).nan_to_num(nan=0.0, posinf=torch.finfo(torch.float32).max)


# -- CETT -------------------------------------------------------------------------------------------------------------


def contributions(product: Tensor, out_norms: Tensor) -> Tensor:
    """``‖n_i‖`` of every token and neuron: ``a [T, D]``, ``‖W_out[:, i]‖ [D]`` → ``[T, D]``."""
    return product.abs() * out_norms


def token_errors(product: Tensor, dropped: Tensor, down: Tensor) -> Tensor:
    """``‖Σ_{i∈D} n_i‖`` for every token ``[T]``; `dropped` is D as a bool ``[T, D]``, `down` W_out by neuron ``[D, d]``."""
    errors: Tensor = torch.linalg.vector_norm(torch.where(dropped, product, 0) @ down, dim=-1)
    return errors


def cett(product: Tensor, dropped: Tensor, down: Tensor, whole: Tensor | None = None) -> float:
    """Mean over tokens of ``‖Σ_{i∈D} n_i‖ / ‖FFN(x)‖``; a mean of ratios, not a ratio of sums.

    Tokens whose output is zero have no relative error and don't count.

    Args:
        whole: ``‖FFN(x)‖ [T]``, where it is known.
    """
    whole = token_errors(product, torch.ones_like(dropped), down) if whole is None else whole
    counted = whole > 0
    ratios = (token_errors(product, dropped, down) / whole)[counted]
    return float(ratios.double().mean()) if len(ratios) else 0.0


class LayerSearch:
    """One layer's activations of a dense run, and its CETT at thresholds that were asked for.

    Args:
        product: a, ``[T, D]``.
        down: W_out by neuron, ``[D, d]``.
        count: how many candidates ε may be, evenly spaced from the least ‖n‖ to its 0.99-quantile.

    Each evaluation is one product ``[T, D] × [D, d]``. What was found for one target narrows the search for the next. The
    error being monotone, the index is the one that bisection over all candidates ends at; only the way there is shorter.

    Raises:
        CalibrationError: activations or weights are not finite.
        InputError: fewer than two candidates.
    """

    def __init__(self, product: Tensor, down: Tensor, count: int = 65_536) -> None:
        if count < 2:
            raise InputError(f"a search needs at least two candidates, got {count}")
        self.product, self.down = product.float(), down.float()
        self.out_norms = torch.linalg.vector_norm(self.down, dim=-1)
        norms = contributions(self.product, self.out_norms)
        if not bool(torch.isfinite(norms).all()):
            raise CalibrationError("contributions of neurons are not finite: check the model's weights and the text")
        self.whole = torch.linalg.vector_norm(self.product @ self.down, dim=-1)
        flat = norms.flatten()
        sample = flat[:: max(1, len(flat) // QUANTILE_SAMPLE)]
        self.candidates = torch.linspace(float(flat.min()), float(sample.quantile(QUANTILE)), count).tolist()
        self.known: dict[int, float] = {}

    def dropped(self, epsilon: float) -> Tensor:
        """D at a threshold, bool ``[T, D]``; the very mask of the rule that later runs."""
        return ~cett_rule(epsilon, self.out_norms).mask(self.product)

    def cett_at(self, index: int) -> float:
        """CETT at a candidate; remembered."""
        if index not in self.known:
            dropped = self.dropped(self.candidates[index])
            self.known[index] = cett(self.product, dropped, self.down, self.whole)
        return self.known[index]

    def find(self, target: float) -> int:
        """Index of the candidate just below the crossing: its CETT is ``≤ target`` and the next one's is above.

        -1 where already the first candidate errs more: no threshold. (The released code would read the last, largest
        candidate there.) The last index where even that one errs less.
        """
        order = sorted(self.known)
        place = bisect.bisect_right(order, target, key=lambda i: self.known[i])
        low = order[place - 1] if place else -1
        high = order[place] if place < len(order) else len(self.candidates)
        # Error over the target at both ends; no threshold errs by 0, and beyond the last candidate at most by 1.
        below = self.known.get(low, 0.0) - target
        above = max(self.known.get(high, 1.0) - target, 1e-9)
        side = step = 0
        while high - low > 1:
            # False position (Illinois), since the error is smooth; each third step halves, so that it always ends soon.
            middle = (low + high) // 2 if step % 3 == 2 else low + round((high - low) * below / (below - above))
            middle = min(max(middle, low + 1), high - 1)
            error = self.cett_at(middle) - target
            if error > 0:
                high, above = middle, error
                below = below / 2 if side > 0 else below
            else:
                low, below = middle, error
                above = above / 2 if side < 0 else above
            side, step = (1 if error > 0 else -1), step + 1
        return low

    def epsilon(self, index: int) -> float:
        """ε_l of what `find` returned; 0 for -1."""
        return self.candidates[index] if index >= 0 else 0.0


# -- the dense run ----------------------------------------------------------------------------------------------------


class Recording:
    """What one dense run showed of all MLPs: searches by layer and the gates' magnitudes.

    Args:
        model: a transformers causal language model in eval mode.
        rows: token rows without padding.
        candidates: of each layer's search.

    Memory: layers × tokens × D floats, 0.4 GB for SmolLM2-135M at 2048 tokens.

    Raises:
        ModelError: it has no MLPs that are known.
        CalibrationError: the model trains, or activations are not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: Sequence[Tensor],
        candidates: int = 65_536,
        progress: Progress = no_progress,
    ) -> None:
        self.views: list[MLPView] = mlp_views(model)
        products: list[list[Tensor]] = [[] for _ in self.views]
        self.gates = MagnitudeSketch()
        self.nonzero = torch.zeros(len(self.views), dtype=torch.int64)
        self.tokens = sum(len(row) for row in rows)

        def gate(layer: int, values: Tensor) -> None:
            self.gates.add(values)
            self.nonzero[layer] += (values != 0).sum().cpu()

        def product(layer: int, values: Tensor) -> None:
            products[layer].append(values.detach().float())

        for index, row in enumerate(rows):
            progress("reading the dense model", index, len(rows))
            watch(model, row[None], {"mlp.gate": gate, "mlp.product": product})
        self.layers: list[LayerSearch] = []
        for layer, view in enumerate(self.views):
            if not products[layer]:
                raise CalibrationError(f"MLP {layer} ({view.name}) was never reached")
            down = by_input(view.down)
            self.layers.append(LayerSearch(torch.cat(products[layer]), down, candidates))
            products[layer].clear()

    def indices(self, target: float) -> tuple[int, ...]:
        """For each layer the candidate below the crossing of this CETT; all searched on dense activations."""
        return tuple(layer.find(target) if target > 0 else -1 for layer in self.layers)

    def epsilons(self, indices: Sequence[int]) -> list[float]:
        """ε_l of `indices`."""
        return [layer.epsilon(i) for layer, i in zip(self.layers, indices, strict=True)]

    def rules(self, epsilons: Sequence[float]) -> list[NeuronRule]:
        """The rules that hold these thresholds."""
        return [cett_rule(e, layer.out_norms) for e, layer in zip(epsilons, self.layers, strict=True)]

    def activation_ratio(self, epsilons: Sequence[float]) -> Tensor:
        """Share of neurons kept, ``[layers, tokens]``, on the dense activations."""
        kept = [1 - layer.dropped(e).float().mean(-1) for e, layer in zip(epsilons, self.layers, strict=True)]
        return torch.stack(kept).cpu()
