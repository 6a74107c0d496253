"""PAT (Liu et al., 2025): learn which hidden channels the whole network can do without while it is fine-tuned.

RMSNorm keeps a zero channel zero, so a channel that nothing writes to is nowhere in the residual stream. Behind the embedding
and behind each attention and MLP output stands a hybrid sparsification module (HSM), all with one mask M ``[d]``:

    z = g ⊙ M ⊙ (x + x L0ᵀ L1ᵀ)                         code;  paper: z = M ⊙ (x + x L0ᵀ diag(v) L1ᵀ), no g
    M = 1 / (1 + exp(min(−τ m, 10))) + β                 τ(s) rises to hundreds, β(s) = max(0.5 − s/s0, 0)
    loss = task + count of M against N + L0 L0ᵀ against 1

The low-rank part moves what is in doomed channels into others before they are dropped. M is 1 at the first step and 0 or 1
at the end. LoRA tunes the rest. `gossamer.hf.cut_hidden` folds all of it into a plain model of hidden size |{M = 1}|.

Decisions: the default variant is the released code's. Its losses are summed as the card asks, over all HSMs (the release
drops all but three by mistake), and the scale g is folded at the merge (the release forgets it). v starts at one, which
the paper doesn't say. From 0.8·s0 on τ stays and the task no longer moves m, as in the code; the paper's τ goes on to 10⁶.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from gossamer.errors import InputError, ModelError
from gossamer.hf import cut_hidden, writers
from gossamer.models.lora import Adapters, LoRA

Variant = Literal["code", "paper"]
Gate = Literal["unified", "fixed"]

#: Share of the milestone at which temperature and task gradient of the mask stop.
HOLD = 0.8
_ALPHA = 2.77


def temperature(step: float, milestone: int) -> float:
    """τ: about 1 at first, rising without bound towards the milestone s0, 10⁶ from there.

    >>> round(temperature(0, 100), 4), round(temperature(10, 100), 4), temperature(100, 100)
    (1.0, 2.0, 1000000.0)
    """
    if step >= milestone:
        return 1e6
    return 1 / (1 - math.log(max(1.0, step)) / math.log(milestone) + 1e-6)


def offset(step: float, milestone: int) -> float:
    """β: from 0.5 to 0 at half of the milestone.

    >>> offset(0, 100), offset(25, 100), offset(50, 100)
    (0.5, 0.25, 0.0)
    """
    return max(0.5 - step / milestone, 0.0)


def soft_mask(proxy: Tensor, step: int, milestone: int, variant: Variant = "code") -> Tensor:
    """M of a training step from the proxies m ``[d]``; from 0.8 of the milestone on without gradient (code).

    >>> soft_mask(torch.zeros(2), 0, 100).tolist()
    [1.0, 1.0]
    """
    held = variant == "code" and step >= HOLD * milestone
    tau = temperature(HOLD * milestone if held else step, milestone)
    m = proxy.detach() if held else proxy
    return 1 / (1 + (-tau * m).clamp(max=10).exp()) + offset(step, milestone)


def hard_mask(proxy: Tensor) -> Tensor:
    """M at inference: 1 where m > 0 (0 counts as pruned), float ``[d]``.

    >>> hard_mask(torch.tensor([0.3, 0.0, -0.2])).tolist()
    [1.0, 0.0, 0.0]
    """
    return (1 / (1 + (-1e6 * proxy.detach()).clamp(max=10).exp())).round()


def fixed_mask(width: int, keep: int, step: int, milestone: int) -> Tensor:
    """The ablation: channels from `keep` on fade out on a schedule, whatever they do. Float ``[width]``.

    >>> [round(float(fixed_mask(2, 1, s, 100)[1]), 4) for s in (0, 100, 200)]
    [1.0, 0.0627, 0.0002]
    """
    early, late = min(step, milestone) / milestone, max(step - milestone, 0) / milestone
    mask = torch.ones(width)
    mask[keep:] = math.exp(-_ALPHA * early - 2 * _ALPHA * late)
    return mask


def count_error(proxy: Tensor, keep: int, variant: Variant = "code") -> Tensor:
    """How far the number of open channels is from N: 10·|Σ 1[m ≥ 0] − N| / N (code), |Σ 1[m > 0] − N| (paper).

    The indicator's gradient is 1, so that every proxy is pushed alike, by ±10/N or ±1.

    >>> float(count_error(torch.tensor([1.0, 1.0, -1.0]), 1))
    10.0
    """
    open_ = proxy >= 0 if variant == "code" else proxy > 0
    through = open_.to(proxy.dtype) + proxy - proxy.detach()
    error = (through.sum() - keep).abs()
    return 10 * error / keep if variant == "code" else error


def active_loss(proxy: Tensor, keep: int, variant: Variant = "code") -> Tensor:
    """L_active: `count_error`, and in the code's variant the mean distances² of the proxies from ±0.5.

    >>> float(active_loss(torch.tensor([0.5, 0.5, -0.5]), 2))
    0.0
    """
    loss = count_error(proxy, keep, variant)
    if variant == "code":
        for part, centre in ((proxy[proxy > 0], 0.5), (proxy[proxy <= 0], -0.5)):
            if part.numel():  # the mean of nothing is not a number
                loss = loss + (part - centre).square().mean()
    return loss


def identity_loss(first: Tensor, second: Tensor, variant: Variant = "code") -> Tensor:
    """How far the rows of L0 ``[r, d]`` (paper: and the columns of L1 ``[d, r]``) are from orthonormal.

    Code: mean over the entries of (L0 L0ᵀ − 1)². Paper: ‖L0 L0ᵀ − 1‖ + ‖L1ᵀ L1 − 1‖ (Frobenius).

    >>> float(identity_loss(torch.eye(2, 4), torch.zeros(4, 2)))
    0.0
    """
    one = torch.eye(len(first), dtype=first.dtype, device=first.device)
    gap: Tensor = first @ first.T - one
    if variant == "code":
        return gap.square().mean()
    loss: Tensor = torch.linalg.matrix_norm(gap) + torch.linalg.matrix_norm(second.T @ second - one)
    return loss


class HSM(nn.Module):
    """One hybrid sparsification module without its mask, float32: the identity at first.

    Args:
        width: d.
        rank: r_h, of the low-rank part.
        variant: with a scale g behind (code) or v between the factors (paper).
        generator: of L0 (Kaiming uniform).
    """

    def __init__(self, width: int, rank: int, variant: Variant, generator: torch.Generator) -> None:
        super().__init__()
        bound = 1 / math.sqrt(width)  # Kaiming uniform with a = √5
        self.first = nn.Parameter(torch.rand(rank, width, generator=generator) * 2 * bound - bound)
        self.second = nn.Parameter(torch.zeros(width, rank))
        self.scale = nn.Parameter(torch.ones(width if variant == "code" else rank))
        self.variant = variant

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """``[…, d]`` to the same shape and dtype; computed in float32 (or wider)."""
        wide = x.to(torch.promote_types(x.dtype, self.first.dtype))
        first, second, scale = (p.to(wide.dtype) for p in (self.first, self.second, self.scale))
        low = wide @ first.T
        if self.variant == "paper":
            return (mask * (wide + (low * scale) @ second.T)).to(x.dtype)
        return (scale * mask * (wide + low @ second.T)).to(x.dtype)

    def matrix(self) -> Tensor:
        """What it does to a column of activations without the mask: diag(g)·(1 + L1 L0), float64 ``[d, d]``."""
        first, second, scale = (p.detach().double() for p in (self.first, self.second, self.scale))
        one = torch.eye(len(second), dtype=torch.float64, device=second.device)
        if self.variant == "paper":
            return one + (second * scale) @ first
        return scale[:, None] * (one + second @ first)


class PATTuning(nn.Module):
    """HSMs, the shared mask and LoRA on a model: train `parameters()` on the task loss plus `loss()`, then `merge()`.

    The model's own parameters are frozen meanwhile. In train mode the soft gate of the current step is used, in eval mode the
    hard one. `detach` takes everything off and leaves the model bit for bit as it was.

    Args:
        model: an RMSNorm decoder of transformers.
        keep: N, as a share of the hidden size or a count.
        hsm_rank: r_h, as a share of the hidden size or a count.
        lora: adapters on all linear layers but the head and the HSMs; None: none.
        steps: of the whole training.
        milestone: s0 as a share of `steps`, or a step.
        variant: code or paper.
        gate: unified (learned), or fixed: the last channels fade out.
        seed: of L0.

    Raises:
        ModelError: the family is not supported, or weights that are not finite.
        InputError: settings out of range.

    >>> from gossamer.models import tiny_model
    >>> pat = PATTuning(tiny_model("llama"), keep=0.75, steps=90)
    >>> pat.keep, pat.milestone, len(pat.hsms), pat.mask(hard=False).detach().mean().item()
    (48, 30, 5, 1.0)
    >>> pat.detach()
    """

    def __init__(
        self,
        model: nn.Module,
        keep: float | int = 0.75,
        hsm_rank: float | int = 0.05,
        lora: LoRA | None = None,
        steps: int = 1000,
        milestone: float | int = 1 / 3,
        variant: Variant = "code",
        gate: Gate = "unified",
        seed: int = 0,
    ) -> None:
        super().__init__()
        places = writers(model)
        config: Any = model.config
        self.width: int = config.hidden_size
        self.keep = round(keep * self.width) if isinstance(keep, float) else keep
        rank = max(1, round(hsm_rank * self.width)) if isinstance(hsm_rank, float) else hsm_rank
        self.milestone = max(2, round(milestone * steps)) if isinstance(milestone, float) else milestone
        if not 0 < self.keep <= self.width or not 0 < rank <= self.width or self.milestone < 2 or steps < 1:
            raise InputError(
                f"PAT: channels to keep and HSM rank lie in 1 .. {self.width}, the milestone from 2; got {self.keep}, "
                f"{rank}, {self.milestone}"
            )
        for name, parameter in model.named_parameters():
            if not bool(parameter.isfinite().all()):
                raise ModelError(f"{name} is not finite: the model is damaged")
        self.variant, self.gate, self.now = variant, gate, 0
        generator = torch.Generator().manual_seed(seed)
        self.hsms = nn.ModuleList(HSM(self.width, rank, variant, generator) for _ in places)
        self.proxy = nn.Parameter(torch.zeros(self.width), requires_grad=gate == "unified")
        self.to(next(model.parameters()).device)
        # Neither the model nor the adapters are submodules: `parameters()` is what is trained.
        self._frozen = [(p, p.requires_grad) for p in model.parameters()]
        for parameter, _ in self._frozen:
            parameter.requires_grad_(False)
        adapters = lora.attach(model) if lora is not None else None
        self._model, self._adapters = (model,), [adapters] if adapters is not None else []
        self.low_rank = nn.ParameterList(adapters.parameters() if adapters is not None else ())
        self._hooks = [
            place.register_forward_hook(partial(self._behind, hsm))
            for place, hsm in zip(places, self._each(), strict=True)
        ]

    def _each(self) -> list[HSM]:
        return [cast(HSM, hsm) for hsm in self.hsms]

    def _behind(self, hsm: HSM, place: nn.Module, args: Any, out: Tensor) -> Tensor:
        return cast(Tensor, hsm(out, self.mask(hard=not place.training)))

    def step(self, now: int) -> None:
        """Say which step comes next: 0, 1, …; temperature and offset follow."""
        self.now = now

    def mask(self, hard: bool = True) -> Tensor:
        """M ``[d]``: at inference, or the gate of the current step."""
        if self.gate == "fixed":
            mask = fixed_mask(self.width, self.keep, 0 if hard else self.now, self.milestone).to(self.proxy.device)
            return torch.arange(self.width, device=mask.device).lt(self.keep).to(mask.dtype) if hard else mask
        return hard_mask(self.proxy) if hard else soft_mask(self.proxy, self.now, self.milestone, self.variant)

    def kept(self) -> Tensor:
        """Indices of the channels that a merge keeps."""
        return self.mask().nonzero()[:, 0]

    def loss(self) -> Tensor:
        """L_active once, and the sum of L_identity over all HSMs."""
        total: Tensor = torch.stack([identity_loss(h.first, h.second, self.variant) for h in self._each()]).sum()
        return total + active_loss(self.proxy, self.keep, self.variant) if self.gate == "unified" else total

    def detach(self) -> None:
        """Take everything off; the model is as it was, bit for bit. Safe to call twice."""
        self._release(lambda adapters: adapters.remove())

    def merge(self, progress: Callable[[str, int, int], None] = lambda what, done, total: None) -> nn.Module:
        """Fold adapters, HSMs and mask into a new plain model of hidden size k; the tuned model is left without them.

        Raises:
            InputError: no channel is open.
        """
        keep = self.kept()
        if not len(keep):
            raise InputError("PAT kept no channel: train for longer, or at a higher rate of learning")
        matrices = [hsm.matrix() for hsm in self._each()]
        self._release(lambda adapters: adapters.merge())
        return cast(nn.Module, cut_hidden(self._model[0], keep, matrices, progress))

    def _release(self, end: Callable[[Adapters], None]) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        while self._adapters:
            end(self._adapters.pop())
        while self._frozen:
            parameter, wanted = self._frozen.pop()
            parameter.requires_grad_(wanted)
