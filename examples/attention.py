"""Sparse attention in one page: calibrate, attach, generate, see what was read.

python examples/attention.py [MODEL] [--tokens 1/8]
"""

import argparse

import gossamer


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument(
        "--tokens", default="1/8", help="rows read per query head, a count or a fraction of the context"
    )
    parser.add_argument("--new", type=int, default=24, help="tokens to generate")
    args = parser.parse_args(argv)

    loaded = gossamer.load(args.model)
    method = gossamer.make("double-sparsity", tokens=args.tokens)

    # Which channels of each head tell its important tokens? A few thousand tokens of any text show it.
    calibration = method.calibrate(loaded.model, gossamer.calibration_tokens(loaded, blocks=4))

    # A long prompt, because at a short one there is nothing to save.
    from gossamer.data import split, text

    prompt = split(text("prose"), "evaluation")[:6000]
    inputs = loaded.tokenizer(prompt, return_tensors="pt")

    dense = loaded.model.generate(**inputs, max_new_tokens=args.new, do_sample=False)
    with method.attach(loaded.model, calibration) as handle:
        sparse = loaded.model.generate(**inputs, max_new_tokens=args.new, do_sample=False)
        report = handle.report()

    length = inputs["input_ids"].shape[1]
    for name, out in (("dense", dense), ("sparse", sparse)):
        print(f"{name:7} {loaded.tokenizer.decode(out[0, length:])!r}")
    same = float((dense[0, length:] == sparse[0, length:]).float().mean())
    read = (report["kv_bytes_read"] + report["score_bytes_read"]) / report["dense_bytes"]
    print(f"{length} tokens of context; {same:.0%} of the new tokens agree; {read:.0%} of the cache bytes were read")
    return {"same": same, "read": read}


if __name__ == "__main__":
    main()
