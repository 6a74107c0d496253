"""Weight methods side by side: what is left of the model, how well it predicts, what it weighs, how fast it runs.

Each method changes a copy of the model, which is measured beside the dense one and dropped. Times are ratios: decode steps
and prompts of both models alternate in the same seconds, each in the best way it has (torch's linear layers, our dense
kernel, and for models with zeros our sparse kernels), so a row says what a user would feel.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from gossamer.data import split, text, token_blocks
from gossamer.errors import GossamerError, InputError
from gossamer.files import write_whole
from gossamer.hf import matrices
from gossamer.measure import cost as costs
from gossamer.measure.compare import calibration_tokens
from gossamer.measure.results import Estimate
from gossamer.measure.study import BLOCK, beats
from gossamer.models import LoadedModel
from gossamer.registry import Handle, Method, make, method, methods
from gossamer.weights.base import WeightMethod, copied, parameter_count

Progress = Callable[[str, int, int], None]
#: Ways to run the linear layers of a decode step; a model is timed in each that it can take, and the fastest counts.
#: Sparse: `sparse-linear` where it pays, our dense kernel in the other layers.
WAYS = ("torch", "native", "sparse")


@dataclass(frozen=True)
class Plan:
    """How much to measure.

    Attributes:
        segments, length: stretches of evaluation text, and tokens in each.
        blocks, block: calibration text.
        context, steps, rounds: prompt of the timed runs, decode steps of a round, rounds.
        seed: of the stretches.
        source: text (`prose`, `code` or a path).
    """

    segments: int = 6
    length: int = 256
    blocks: int = 16
    block: int = 512
    context: int = 256
    steps: int = 6
    rounds: int = 3
    seed: int = 0
    source: str = "prose"

    def __post_init__(self) -> None:
        for name in ("segments", "blocks", "steps", "rounds"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("length", "block", "context"):
            if getattr(self, name) < 2:
                raise InputError(f"{name} must be 2 or more, got {getattr(self, name)}")


@dataclass
class WeightRow:
    """What one method left.

    Attributes:
        slug, settings: the method.
        share: parameters that are not zero in the blocks' matrices, over the dense model's.
        parameters, nonzero: of the whole model, tied ones once.
        perplexity, kl, agreement: on the evaluation text; KL and next-token agreement against the dense model.
        decode, prefill: time over the dense model's, both in their best way; below 1 is faster.
        decode_ms, way: of the fastest decode step, and how it runs.
        seconds: that `apply` took.
        facts: of the method.
        error: why there is nothing else.
    """

    slug: str
    settings: dict[str, Any]
    share: float | None = None
    parameters: int | None = None
    nonzero: int | None = None
    perplexity: float | None = None
    kl: Estimate | None = None
    agreement: float | None = None
    decode: float | None = None
    prefill: float | None = None
    decode_ms: float | None = None
    way: str | None = None
    seconds: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    losses: Tensor | None = field(default=None, repr=False)

    @property
    def label(self) -> str:
        """Name with the settings that differ from their defaults."""
        inside = ", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in self.settings.items())
        return f"{self.slug} {inside}".rstrip()

    def shown(self) -> dict[str, Any]:
        """The row as `compare` prints it."""
        if self.error is not None:
            return {"method": self.label, **dict.fromkeys(_COLUMNS), "remark": self.error}
        return {
            "method": self.label,
            "kept": f"{self.share:.3f}" if self.share is not None else None,
            "ppl": f"{self.perplexity:.4g}",
            "KL": f"{self.kl.mean:.3g}" if self.kl else None,
            "agree": f"{self.agreement:.1%}",
            "decode": f"{self.decode:.2f}x" if self.decode is not None else None,
            "prefill": f"{self.prefill:.2f}x" if self.prefill is not None else None,
            "remark": self.way or "",
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {k: v for k, v in asdict(self).items() if k != "losses"}


_COLUMNS = ("kept", "ppl", "KL", "agree", "decode", "prefill")


def evaluation_blocks(loaded: LoadedModel, plan: Plan) -> Tensor:
    """int64 ``[segments, length]`` of text that no calibration sees."""
    return token_blocks(
        loaded.tokenizer, split(text(plan.source), "evaluation"), plan.length, plan.segments, seed=plan.seed
    )


@torch.no_grad()
def log_probs_of(model: nn.Module, block: Tensor) -> Tensor:
    """float32 ``[length - 1, vocabulary]``: what the model says of each next token."""
    call: Any = model
    return cast(Tensor, call(block[None], use_cache=False).logits[0, :-1].float().log_softmax(-1))


def score(row: WeightRow, model: nn.Module, tokens: Tensor, dense: Sequence[Tensor]) -> None:
    """Perplexity, KL and agreement into the row."""
    losses, kl, same = [], [], []
    for block, truth in zip(tokens, dense, strict=True):
        mine = log_probs_of(model, block)
        losses.append(-mine.gather(1, block[1:, None])[:, 0])
        kl.append((truth.exp() * (truth - mine)).sum(-1))
        same.append((truth.argmax(-1) == mine.argmax(-1)).float())
    every = torch.cat(losses)
    row.perplexity = float(every.mean().exp())
    if not torch.isfinite(every).all():
        raise InputError("the pruned model's logits are not finite")
    row.losses = torch.cat([torch.stack([p.mean() for p in loss.split(BLOCK)]) for loss in kl])
    row.kl = Estimate.of(row.losses.tolist())
    row.agreement = float(torch.cat(same).mean())


def count(row: WeightRow, model: nn.Module, dense: nn.Module) -> None:
    """Sizes into the row."""
    row.parameters = parameter_count(model)
    row.nonzero = row.parameters - sum(int((p == 0).sum()) for p in model.parameters())
    zeros = sum(int((m.parameter == 0).sum()) for m in matrices(model))
    # What a method adds inside the blocks (SliceGPT's shortcuts) counts as theirs.
    before, after = (parameter_count(m) - _outside(m) for m in (dense, model))
    row.share = (after - zeros) / before


def _outside(model: nn.Module) -> int:
    inside = {id(p) for m in model.modules() if isinstance(m, nn.ModuleList) for p in m.parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) not in inside)


def _attach(slug: str, model: nn.Module) -> Handle:
    handle: Handle = make(slug).attach(model)  # type: ignore[attr-defined]
    return handle


class _Timed:
    """One model, timed in one way."""

    def __init__(self, model: nn.Module, way: str, prompt: Tensor) -> None:
        self.way, self.prompt = way, prompt
        self.decode: list[float] = []
        self.prefill: list[float] = []
        # Packing weights takes longer than what is timed, so it is done once, on a copy that keeps its layers.
        self.model = copied(model) if way == "sparse" else model
        if way == "sparse":
            _attach("sparse-linear", self.model)

    def run(self, steps: int) -> None:
        """One prompt and some decode steps."""
        from transformers.cache_utils import DynamicCache

        call: Any = self.model
        with nullcontext() if self.way == "torch" else _attach("native-linear", self.model):
            with torch.inference_mode():
                cache = DynamicCache(config=call.config)
                start = time.perf_counter()
                call(self.prompt[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
                self.prefill.append(1e3 * (time.perf_counter() - start))
            times = costs.StepTimes()
            costs.time_steps(self.model, None, cache, 1, steps, times)
            self.decode += times.step


def _ways(model: nn.Module, prompt: Tensor, names: Sequence[str]) -> list[_Timed]:
    """The ways that this model can take."""
    made = []
    for way in names:
        try:
            run = _Timed(model, way, prompt)
            run.run(1)
        except GossamerError:  # nothing in it that the way serves
            continue
        run.decode, run.prefill = [], []  # that was the warm-up
        made.append(run)
    return made


def timed(row: WeightRow, model: nn.Module, dense: nn.Module, prompt: Tensor, plan: Plan) -> None:
    """Decode and prefill times over the dense model's into the row; both alternate, each in every way it can take."""
    runs = {"dense": _ways(dense, prompt, WAYS[:2]), "mine": _ways(model, prompt, WAYS)}
    for _ in range(plan.rounds):
        for run in (*runs["dense"], *runs["mine"]):
            run.run(plan.steps)
    best = {name: min(made, key=lambda r: statistics.median(r.decode)) for name, made in runs.items()}
    row.decode_ms = statistics.median(best["mine"].decode)
    row.decode = row.decode_ms / statistics.median(best["dense"].decode)
    prefills = {name: min(statistics.median(r.prefill) for r in made) for name, made in runs.items()}
    row.prefill, row.way = prefills["mine"] / prefills["dense"], best["mine"].way


