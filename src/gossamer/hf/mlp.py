"""The MLP plug point: a model whose tokens compute only chosen neurons."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from gossamer.errors import InputError, ModelError
from gossamer.hf.channels import ChannelForward, Meter, Mode, gathers, is_decoding, lay_by_input
from gossamer.hf.mlp_views import MLPView, mlp_views
from gossamer.ops import NeuronWeights, sparse_mlp
from gossamer.ops.sparse_mlp import run_native
from gossamer.patterns import NeuronRule


class NeuronPolicy:
    """Which neurons each MLP computes. `rule` says it; all state belongs to the object.

    Attributes:
        prompt: whether the rule also holds while a prompt is read (blocks of several tokens).
        watches: whether `observe` wants the hidden values of blocks that are read densely.
    """

    prompt = True
    watches = False

    def rule(self, layer: int) -> NeuronRule | None:
        """What is kept in MLP number `layer` now; None computes it densely."""
        raise NotImplementedError

    def observe(self, layer: int, gate: Tensor, product: Tensor) -> None:
        """See what a dense block computed: ``[..., D]`` each. Called where `watches` is true."""

    def report(self) -> dict[str, Any]:
        """Facts of the run, added to the handle's report."""
        return {}


class FixedRules(NeuronPolicy):
    """One rule for each MLP, the same for all tokens."""

    def __init__(self, rules: Iterable[NeuronRule | None], prompt: bool = True) -> None:
        self.rules, self.prompt = list(rules), prompt

    def rule(self, layer: int) -> NeuronRule | None:
        """The layer's rule."""
        return self.rules[layer]


class _GatedForward:
    """Stands in for the `forward` of a gated MLP."""

    def __init__(self, view: MLPView, run: MLPRuntime, meter: Meter) -> None:
        self.view, self.run, self.meter = view, run, meter
        self.matrices = (view.gate, view.up, view.down)
        self.rule: NeuronRule | None = None
        self.down = ChannelForward(view.down, lambda _: self.rule, meter, run.mode)
        self.weights: NeuronWeights | None = None
        self.addresses: tuple[int, ...] = ()
        self.checked: NeuronRule | None = None

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        view, run = self.view, self.run
        rule = run.rule_for(view.index, x)
        if rule is None and not run.policy.watches:
            module = cast(Any, view.owner)
            return cast(Tensor, type(module).forward(module, x, *args, **kwargs))
        if rule is not None:
            if rule is not self.checked:
                rule.check(view.neurons, x.device)
                self.checked = rule
            decoding = is_decoding(x)
            if rule.on == "gate" and run.mode != "mask" and (out := self._gather(x, rule, decoding)) is not None:
                return out
        gate, product = view.hidden(x)
        if rule is None:
            run.policy.observe(view.index, gate, product)
        elif rule.on == "product" and view.parts[2] != "wo" and product.dtype is cast(Any, view.down).weight.dtype:
            self.rule = rule  # T5 has dropout before its `wo`, and may cast
            return self.down(product)
        else:
            kept = rule.mask(gate if rule.on == "gate" else product)
            self.meter.count_mask(decoding, kept)
            product = torch.where(kept, product, 0)
        return view.out(product)

    def _gather(self, x: Tensor, rule: NeuronRule, decoding: bool) -> Tensor | None:
        """The kernel's result, or None where none serves these rows."""
        flat = x.reshape(-1, x.shape[-1])
        if rule.shared and len(flat) > 1:
            return None  # the kernel chooses for each row by itself
        parameters = [cast(Tensor, matrix._parameters["weight"]) for matrix in self.matrices]
        if torch.compiler.is_compiling() or not gathers(flat, parameters[0]):
            return None  # compiled: masked, since what was kept is counted outside of tensors
        # Weights may be moved, trained or replaced while this is attached.
        addresses = tuple(p.data_ptr() for p in parameters)
        if addresses != self.addresses:
            weights = self.view.weights()
            self.weights = weights.quantized() if weights is not None and self.run.int8 else weights
            self.addresses = addresses
        weights = self.weights
        if weights is None or weights.gate.dtype not in (x.dtype, torch.int8):
            return None
        counts = self.meter.scratch(len(flat))
        call = run_native if flat.is_cpu else sparse_mlp
        out = call(flat.contiguous(), weights, rule.threshold, rule.count, rule.indices, counts)
        self.meter.count(decoding, counts)
        return out.view(x.shape)


