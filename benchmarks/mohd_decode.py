"""A decode step of MoHD's sub-layers beside the dense ones of the same size, one token at a time.

    python benchmarks/mohd_decode.py [--width 2048] [--neurons 5632] [--layers 4] [--active 0.5] [--rounds 9]

Both run our kernel for few rows (`DecodeLinear`); dense is also run by torch's library. Weights of the layers are read in turn,
so that no level of cache holds them. Rounds are interleaved; the figure is the fastest round, for one layer. `bound` is the
share of weights that a step of MoHD must read, router and fusion included.
"""

import argparse
import copy
import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gossamer.activations.mohd import MoHD, costs
from gossamer.hf.linear import DecodeLinear


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("width", 2048), ("neurons", 5632), ("layers", 4), ("rounds", 9), ("groups", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--active", type=float, default=0.5)
    args = parser.parse_args()
    config = LlamaConfig(
        hidden_size=args.width,
        intermediate_size=args.neurons,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 128,
        num_key_value_heads=args.width // 512,
        vocab_size=64,
    )
    dense = LlamaForCausalLM(config).eval()
    sparse = {"groups": args.groups, "active": args.active, "shared": 0.75 * args.active}
    arms: dict[str, Any] = {"dense, torch": dense, "dense": copy.deepcopy(dense)}
    for fusion in ("monarch", "none"):
        method = MoHD(**sparse, fusion=fusion)
        for laid in (False, True):
            name = f"MoHD, fusion {fusion}" + (", attached" if laid else "")
            arms[name] = method.apply(dense)
            if laid:
                method.attach(arms[name])
    for name, model in arms.items():
        if name != "dense, torch":
            DecodeLinear(model)
    token = torch.zeros(1, 1, dtype=torch.long)
    state = torch.randn(1, 1, args.width)
    steps: dict[str, dict[str, Any]] = {
        "whole step": {name: lambda m=model: m(token, use_cache=False) for name, model in arms.items()},
        "MLPs": {name: lambda m=model: [layer.mlp(state) for layer in m.model.layers] for name, model in arms.items()},
    }
    with torch.no_grad():
        for what, calls in steps.items():
            best = dict.fromkeys(calls, float("inf"))
            for _ in range(args.rounds):
                for name, call in calls.items():
                    begin = time.perf_counter()
                    call()
                    best[name] = min(best[name], time.perf_counter() - begin)
            fastest = min(seconds for name, seconds in best.items() if name.startswith("dense"))
            for name, seconds in best.items():
                bound = costs(arms[name]).flops / costs(dense).flops
                print(
                    f"{what:10s}  {name:32s} {1e3 * seconds / args.layers:7.2f} ms a layer  "
                    f"{fastest / seconds:5.2f} times dense  bound {1 / bound:4.2f}"
                )


if __name__ == "__main__":
    main()
