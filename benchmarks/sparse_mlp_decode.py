"""Decode steps of a few Llama-2-7B-sized layers under CATS and CHESS beside the dense model on our own linear kernel.

    python benchmarks/sparse_mlp_decode.py --dtype bfloat16 --layers 3

Weights are random, so only time is measured; thresholds are learned on random tokens, and the shares that steps really keep are
printed. The ways take turns in rounds; the median of each and its ratio to dense are shown. Memory: 0.8 GB a layer in float32.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import ExitStack

import torch
import transformers

import gossamer
from gossamer import ops
from gossamer.recipe import Recipe

SHAPES = {"llama-2-7b": (4096, 11008, 32, 32), "mistral-7b": (4096, 14336, 32, 8)}


def model_of(shape: str, layers: int, dtype: torch.dtype) -> transformers.PreTrainedModel:
    hidden, neurons, heads, kv_heads = SHAPES[shape]
    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=neurons,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model = model.to(dtype).to_empty(device="cpu").eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        ops.advise_huge_pages(parameter.data)  # for dense and sparse alike
        if "norm" in name:
            parameter.data.fill_(1)
        else:
            parameter.data.normal_(std=hidden**-0.5)
    rotary = model.model.rotary_emb
    inv_freq = 10000.0 ** -(torch.arange(0, hidden // heads, 2).float() / (hidden // heads))
    rotary.inv_freq = rotary.original_inv_freq = inv_freq
    return model


@torch.no_grad()
def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args(argv)
    model = model_of(args.shape, args.layers, getattr(torch, args.dtype))
    tokens = torch.randint(0, 32000, (2, args.context))
    cats, chess = gossamer.make("cats"), gossamer.make("chess", parts="both")
    learned = {"cats": cats.calibrate(model, tokens), "chess": chess.calibrate(model, tokens)}
    native = gossamer.make("native-linear")
    ways = {
        "dense, torch": None,
        "dense": Recipe.of(native),
        "CATS 50 %": Recipe.of((gossamer.make("cats", sparsity=0.5), learned["cats"]), native),
        "CATS 70 %": Recipe.of((gossamer.make("cats", sparsity=0.7), learned["cats"]), native),
        "CHESS 50 %, MLP": Recipe.of((gossamer.make("chess", sparsity=0.5), learned["chess"]), native),
        "CHESS 50 %": Recipe.of((gossamer.make("chess", sparsity=0.5, parts="both"), learned["chess"]), native),
        "CHESS 70 %": Recipe.of((gossamer.make("chess", sparsity=0.7, parts="both"), learned["chess"]), native),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    kept: dict[str, float] = {}
    for _ in range(args.rounds):
        for way, recipe in ways.items():
            with ExitStack() as stack:
                handle = stack.enter_context(recipe.attach(model)) if recipe is not None else None
                cache = model(tokens[:1], use_cache=True, logits_to_keep=1).past_key_values
                step = tokens[:1, :1]
                for turn in range(args.steps + 1):
                    start = time.perf_counter()
                    model(step, past_key_values=cache, use_cache=True)
                    if turn:
                        times[way].append(time.perf_counter() - start)
                report = handle.report() if handle is not None else {}
                kept[way] = report.get("neurons_kept", 1.0)
    dense = statistics.median(times["dense"])
    print(f"{args.shape}, {args.layers} layers, {args.dtype}, {torch.get_num_threads()} threads, batch 1")
    result = {}
    for way, seconds in times.items():
        middle = statistics.median(seconds)
        result[way] = dense / middle
        spread = (max(seconds) - min(seconds)) / middle
        print(
            f"{way:18} {1e3 * middle:8.1f} ms  x{dense / middle:.2f}  spread {spread:.0%}  neurons kept {kept[way]:.0%}"
        )
    return result


if __name__ == "__main__":
    main()