class MLPRuntime:
    """Runs a model's MLPs under a policy until `detach`, which leaves every bit as it was.

    Args:
        model: a transformers model.
        policy: says which neurons are computed.
        mode: `mask` computes all and zeroes (any device, gradients, training); `gather` reads only what is kept, in decode
            steps of at most eight rows, and lays the down matrices out by neuron while attached (a copy for a moment,
            no more memory after); `auto` gathers where a kernel serves.
        int8: decode steps read a copy of the weights in 8 bits.

    Raises:
        ModelError: no MLP was found, or one is already under a policy.
        InputError: `int8` with a mode that never reads it.
    """

    def __init__(self, model: nn.Module, policy: NeuronPolicy, mode: Mode = "auto", int8: bool = False) -> None:
        if int8 and mode == "mask":
            raise InputError("int8 weights are for decode steps that gather; mode='mask' never reads them")
        self.views, self.policy, self.mode, self.int8 = mlp_views(model), policy, mode, int8
        self.meters = [Meter(v.neurons, cast(Tensor, v.down.weight).device) for v in self.views]
        self._undo: list[Callable[[], None]] = []
        targets = [view.owner if view.gated else view.down for view in self.views]
        if any("forward" in target.__dict__ for target in targets):
            raise ModelError("the MLPs of this model are already under a policy: detach it first")
        try:
            for view, meter, target in zip(self.views, self.meters, targets, strict=True):
                if mode != "mask":
                    self._undo.append(lay_by_input(view.down))
                forward = _GatedForward(view, self, meter) if view.gated else self._plain(view, meter)
                cast(Any, target).forward = forward
                self._undo.append(functools.partial(target.__dict__.pop, "forward", None))
        except BaseException:
            self.detach()
            raise

    def _plain(self, view: MLPView, meter: Meter) -> ChannelForward:
        def decide(a: Tensor) -> NeuronRule | None:
            rule = self.rule_for(view.index, a)
            if rule is None and self.policy.watches:
                self.policy.observe(view.index, a, a)
            return rule

        return ChannelForward(view.down, decide, meter, self.mode)

    def rule_for(self, layer: int, x: Tensor) -> NeuronRule | None:
        """The policy's rule for this call."""
        return self.policy.rule(layer) if self.policy.prompt or is_decoding(x) else None

    def detach(self) -> None:
        """Take the policy off; safe to call twice."""
        while self._undo:
            self._undo.pop()()

    def report(self) -> dict[str, Any]:
        """Shares of neurons kept, in all and by layer, and bytes of MLP weights that a decode step reads."""
        shares = [m.share(True) if m.share(True) is not None else m.share(False) for m in self.meters]
        known = [s for s in shares if s is not None]
        read, dense = 0.0, 0
        for view, meter in zip(self.views, self.meters, strict=True):
            size = view.neurons * view.channels * (1 if self.int8 else cast(Tensor, view.down.weight).element_size())
            skipped = _skipped(view, self.policy.rule(view.index)) if known else 0
            matrices = 3 if view.gated else 2
            read += size * (matrices - skipped * (1 - meter.read_share()))
            dense += size * matrices
        return {
            "neurons_kept": sum(known) / len(known) if known else 1.0,
            "neurons_kept_by_layer": shares,
            "mlp_bytes_read": round(read),
            "mlp_bytes_dense": dense,
            **self.policy.report(),
        }


def _skipped(view: MLPView, rule: NeuronRule | None) -> int:
    """Matrices of an MLP whose rows or columns of dropped neurons are not read."""
    if rule is None:
        return 0
    if not view.gated or rule.on == "product":
        return 1  # down
    return 2 if rule.indices is None else 3  # up and down; with a fixed list the gate too