def study_methods(model: nn.Module, shares: Sequence[float], slugs: Sequence[str] | None = None) -> list[WeightMethod]:
    """Methods at every share of kept parameters: those named, or all of the family that need no training.

    Shares that a method cannot reach on this model are left out.
    """
    if slugs is None:
        slugs = [
            s
            for s, m in methods().items()
            if issubclass(m, WeightMethod) and "training" not in m.needs and "sparsity" in m.model_fields
        ]
    chosen: list[WeightMethod] = []
    for slug in slugs:
        cls = method(slug)
        if not issubclass(cls, WeightMethod):
            raise InputError(f"{slug} does not change weights: compare it with `gossamer compare --methods {slug}`")
        for share in shares:
            with suppress(GossamerError):  # a share that the method cannot reach, a family that it does not serve
                chosen.append(cls.with_kept(share, model))
    return chosen


def compare_weights(
    loaded: LoadedModel,
    chosen: Sequence[Method],
    plan: Plan = Plan(),
    progress: Progress = lambda what, done, total: None,
) -> list[WeightRow]:
    """A row for the dense model and one for each method; a method that fails says why, the others go on.

    Raises:
        InputError: a method does not change weights.
    """
    dense: nn.Module = loaded.model
    tokens = evaluation_blocks(loaded, plan)
    truth = [log_probs_of(dense, block) for block in tokens]
    prompt = tokens.flatten()[: plan.context]
    first = WeightRow("dense", {})
    score(first, dense, tokens, truth)
    count(first, dense, dense)
    timed(first, dense, dense, prompt, plan)
    rows = [first]
    calibration: Tensor | None = None
    for index, one in enumerate(chosen):
        if not isinstance(one, WeightMethod):
            raise InputError(f"{one.slug} does not change weights")
        row = WeightRow(one.slug, one.settings())
        rows.append(row)
        progress(row.label, index, len(chosen))
        try:
            if one.needs and calibration is None:
                calibration = calibration_tokens(loaded, plan.source, plan.blocks, length=plan.block)
            start = time.perf_counter()
            applied = one.apply(copied(dense), calibration if one.needs else None)
            row.seconds, row.facts = time.perf_counter() - start, applied.facts
            model = applied.model.eval()
            score(row, model, tokens, truth)
            count(row, model, dense)
            timed(row, model, dense, prompt, plan)
        except GossamerError as error:
            row.error = str(error)
    return rows


