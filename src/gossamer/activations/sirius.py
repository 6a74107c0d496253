"""Sirius: contextual sparsity, corrected by the full model once every few tokens.

The sparse model (GRIFFIN's set of a prompt's neurons, or the largest gates of each token) drafts P − 1 tokens greedily. One pass
of the full model over the window writes the window's rows of the cache anew, keeps the drafted tokens up to the first whose
likelihood p = softmax(logits / 0.6) is below `thr`, and adds its own next token. So a period goes on by 1 to P tokens; the
text need not be the full model's own, only plausible to it. See `sirius_verify` for the formulas, `sirius_loop` for the loop.

Decisions where the paper or its code leaves room:

* Logits processors choose tokens (drafted and full), and are not part of the likelihood test; a tree takes none.
* The last window of a generation is as short as what may still be made, so that nothing is drafted to be thrown away.
* Stopping criteria (end token, stop strings, length, the user's) are asked after a check, for each new token in order, as if
  tokens had come one by one; so a drafted end token counts only when it has been accepted, and no look-back is too short.
* `prune`: a beam whose best proposal is likelier than that proposes only this one.
* A tree's correction is taken at the last accepted node of the chosen path, never at the refused one.
* Second chance: only the window from the replaced token on is run again; what lies before is unchanged. Chains only.
* Attention methods may be stacked: they serve drafts (and a sparse prefill its prompt), while checks attend densely. Methods
  that drop or quantise cache rows are refused, because a check must be able to rewrite them.
* Between generations, and in a plain `model.generate`, the attached model is the full one.

Not built: captured graphs for the three forwards, and offload of layers to the host with copies that overlap computing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import StoppingCriteriaList, StopStringCriteria

from gossamer.activations import sirius_verify as verify
from gossamer.activations.base import ActivationHandle
from gossamer.activations.griffin import ContextualMethod, ContextualNeurons
from gossamer.activations.sirius_loop import Counters, SiriusLoop, SiriusOutput
from gossamer.calibration import Calibration
from gossamer.errors import InputError
from gossamer.hf import mlp_views
from gossamer.registry import register


def density_of(model: nn.Module, keep: float, pattern: str) -> float:
    """Share of a model's weights that a sparse pass reads; tied embeddings count once."""
    views = mlp_views(model)
    total = sum(p.numel() for p in model.parameters())
    mlp = sum(
        weight.numel() for view in views for weight in {cast(Tensor, m.weight) for m in (view.gate, view.up, view.down)}
    )
    return verify.model_density(total, mlp, keep, pattern, 3 if views[0].gated else 2)


