"""Sirius on SmolLM2: does the full model's check every few tokens repair what contextual sparsity breaks?

Setting of the system's card, shortened from 96 to 32 new tokens so that it takes minutes: 10 prompts (five instructions in the
chat template, five beginnings of texts), greedy, half of the neurons. Texts are judged by the dense model: the mean negative
log-likelihood (NLL) of the new tokens, teacher-forced. For each mode (coarse and fine, and coarse with periods of 8): the
sparse model alone, Sirius with thr = 0.1, and the strict acceptance of speculative decoding, whose text must be the dense
model's own.

Beside the criteria, in the raw numbers only: the share of two generated tasks answered in full (counting on in steps, which is
arithmetic; copying a table of numbers, which is retrieval) by the dense model, the sparse one and Sirius. A 135M model is hurt
more by half of its neurons than the paper's 8B, so advances are short, and the effective density is above 1: weights read per
token are more than the dense model's. The paper's saving is therefore no criterion here.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gossamer.activations.griffin import Griffin
from gossamer.activations.sirius import Sirius
from gossamer.models import load
from gossamer.recipe import Recipe
from gossamer.registry import make
from gossamer.reproductions.base import Outcome, Progress, Reproduction

NEW, SEED, EXAMPLES = 32, 0, 6
MODES: dict[str, dict[str, Any]] = {
    "coarse, P 16": {"pattern": "coarse", "period": 16},
    "coarse, P 8": {"pattern": "coarse", "period": 8},
    "fine, P 16": {"pattern": "fine", "period": 16},
}
KEEP, THR = 0.5, 0.1
THRESHOLDS = {"gap": 0.3, "removed": 0.8, "aal_over_strict": 1.25}
INSTRUCTIONS = (
    "Explain in a few sentences why the sky is blue.",
    "Write a short story about a dog who finds an old key.",
    "How do I make a good cup of tea?",
    "List five animals that live in the sea and say what each of them eats.",
    "What is the difference between weather and climate?",
)
BEGINNINGS = (
    "The history of the lighthouse begins with a fire on a hill. Sailors would",
    "To sort a list of numbers, one can compare neighbours and swap them. First,",
    "Dear Anna, thank you for your letter. Last week we went to",
    "Water is one of the most important substances on Earth. It covers",
    "In the spring of that year the two brothers opened a small bakery in",
)


def counting(rng: random.Random) -> tuple[str, str]:
    """An arithmetic progression and its next six terms."""
    step, first = rng.choice((2, 5, 10)), rng.randrange(1, 60)
    terms = [str(first + step * i) for i in range(12)]
    return f"Counting in steps of {step}: {', '.join(terms[:6])},", f" {', '.join(terms[6:])},"


def table(rng: random.Random) -> tuple[str, str]:
    """A table of eight numbers, to be said again."""
    names = ("Anna", "Ben", "Carl", "Dora", "Emma", "Finn", "Gina", "Hugo")
    lines = [f"{name}: {rng.randrange(10, 100)}" for name in names]
    again = "\n".join(lines).removeprefix("Anna:")
    return "A table of names and numbers:\n" + "\n".join(lines) + "\n\nThe same table again:\nAnna:", again


TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {"counting": counting, "table": table}


class Writer:
    """Generations with and without methods, our dense kernel under all of them."""

    def __init__(self) -> None:
        self.loaded = load("smollm2")
        self.model: Any = self.loaded.model
        self.tokenizer: Any = self.loaded.tokenizer
        self.sparse: dict[str, list[float]] = {}  # NLLs of the sparse model's texts by pattern: periods share them

    def prompts(self) -> list[Tensor]:
        """int64 ``[1, n]`` each."""
        chats = [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )["input_ids"]
            for text in INSTRUCTIONS
        ]
        return chats + [self.tokenizer(text, return_tensors="pt").input_ids for text in BEGINNINGS]

    def generate(self, method: Any, ids: Tensor, new: int) -> Any:
        """The output of a greedy generation; ends are not heeded, so that all texts are of one length."""
        with Recipe.of(*([] if method is None else [method]), make("native-linear")).attach(self.model) as handle:
            settings: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            generate = handle.generator or self.model.generate
            return generate(input_ids=ids, max_new_tokens=new, return_dict_in_generate=True, **settings)

    def nll(self, sequence: Tensor, prompt: int) -> float:
        """Of the tokens after the prompt, under the dense model."""
        with torch.no_grad():
            log_probs = self.model(sequence).logits[0, prompt - 1 : -1].float().log_softmax(-1)
        return float(-log_probs.gather(1, sequence[0, prompt:, None]).mean())

    def solved(self, method: Any, examples: list[tuple[str, str]]) -> dict[str, Any]:
        """Share of examples answered in full, and the advances."""
        right, advances = 0, list[int]()
        for prompt, answer in examples:
            ids = self.tokenizer(prompt, return_tensors="pt").input_ids
            out = self.generate(method, ids, len(self.tokenizer(answer).input_ids) + 1)
            right += self.tokenizer.decode(out.sequences[0, ids.shape[1] :]).startswith(answer)
            found = getattr(out, "advances", None)
            advances += found.tolist() if found is not None else []
        share: dict[str, Any] = {"solved": right / len(examples)}
        return share | ({"aal": sum(advances) / len(advances)} if advances else {})


def _mode(run: Writer, setting: dict[str, Any], dense: list[Tensor], prompts: list[Tensor]) -> dict[str, Any]:
    pattern = setting["pattern"]
    if pattern not in run.sparse:
        griffin = Griffin(keep=KEEP, pattern=pattern)
        run.sparse[pattern] = [run.nll(run.generate(griffin, ids, NEW).sequences, ids.shape[1]) for ids in prompts]
    found: dict[str, Any] = {"sparse_nll": run.sparse[pattern]}
    found |= {"sirius_nll": [], "lossless": [], "advances": [], "strict_advances": []}
    passes, density = [0, 0], 0.0
    for ids, want in zip(prompts, dense, strict=True):
        length = ids.shape[1]
        out = run.generate(Sirius(keep=KEEP, thr=THR, **setting), ids, NEW)
        found["sirius_nll"].append(run.nll(out.sequences, length))
        found["advances"].append(out.advances.tolist())
        passes, density = [passes[0] + out.n_sparse, passes[1] + out.n_full], out.density
        strict = run.generate(Sirius(keep=KEEP, accept="argmax", **setting), ids, NEW)
        found["lossless"].append(bool(torch.equal(strict.sequences, want)))
        found["strict_advances"].append(strict.advances.tolist())
    tokens = [sum(map(sum, found[key])) for key in ("advances", "strict_advances")]
    found["aal"], found["strict_aal"] = (
        n / sum(map(len, found[key])) for n, key in zip(tokens, ("advances", "strict_advances"), strict=True)
    )
    found["density"] = density
    found["effective_density"] = (passes[0] * density + passes[1]) / tokens[0]
    return found


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _experiment(progress: Progress) -> Outcome:
    run = Writer()
    prompts, steps = run.prompts(), len(MODES) + len(TASKS)
    dense = [run.generate(None, ids, NEW).sequences for ids in prompts]
    base = _mean([run.nll(text, ids.shape[1]) for text, ids in zip(dense, prompts, strict=True)])
    modes: dict[str, dict[str, Any]] = {}
    checks: dict[str, bool] = {}
    for index, (name, setting) in enumerate(MODES.items()):
        progress(name, index, steps)
        mode = modes[name] = _mode(run, setting, dense, prompts)
        gap = _mean(mode["sparse_nll"]) - base
        mode["gap"], mode["removed"] = gap, (gap - (_mean(mode["sirius_nll"]) - base)) / gap
        if gap > THRESHOLDS["gap"]:
            checks[f"{name}: gap removed"] = mode["removed"] >= THRESHOLDS["removed"]
            checks[f"{name}: advance"] = mode["aal"] >= THRESHOLDS["aal_over_strict"] * mode["strict_aal"]
        checks[f"{name}: lossless"] = all(mode["lossless"])
    tasks: dict[str, Any] = {}
    for index, (name, make_example) in enumerate(TASKS.items()):
        progress(name, len(MODES) + index, steps)
        examples = [make_example(random.Random(f"{name} {SEED} {i}")) for i in range(EXAMPLES)]
        tasks[name] = {"dense": run.solved(None, examples)}
        for pattern in ("coarse", "fine"):
            tasks[name][f"{pattern} sparse"] = run.solved(Griffin(keep=KEEP, pattern=pattern), examples)
            tasks[name][f"{pattern} sirius"] = run.solved(Sirius(keep=KEEP, thr=THR, pattern=pattern), examples)
    failed = [name for name, held in checks.items() if not held]
    direction = all(
        m["removed"] > 0.5 and m["aal"] > m["strict_aal"] for m in modes.values() if m["gap"] > THRESHOLDS["gap"]
    )
    return Outcome(
        verdict="reproduced" if not failed else "direction only" if direction else "not reproduced",
        measured=f"NLL of dense text {base:.2f}; "
        + "; ".join(
            f"{name}: sparse {_mean(m['sparse_nll']):.2f}, Sirius {_mean(m['sirius_nll']):.2f}, advance {m['aal']:.1f} "
            f"(strict {m['strict_aal']:.1f}), effective density {m['effective_density']:.2f}"
            for name, m in modes.items()
        ),
        raw={"dense_nll": base, "modes": modes, "tasks": tasks, "checks": checks},
        explanation=f"failed: {', '.join(failed)}" if failed else "",
    )


REPRODUCTION = Reproduction(
    slug="sirius",
    claim="a full-model check every 16 tokens restores what contextual sparsity at half of the neurons breaks (GSM8K 38 % to "
    "71 % of 75 %), with advances near the period",
    setting="SmolLM2-135M-Instruct, 10 prompts, 32 new tokens each, greedy, half of the neurons, thr 0.1, chains",
    threshold="in every mode whose sparse text is worse than dense text by > 0.3 of dense NLL: >= 80 % of that removed, and "
    "advance >= 1.25 of strict acceptance's; strict acceptance gives the dense text exactly",
    seeds=(SEED,),
    experiment=_experiment,
)
