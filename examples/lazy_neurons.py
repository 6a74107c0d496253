"""Lazy neurons: train a small ReLU model, watch its neurons fall silent, then compute only the few that fire.

Nothing asks for sparsity here: no penalty, no pruning. A fresh network fires half of its neurons on every token; training
alone makes most of them quiet, and then a cap at that count changes nothing but the work.

    python examples/lazy_neurons.py [--steps 300]
"""

import argparse

import gossamer
from gossamer.activations.lazy_neuron import activation_stats
from gossamer.activations.lazy_studies import probe_batches
from gossamer.data import byte_batches, byte_corpus
from gossamer.models import Plan, bits_per_byte, byte_model, train


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="training steps")
    args = parser.parse_args(argv)

    # A transformer over bytes whose MLPs are plain: down(relu(up x)), 512 neurons a layer.
    model = byte_model("gpt2", activation_function="relu", hidden_size=96, intermediate_size=512, num_hidden_layers=3)
    learned, held_out = byte_corpus(2_000_000)
    probe = probe_batches(held_out, context=96, count=32)

    def show(step: int) -> None:
        if (step + 1) % max(1, args.steps // 4) == 0:
            percents = activation_stats(model, probe).percents
            print(
                f"step {step + 1:5}: " + "  ".join(f"{p:5.1f} %" for p in percents) + "  of the neurons fire, by layer"
            )

    show(-1)
    train(
        model,
        byte_batches(learned, batch=16, context=96, steps=args.steps),
        Plan(steps=args.steps, lr=2e-3),
        after_step=show,
    )

    # How many fire on a token at most times, and what a cap at a few counts costs.
    stats = activation_stats(model, probe)
    dense = bits_per_byte(model, held_out, count=2)
    result = {"percent": stats.mean_percent, "dense": dense}
    print(
        f"dense:    {dense:.3f} bits per byte, {max(layer.count for layer in stats.layers):.0f} of 512 fire where most do"
    )
    for k in (256, 128, 32):
        capped = max(layer.share_over(k) for layer in stats.layers)
        with gossamer.make("lazy-neuron", k=k).attach(model) as handle:
            result[f"top{k}"] = bits_per_byte(model, held_out, count=2)
            kept = handle.report()["neurons_kept"]
        print(f"top {k:4}: {result[f'top{k}']:.3f} bits per byte, {kept:.0%} of the neurons used; ", end="")
        print(f"up to {capped:.0%} of a layer's tokens feel the cap")
    return result


if __name__ == "__main__":
    main()