@dataclass(eq=False)
class SiriusHandle(ActivationHandle):
    """Sirius on a model.

    Attributes:
        density: share of all weights that a sparse pass reads.
        counters: of all generations so far.
    """

    model: nn.Module = field(kw_only=True)
    method: Sirius = field(kw_only=True)
    policy: ContextualNeurons = field(kw_only=True)
    density: float = field(kw_only=True)
    counters: Counters = field(default_factory=Counters, kw_only=True)

    def generate(self, ids: Tensor | None = None, max_new_tokens: int | None = None, **settings: Any) -> Any:
        """Continue one prompt, as the model's own `generate` does.

        Args:
            ids: int64 ``[1, prompt]``.
            max_new_tokens: and whatever else `generate` takes; `stop_strings` with `tokenizer`, a `streamer`, a cache.

        Returns:
            `SiriusOutput`; with ``return_dict_in_generate=False`` the ids ``[1, prompt + new]``.

        Raises:
            InputError: sampling, beams, more than one sequence, or anything that the loop can't give.
        """
        # transformers hands neither the streamer nor the tokenizer on to a loop that isn't its own.
        streamer, tokenizer = settings.get("streamer"), settings.pop("tokenizer", None)
        if strings := settings.pop("stop_strings", None):
            if tokenizer is None:
                raise InputError("stop_strings need the tokenizer: pass tokenizer=")
            chosen = [*(settings.pop("stopping_criteria", None) or []), StopStringCriteria(tokenizer, strings)]
            settings["stopping_criteria"] = StoppingCriteriaList(chosen)
        if max_new_tokens is not None:
            settings["max_new_tokens"] = max_new_tokens
        settings = {"return_dict_in_generate": True, "do_sample": False, **settings}
        if ids is not None:
            settings["input_ids"] = ids
        model: Any = self.model

        def loop(*args: Any, **kwargs: Any) -> Any:
            return self.custom_generate(*args, **{**kwargs, "streamer": streamer})

        return model.generate(custom_generate=loop, **settings)

    def custom_generate(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        synced_gpus: bool = False,
        streamer: Any = None,
        **inputs: Any,
    ) -> Any:
        """The loop as ``model.generate(…, custom_generate=handle.custom_generate)`` calls it.

        transformers passes no streamer here; `generate` does.
        """
        config = generation_config
        self._refuse(model, input_ids, config, logits_processor, inputs)
        ends = getattr(config, "_eos_token_tensor", None)
        loop = SiriusLoop(
            model,
            self.policy,
            self.method,
            input_ids.to(model.device),
            int(config.max_length),
            inputs["past_key_values"],
            logits_processor if logits_processor else None,
            ends,
        )
        try:
            loop.prefill(config.prefill_chunk_size)
            told = loop.n - 1
            while True:
                stop = self._first_stop(stopping_criteria, loop.ids, told, loop.n)
                if stop is not None:
                    loop.truncate(stop)
                if streamer is not None:
                    streamer.put(loop.ids[0, told : loop.n].cpu())
                if stop is not None or loop.n >= loop.total:
                    break
                told = loop.n
                loop.period()
        finally:
            self.policy.enter("full")
            self.counters.add(loop.counters)
        if streamer is not None:
            streamer.end()
        sequences = loop.ids[:, : loop.n].clone()
        if not config.return_dict_in_generate:
            return sequences
        counters = loop.counters
        return SiriusOutput(
            sequences=cast(Any, sequences),
            past_key_values=loop.cache,
            n_sparse=counters.n_sparse,
            n_full=counters.n_full,
            advances=torch.tensor(counters.advances, dtype=torch.long),
            aal=counters.aal(),
            density=self.density,
            effective_density=counters.effective_density(self.density),
        )

    def _refuse(self, model: Any, ids: Tensor, config: Any, processors: Any, inputs: dict[str, Any]) -> None:
        if model is not self.model or not self.undo:
            raise InputError("this sirius is not attached to that model")
        if config.do_sample or (config.num_beams or 1) > 1:
            raise InputError("sirius decodes greedily: set do_sample=False and num_beams=1")
        if ids.shape[0] != 1:
            raise InputError(f"sirius decodes one sequence at a time, got {ids.shape[0]}")
        mask = inputs.get("attention_mask")
        if mask is not None and not bool((mask == 1).all()):
            raise InputError("sirius takes one prompt without padding")
        if self.method.tree_width > 1 and processors:
            raise InputError("a tree takes no logits processors: use tree_width=1, or generate without them")
        if inputs.get("inputs_embeds") is not None or inputs.get("past_key_values") is None:
            raise InputError("sirius takes token ids and needs a cache: leave out inputs_embeds and use_cache=False")
        for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
            if getattr(config, name, None):
                raise InputError(f"sirius cannot give {name}: leave it out")

    @staticmethod
    def _first_stop(criteria: Any, ids: Tensor, before: int, now: int) -> int | None:
        """The length at which the sequence should have stopped, of those from `before` + 1 to `now`."""
        for length in range(before + 1, now + 1):
            if criteria and bool(criteria(ids[:, :length], None).all()):
                return length
        return None

    def facts(self) -> dict[str, Any]:
        """What the generations since attaching did, for the report."""
        shared: dict[str, Any] = {}
        if self.mlp is not None and self.counters.n_sparse:
            self.policy.enter("sparse")  # the sparse pass is what the shares and bytes are of
            shared = self.mlp.report()
            self.policy.enter("full")
        return {
            **shared,
            "aal": self.counters.aal(),
            "model_density": self.density,
            "effective_density": self.counters.effective_density(self.density),
            "n_sparse": self.counters.n_sparse,
            "n_full": self.counters.n_full,
        }


