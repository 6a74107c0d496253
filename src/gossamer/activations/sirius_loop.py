"""One generation of Sirius: draft with the sparse model, check with the full one, repair text and cache, go on.

Between two periods the cache holds every known token but the last, whose row the next pass writes. A period's window is
that token, which the full model chose, and P − 1 drafted ones; the last of these was never run, so the check adds its row and
writes over the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.generation.utils import GenerateDecoderOnlyOutput

from gossamer.activations import sirius_verify as verify
from gossamer.activations.griffin import ContextualNeurons
from gossamer.errors import InputError, ModelError
from gossamer.hf.attention import AttentionRuntime, attached_runtime
from gossamer.hf.cache import KVLayer, adopt

if TYPE_CHECKING:
    from gossamer.activations.sirius import Sirius


@dataclass
class Counters:
    """What a generation did.

    Attributes:
        n_sparse, n_full: passes of the sparse and of the full model after the prompt.
        advances: tokens that each period kept, its new one included.
    """

    n_sparse: int = 0
    n_full: int = 0
    advances: list[int] = field(default_factory=list)

    def aal(self) -> float:
        """Average advance length; NaN before the first period."""
        return sum(self.advances) / len(self.advances) if self.advances else float("nan")

    def effective_density(self, density: float) -> float:
        """Of the periods so far; NaN before the first."""
        if not self.advances:
            return float("nan")
        return verify.effective_density(self.n_sparse, self.n_full, sum(self.advances), density)

    def add(self, other: Counters) -> None:
        """Take another generation in."""
        self.n_sparse += other.n_sparse
        self.n_full += other.n_full
        self.advances += other.advances


@dataclass
class SiriusOutput(GenerateDecoderOnlyOutput):  # type: ignore[misc]
    """What transformers returns, and what the loop counted.

    Attributes:
        n_sparse, n_full: passes of the sparse and of the full model after the prompt.
        advances: int64 ``[periods]``, tokens that each kept.
        aal: average advance length, at most the period.
        density: weights that a sparse pass reads, of all.
        effective_density: weights read per token, of the full model's; above 1 the loop reads more than plain decoding.
    """

    n_sparse: int | None = None
    n_full: int | None = None
    advances: Tensor | None = None
    aal: float | None = None
    density: float | None = None
    effective_density: float | None = None


@contextmanager
def exact_attention(runtime: AttentionRuntime | None, tokens: int) -> Iterator[None]:
    """Inside, a pass over so many tokens attends densely, whatever methods are attached (they still see its rows)."""
    if runtime is None:
        yield
        return
    before = runtime.decode, runtime.prefill
    runtime.prefill = None
    if tokens == 1:  # a block is dense without this, and the policy of single queries sees it
        runtime.decode = None
    try:
        yield
    finally:
        runtime.decode, runtime.prefill = before


class SiriusLoop:
    """The state of one generation at batch 1; everything that a period needs is allocated here, once.

    Args:
        model: with the policy attached.
        policy: its neurons.
        method: the settings.
        ids: int64 ``[1, prompt]``.
        total: tokens that the sequence may have.
        cache: what transformers prepared; may hold a beginning of `ids`.
        process: (ids ``[1, n]``, logits ``[1, vocabulary]``) to scores, before a token is chosen; None: as they are.
        ends: int64 ids that a tree does not propose.

    Raises:
        InputError: the cache holds all of the prompt, or can't take rows back.
        ModelError: a tree on a model whose attention takes no mask, or sees only windows.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: ContextualNeurons,
        method: Sirius,
        ids: Tensor,
        total: int,
        cache: Any,
        process: Any = None,
        ends: Tensor | None = None,
    ) -> None:
        self.model: Any = model
        self.policy, self.method, self.process, self.ends = policy, method, process, ends
        self.runtime, self.counters = attached_runtime(model), Counters()
        if self.runtime is not None and (self.runtime.cache is not None or self.runtime.storage is not None):
            raise InputError(
                "sirius goes back in the cache and rewrites it exactly: use it without methods that drop or quantise its rows"
            )
        self.width = method.tree_width
        self.slots = 1 + (method.period - 1) * self.width
        places = self.runtime.decode.places if self.runtime is not None and self.runtime.decode is not None else None
        layers = model.config.get_text_config(decoder=True).num_hidden_layers  # type: ignore[union-attr, operator]
        self.cache = adopt(cache, places, [lambda layer: KVLayer() if layer is None else layer] * layers)
        for layer in self.cache.layers:
            layer.reserve = max(layer.reserve, total + self.slots)
        self.n = ids.shape[1]
        self.total = total
        device = ids.device
        self.ids = ids.new_zeros(1, total + self.slots)
        self.ids[:, : self.n] = ids
        self.positions = torch.arange(total + self.slots, device=device)[None]
        if self.width > 1:
            self._prepare_tree(device)

    # -- passes -------------------------------------------------------------------------------------------------------

    def _pass(self, ids: Tensor, positions: Tensor, last: int, mask: Tensor | None = None) -> Tensor:
        """Logits ``[last or all, vocabulary]`` of a pass over ids ``[1, new]``, whose rows join the cache."""
        out = self.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=last,
        )
        logits: Tensor = out.logits[0]
        return logits

    def _sparse(self, ids: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
        self.policy.enter("sparse")
        self.counters.n_sparse += 1
        return self._pass(ids, positions, ids.shape[1], mask)

    def _full(self, ids: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
        self.policy.enter("full")
        self.counters.n_full += 1
        with exact_attention(self.runtime, ids.shape[1]):
            return self._pass(ids, positions, 0, mask)

    def _choose(self, logits: Tensor, known: int) -> Tensor:
        """The greedy token after the first `known`, of logits ``[vocabulary]``."""
        if self.process is not None:
            logits = self.process(self.ids[:, :known], logits[None].float())[0]
        return logits.argmax(-1)

    def _crop(self, rows: int) -> None:
        for layer in self.cache.layers:
            if layer.length > rows:
                layer.crop(rows - layer.length)

    # -- the loop -----------------------------------------------------------------------------------------------------

    def prefill(self, chunk: int | None = None) -> None:
        """Read the prompt densely, in chunks where asked for, and choose the first token."""
        start, logits = self.cache.get_seq_length(), None
        if start >= self.n:
            raise InputError(
                f"the cache holds {start} tokens already: give the whole sequence and at least one new token"
            )
        self.policy.enter("prompt")
        while start < self.n:
            stop = min(self.n, start + (chunk or self.n))
            # A sparse prefill may read the prompt; a policy of single queries may not.
            with exact_attention(self.runtime if stop - start == 1 else None, 1):
                logits = self._pass(self.ids[:, start:stop], self.positions[:, start:stop], 1)
            start = stop
        assert logits is not None
        if not bool(torch.isfinite(logits).all()):
            raise ModelError("the model's logits are not finite: check its weights")
        self.ids[0, self.n] = self._choose(logits[-1], self.n)
        self.n += 1

    def period(self) -> None:
        """Draft, check, and keep what holds; the window is shorter where the sequence may not grow by P tokens."""
        window, before = min(self.method.period, self.total - self.n), self.n
        if self.width > 1:
            self._tree_period(window)
        else:
            self._chain_period(window)
        self.counters.advances.append(self.n - before)

    def truncate(self, tokens: int) -> None:
        """Forget the tokens after the first `tokens`, and their rows."""
        self.n = tokens
        self._crop(tokens - 1)

    def _chain_period(self, window: int) -> None:
        first = self.n - 1  # the window's first position
        for at in range(first, first + window - 1):
            logits = self._sparse(self.ids[:, at : at + 1], self.positions[:, at : at + 1])
            self.ids[0, at + 1] = self._choose(logits[-1], at + 1)
        kept, logits = self._check(first, window, 0)
        if kept < window - 1 and self.method.second_chance:
            # The full model's token takes the place of the refused one; what follows is judged anew.
            self.ids[0, first + kept + 1] = self._choose(logits[-1], first + kept + 1)
            kept, logits = self._check(first, window, kept + 1)
        self._crop(first + kept + 1)
        self.ids[0, first + kept + 1] = self._choose(logits[-1], first + kept + 1)
        self.n = first + kept + 2

    def _check(self, first: int, window: int, start: int) -> tuple[int, Tensor]:
        """Run the window from `start` on. Returns how many drafted tokens hold, and logits that end with the last of them."""
        self._crop(first + start)
        here = slice(first + start, first + window)
        logits = self._full(self.ids[:, here], self.positions[:, here])
        drafted = self.ids[0, first + start + 1 : first + window]
        good = verify.leading(self._acceptable(logits[:-1], drafted).tolist())
        return start + good, logits[: good + 1]

    def _acceptable(self, logits: Tensor, tokens: Tensor) -> Tensor:
        return verify.acceptable(logits, tokens, self.method.accept, self.method.thr, self.method.temperature)

    # -- trees --------------------------------------------------------------------------------------------------------

    def _prepare_tree(self, device: torch.device) -> None:
        config = self.model.config.get_text_config(decoder=True)
        if config._attn_implementation not in ("eager", "sdpa", "gossamer"):
            raise ModelError(f"a tree needs a mask, which {config._attn_implementation} attention does not take")
        if any("sliding" in kind or "chunked" in kind for kind in getattr(config, "layer_types", None) or ()) or (
            getattr(config, "layer_types", None) is None and getattr(config, "sliding_window", None)
        ):
            raise ModelError("a tree needs layers that see everything, and this model has windows: use tree_width=1")
        dtype = next(self.model.parameters()).dtype
        rows = self.ids.shape[1]
        self.mask = torch.zeros(1, 1, self.slots, rows, dtype=dtype, device=device)
        self.hidden = torch.finfo(dtype).min
        self.nodes = torch.zeros(1, self.slots, dtype=torch.long, device=device)
        self.depths = torch.zeros(1, self.slots, dtype=torch.long, device=device)
        self.parents = torch.full((self.slots,), -1, dtype=torch.long, device=device)
        levels = torch.arange(self.method.period - 1, device=device).repeat_interleave(self.width)
        self.levels = torch.cat([levels.new_zeros(1), levels + 1])[None]

    def _tree_period(self, window: int) -> None:
        first, width, mask = self.n - 1, self.width, self.mask
        slots = 1 + (window - 1) * width
        # Rows before the window are seen by all; those of the tree, by the nodes below them.
        mask[..., :first] = 0
        mask[..., first : first + slots] = self.hidden
        mask[0, 0, 0, first] = 0
        self.nodes[0, 0] = self.ids[0, first]
        torch.add(self.levels, first, out=self.depths)
        scores = torch.zeros(1, device=mask.device)
        low, high = 0, 1
        for _ in range(window - 1):
            logits = self._sparse(
                self.nodes[:, low:high], self.depths[:, low:high], mask[:, :, low:high, : first + high]
            )
            beams, tokens, scores = verify.grow(
                logits, scores, width, self.method.temperature, self.ends, self.method.prune
            )
            parents = low + beams
            low, high = high, high + width
            self.nodes[0, low:high], self.parents[low:high] = tokens, parents
            mask[0, 0, low:high, first : first + low] = mask[0, 0, parents, first : first + low]
            mask[0, 0, low:high, first + low : first + high].fill_diagonal_(0)
        self._crop(first)
        logits = self._full(self.nodes[:, :slots], self.depths[:, :slots], mask[:, :, :slots, : first + slots])
        parents, good = self.parents[:slots], torch.ones(slots, dtype=torch.bool, device=mask.device)
        if slots > 1:
            good[1:] = self._acceptable(logits[parents[1:]], self.nodes[0, 1:slots])
        path = verify.longest_accepted(verify.leaf_paths(parents.tolist(), width), good.tolist())
        kept = torch.tensor(path)
        for layer in self.cache.layers:
            layer.accept(first, kept)
        end = first + len(path)
        self.ids[0, first:end] = self.nodes[0, kept.to(mask.device)]
        self.ids[0, end] = self._choose(logits[path[-1]], end)
        self.n = end + 1
