"""Healing a model for HiP: low-rank adapters trained with HiP's own attention (arXiv 2406.09827).

    choose keys by the tree search (no gradient)  →  softmax over the chosen keys (gradient)  →  next-token cross-entropy

Paper: LoRA of rank 256, AdamW at 1e-5, 500 steps of 32 sequences of 8192 tokens of the arXiv part of RedPajama. For a task,
fine-tune with dense attention first and heal then: trained directly through HiP, what was pruned gets no gradient. Where the
card is open: alpha is half the rank, and all projections of a Llama-like block get adapters; the learning rate is constant
after no warm-up (`HEALING`). Memory is that of dense attention with a mask per head; the search costs what it saves elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.attention.hip_attention import HipAttention, search
from gossamer.errors import InputError, ModelError
from gossamer.hf import AttentionRuntime, dense_attention
from gossamer.models import LoRA, Plan, Training, adapted, train

ADAPTERS = LoRA(
    rank=256,
    alpha=128,
    dropout=0.0,
    targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)
HEALING = Plan(steps=500, lr=1e-5, warmup=0, floor=1.0)


class SparseTraining(AttentionRuntime):
    """HiP's prefill on a model that trains: each layer attends to the keys that the search finds, with gradients through them.

    Use it as a context manager: leaving it takes HiP off. Run the model on whole sequences, without a cache.

    Raises:
        InputError: settings that only inference has (an ensemble, extended positions).

    >>> from gossamer.models import tiny_model
    >>> model = tiny_model("llama")
    >>> method = HipAttention(tokens=8, window=4, sink=2, block_q=8, dense_layers=())
    >>> with SparseTraining(model, method):
    ...     model(torch.arange(40)[None], use_cache=False).logits.sum().backward()
    >>> model.model.layers[0].self_attn.k_proj.weight.grad is not None
    True
    """

    def __init__(self, model: nn.Module, method: HipAttention) -> None:
        if method.ensemble > 1 or method.self_extend > 1:
            raise InputError("hip-attention: heal with one search and the model's own positions")
        self.method = method
        super().__init__(model)
        layers = self.shape.layers
        self.whole = {i % layers for i in method.dense_layers if -layers <= i < layers}

    def __enter__(self) -> SparseTraining:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        window: int | None,
        softcap: float | None,
        dropout: float,
    ) -> Tensor:
        """Sparse attention of one layer of a whole sequence."""
        starts, holes = (None, None) if mask is None else self._padding(mask)
        if holes is not None or softcap is not None:
            raise ModelError("hip-attention: healing needs plain causal attention, at most left-padded")
        new, length, m = query.shape[2], key.shape[2], self.method
        if new != length:
            raise InputError("hip-attention: heal on whole sequences: pass use_cache=False and no cache")
        nodes = m.nodes(length)
        local = bool(window and window < length)
        if module.layer_idx in self.whole or local or nodes * m.block_k + m.window + m.sink >= length:
            return dense_attention(query, key, value, scale, starts=starts, window=window, dropout=dropout)
        with torch.no_grad():
            index = search(
                query.detach(),
                key.detach(),
                budget=nodes * m.block_k,
                block_q=m.block_q,
                block_k=m.block_k,
                window=m.window,
                sink=m.sink,
                stride_q=m.stride_q,
                stride_k=m.stride_k,
                representative=m.representative,
                starts=starts,
                head_group=m.head_group,
            )
            keep = index.to_mask()
        group = query.shape[1] // key.shape[1]
        outs = [
            F.scaled_dot_product_attention(
                query[:, g::group], key, value, attn_mask=keep[:, g::group], dropout_p=dropout, scale=scale
            )
            for g in range(group)  # keys are not repeated
        ]
        return torch.stack(outs, 2).flatten(1, 2)


def heal(
    model: nn.Module,
    method: HipAttention,
    batches: Iterable[Tensor],
    plan: Plan = HEALING,
    lora: LoRA | None = ADAPTERS,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Training:
    """Train a causal language model in place for HiP's attention, on batches int64 ``[batch, tokens + 1]``.

    Args:
        plan: steps and learning rate; the batches must be as many.
        lora: adapters to train, merged at the end; None trains the whole model.

    Raises:
        InputError: settings that can't be trained with, fewer batches than steps, or a loss that is not finite. The model is
            then what it was, unless all of it was trained.
        ModelError: no layer has a name that `lora` targets.
    """
    with SparseTraining(model, method), adapted(model, lora) as trained:
        return train(model, batches, plan, parameters=trained, progress=progress)