@register("sirius", slot="activations", family="activations")
class Sirius(ContextualMethod):
    """Decode with contextually sparse MLPs, and let the full model repair text and cache once in P tokens.

    Training-free, batch 1, greedy, for gated and plain MLPs; use it where plain contextual sparsity breaks step-by-step
    reasoning. It needs no draft model: the sparse model is the full one with fewer neurons. It pays where the advance stays
    near the period: the weights read per token are ((P − 1) · density + 1) / AAL of the full model's, and drafts are refused
    more often the smaller the model and ρ are; `effective_density` says what it came to. With ``accept="argmax"`` the text
    is exactly the full model's (speculative decoding with the sparse model as draft), and shorter advances pay for that.

    Source: Zhou et al., Sirius: Contextual Sparsity with Correction for Efficient LLMs (NeurIPS 2024).

    >>> from gossamer.models import tiny_model
    >>> model = tiny_model("llama")
    >>> with Sirius(keep=0.5, period=4, thr=0.0).attach(model) as handle:
    ...     out = handle.generate(torch.arange(1, 9)[None], max_new_tokens=13)
    >>> out.sequences.shape, out.aal, out.n_sparse, out.n_full
    (torch.Size([1, 21]), 4.0, 9, 3)
    """

    period: int = Field(16, ge=1, le=512, description="P, tokens of a window: one of the full model, the rest drafted")
    thr: float = Field(0.1, ge=0, le=2, description="a drafted token less likely than this is refused")
    temperature: float = Field(0.6, gt=0, description="of that likelihood, and of a tree's scores")
    accept: verify.Accept = Field("likely", description="likely: by thr; argmax: only what the full model would choose")
    second_chance: bool = Field(False, description="replace the first refused token, and check once more")
    tree_width: int = Field(1, ge=1, le=64, description="W, beams of a draft; 1: a chain")
    prune: float | None = Field(
        None, gt=0, le=1, description="in a tree, a beam surer than this of its next token proposes no other (0.95)"
    )

    comparable = False  # fed known tokens, it has nothing to correct

    @property
    def slots(self) -> tuple[str, ...]:
        """Neurons and the decoding loop."""
        return ("activations", "drafting")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.second_chance and self.tree_width > 1:
            raise ValueError("a second chance is for chains: set tree_width=1")
        if self.prune is not None and self.tree_width == 1:
            raise ValueError("prune is for trees: set tree_width above 1")
        return self

    def neuron_policy(self, model: nn.Module, calibration: Calibration | None) -> ContextualNeurons:
        """A policy whose fine masks the beams of a tree share, dense until a generation starts."""
        return ContextualNeurons(mlp_views(model), self.keep, self.pattern, strict=self.tree_width > 1).enter("full")

    def attach(self, model: nn.Module, calibration: Calibration | None = None) -> SiriusHandle:
        """Put the method on a model; `SiriusHandle.generate` runs it, `detach` restores the model bit for bit.

        Raises:
            ModelError: the model has no MLP that it can serve, or one that is under a policy already.
        """
        base = super().attach(model, calibration)
        assert base.mlp is not None
        handle = SiriusHandle(
            undo=base.undo,
            mlp=base.mlp,
            model=model,
            method=self,
            policy=cast(ContextualNeurons, base.mlp.policy),
            density=density_of(model, self.keep, self.pattern),
        )
        handle.reports.append(handle.facts)
        generator: Callable[..., Any] = handle.generate
        handle.generator = generator
        return handle