def ranked(rows: Sequence[WeightRow], share: float, slack: float = 0.05) -> list[tuple[int | None, WeightRow]]:
    """Rows that keep at most this share of the parameters, best KL first; equal rank where paired differences don't tell.

    A method's place is one more than the number of methods that beat it by two standard errors.
    """
    within = [r for r in rows if r.share is not None and abs(r.share - share) <= slack and r.slug != "dense"]
    return _placed(within)


def at_latency(rows: Sequence[WeightRow], ratio: float) -> list[tuple[int | None, WeightRow]]:
    """Of each method its best row whose measured decode step takes at most `ratio` of the dense one's, ranked by KL."""
    best: dict[str, WeightRow] = {}
    for row in rows:
        if row.slug == "dense" or row.decode is None or row.kl is None or row.decode > ratio:
            continue
        held = best.get(row.slug)
        if held is None or held.kl is None or row.kl.mean < held.kl.mean:
            best[row.slug] = row
    return _placed(list(best.values()))


def _placed(rows: list[WeightRow]) -> list[tuple[int | None, WeightRow]]:
    def losses(row: WeightRow) -> Tensor:
        assert row.losses is not None
        return row.losses

    ordered = sorted(rows, key=lambda r: r.kl.mean if r.kl else float("inf"))
    return [(1 + sum(beats(losses(o), losses(r)) for o in ordered if o is not r), r) for r in ordered]


def save_rows(rows: Sequence[WeightRow], path: Path, facts: dict[str, Any]) -> None:
    """Write the rows as JSON, whole or not at all.

    Raises:
        OutputError: the file can't be written.
    """
    content = {**facts, "machine": costs.machine(), "versions": costs.versions(), "rows": [r.to_dict() for r in rows]}
    write_whole(path, json.dumps(content, indent=1) + "\n")
