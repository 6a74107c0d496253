"""A small SiLU model trained on to have mostly inactive neurons, which decoding then skips: ProSparse in one page.

python examples/relu_sparsity.py [--steps 300]
"""

import argparse
import tempfile

import torch
import transformers

import gossamer
from gossamer.activations.prosparse import ProSparse, model_sparsity
from gossamer.data import byte_batches, byte_corpus
from gossamer.models.training import Plan, bits_per_byte, byte_model, train


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="training steps of each of the two phases")
    args = parser.parse_args(argv)
    data, held_out = byte_corpus(1_000_000)
    blocks = held_out[: 20 * 64].view(20, 64).long()
    plan = Plan(steps=args.steps, lr=2e-3)

    # An ordinary model of Python sources, byte by byte.
    model = byte_model("llama")
    train(model, byte_batches(data, 16, 96, args.steps, seed=0), plan)
    result = {"silu": bits_per_byte(model, held_out, count=4), "zeros_silu": model_sparsity(model, blocks)}
    print(f"SiLU:      {result['silu']:.2f} bits per byte, {result['zeros_silu']:.0%} of the activations are zero")

    # ReLU for the first 15 %; a penalty that rises in stages; and a threshold of 0.02 in the end.
    method = ProSparse(relu_steps=15, peaks=(0.1, 2.0, 2.0), ends=(25, 75, 100), threshold=0.02).scaled(args.steps)
    method.train(model, byte_batches(data, 16, 96, args.steps, seed=1), plan)
    result |= {"prosparse": bits_per_byte(model, held_out, count=4), "zeros": model_sparsity(model, blocks)}
    print(f"ProSparse: {result['prosparse']:.2f} bits per byte, {result['zeros']:.0%} of the activations are zero")

    with tempfile.TemporaryDirectory() as folder:  # an ordinary ReLU checkpoint, whose config remembers the threshold
        model.save_pretrained(folder)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)

    # Decode, and read only the neurons that are not zero.
    prompt = torch.tensor([list(b"def main(argv):\n    ")])
    dense = model.generate(prompt, max_new_tokens=48, do_sample=False)
    with gossamer.make("prosparse").attach(loaded) as handle:
        sparse = loaded.generate(prompt, max_new_tokens=48, do_sample=False)
        report = handle.report()
    result |= {"same": float((sparse == dense).float().mean())}
    result |= {"read": report["mlp_bytes_read"] / report["mlp_bytes_dense"]}
    print(f"decoded:   {bytes(sparse[0].tolist())!r}")
    print(f"{result['same']:.0%} the same as dense; {result['read']:.0%} of the MLPs' weights were read for each token")
    return result


if __name__ == "__main__":
    main()
