"""Token Recycling on SmolLM2: how many tokens a forward yields once the table is warm, and that the text is plain greedy.

Setting of the system's card: 20 chat prompts, 96 new tokens each, greedy, float32, the paper's tree of 80 nodes, one table that
lives on from prompt to prompt; beside it prompt lookup on the same prompts. The card's threshold is on prompts 2 to 20. Time is
not judged here: a forward of 81 tokens costs several of one on a CPU; `gossamer bench decoding` has the trees that pay.
"""

from __future__ import annotations

from typing import Any

import torch

from gossamer.data.prompts import QUESTIONS
from gossamer.decoding import Drafter, Engine, PromptLookup, TokenRecycling
from gossamer.models import load
from gossamer.patterns import Tree
from gossamer.reproductions.base import Outcome, Progress, Reproduction

NEW, SEED = 96, 0
THRESHOLD = 1.7


def _experiment(progress: Progress) -> Outcome:
    loaded = load("smollm2")
    model, tokenizer = loaded.model, loaded.tokenizer
    chosen: Any = tokenizer
    arms: dict[str, tuple[Drafter, Tree | None]] = {
        "token recycling": (TokenRecycling(template="2.2.2").drafter(model, None), None),
        "prompt lookup": (PromptLookup().drafter(model, None), Tree.of_chains(1, 10)),
    }
    engines = {name: Engine(model, drafter, tree=tree) for name, (drafter, tree) in arms.items()}
    raw: dict[str, Any] = {
        name: {"tokens_per_forward": [], "tokens": [], "forwards": [], "equal": []} for name in engines
    }
    accepted: dict[int, int] = {}
    call: Any = model
    for index, question in enumerate(QUESTIONS):
        progress(f"prompt {index + 1}", index, len(QUESTIONS))
        inputs = chosen.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": chosen.eos_token_id}
        plain = call.generate(**inputs, **settings)
        for name, engine in engines.items():
            out = call.generate(**inputs, **settings, custom_generate=engine)
            stats = engine.stats
            for key, number in (
                ("tokens_per_forward", stats.tokens_per_forward),
                ("tokens", stats.tokens),
                ("forwards", stats.forwards),
                ("equal", bool(torch.equal(out, plain))),
            ):
                raw[name][key].append(number)
            if name == "token recycling":
                for count, times in stats.accepted.items():
                    accepted[count] = accepted.get(count, 0) + times

    def warm(name: str) -> float:
        return float(sum(raw[name]["tokens"][1:]) / sum(raw[name]["forwards"][1:]))

    ours = raw["token recycling"]
    mat, lookup, first = warm("token recycling"), warm("prompt lookup"), ours["tokens_per_forward"][0]
    same = sum(ours["equal"])
    equal = same == len(QUESTIONS)
    checks = {"mat": mat >= THRESHOLD, "above_lookup": mat > lookup, "equal": equal}
    failed = [name for name, held in checks.items() if not held]
    return Outcome(
        verdict="reproduced" if not failed else "direction only" if mat > 1.2 and equal else "not reproduced",
        measured=(
            f"{mat:.2f} tokens a forward over prompts 2 to {len(QUESTIONS)} (first {first:.2f}, prompt lookup "
            f"{lookup:.2f}); text equal to plain greedy on {same} of {len(QUESTIONS)}"
        ),
        raw={**raw, "accepted": {str(k): v for k, v in sorted(accepted.items())}, "checks": checks},
        explanation=f"failed: {', '.join(failed)}" if failed else "",
    )


REPRODUCTION = Reproduction(
    slug="token-recycling",
    claim="about 2 times as fast as plain decoding on Vicuna 7B to 33B with a table of 2 MB (2.73 tokens a forward on SpecBench)",
    setting="SmolLM2-135M-Instruct, float32, 20 chat prompts of 96 new tokens, greedy, one table for all, tree 2.2.2",
    threshold="at least 1.7 tokens a forward over prompts 2 to 20, more than prompt lookup, and text equal to greedy on all",
    seeds=(SEED,),
    experiment=_experiment,
)
