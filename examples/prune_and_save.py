"""A small model pruned in three ways, trained on under its mask, and saved: what each step costs, in one page.

python examples/prune_and_save.py [--steps 200]
"""

import argparse
import copy
import tempfile

import torch
import transformers

from gossamer.data import byte_batches, byte_corpus
from gossamer.models import Plan, bits_per_byte, byte_model, train
from gossamer.patterns import Masks
from gossamer.registry import make


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="training steps, and a quarter of them under the mask")
    args = parser.parse_args(argv)
    data, held_out = byte_corpus(1_000_000)

    def quality(model: torch.nn.Module) -> float:
        return bits_per_byte(model, held_out, count=4)

    # An ordinary model of Python sources, byte by byte.
    dense = byte_model("llama")
    train(dense, byte_batches(data, 16, 96, args.steps, seed=0), Plan(steps=args.steps, lr=2e-3))
    result = {"dense": quality(dense)}
    print(f"dense:                 {result['dense']:.2f} bits per byte")

    # Half of the weights go, in one shot, by three criteria. SparseGPT looks at some text.
    text = data[: 16 * 96].view(16, 96).long()
    for slug in ("random-weights", "magnitude", "sparsegpt"):
        applied = make(slug, sparsity=0.5).apply(copy.deepcopy(dense), text)
        result[slug] = quality(applied.model)
        print(f"half gone, {slug + ':':<16}{result[slug]:.2f}")

    # Training on under the mask brings quality back; the zeros stay zeros.
    model, masks, few = applied.model, applied.masks, max(1, args.steps // 4)
    train(model, byte_batches(data, 16, 96, few, seed=1), Plan(steps=few, lr=5e-4, warmup=5), masks=masks)
    result["trained"] = quality(model)
    print(f"trained on:            {result['trained']:.2f}")

    with tempfile.TemporaryDirectory() as folder:  # an ordinary checkpoint
        model.save_pretrained(folder)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    result["zeros"] = Masks.of(loaded, least=0.1).sparsity
    print(f"loaded again:          {result['zeros']:.0%} of the weights in the blocks are zero")
    return result


if __name__ == "__main__":
    main()
