"""A small language model, trained, pruned, cached and decoded with nothing hidden.

A byte-level transformer learns from Python's own manual, loses the smaller half of its weights, and then decodes with a
key-value cache of its own, of which each step reads a fraction: the label cache of Double Sparsity, used through three
operators. No model library, no registry, no hooks.

    python examples/from_scratch.py [--steps 400]
"""

import argparse
import math
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer import ops
from gossamer.data import text

LAYERS, HEADS, KV_HEADS, HEAD_DIM, WIDTH, CONTEXT = 3, 4, 2, 32, 128, 256


class Attention(nn.Module):
    """Grouped-query attention: 4 query heads share 2 key-value heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, HEADS * HEAD_DIM, bias=False)
        self.kv = nn.Linear(WIDTH, 2 * KV_HEADS * HEAD_DIM, bias=False)
        self.out = nn.Linear(HEADS * HEAD_DIM, WIDTH, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query [B, H, T, d], key and value [B, H_kv, T, d]."""
        q = self.q(x).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2 * KV_HEADS, HEAD_DIM)).transpose(1, 2).chunk(2, dim=1)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        return self.out(
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)
        )


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.RMSNorm(WIDTH), Attention(), nn.RMSNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        for table in (self.token, self.position):
            nn.init.normal_(table.weight, std=0.05)  # the token table is the output layer too: small logits at first
        self.blocks, self.norm = nn.ModuleList(Block() for _ in range(LAYERS)), nn.RMSNorm(WIDTH)

    def embed(self, ids: Tensor, start: int = 0) -> Tensor:
        return self.token(ids) + self.position(torch.arange(start, start + ids.shape[-1]))

    def logits(self, x: Tensor) -> Tensor:
        return F.linear(self.norm(x), self.token.weight)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.logits(x)


def train(model: Model, data: Tensor, steps: int, masks: dict[str, Tensor] | None = None) -> float:
    """AdamW on random windows; masked weights stay zero. Returns the mean loss of the last tenth, in bits per byte."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
        starts = torch.randint(0, len(data) - 129, (16,))
        batch = torch.stack([data[s : s + 129] for s in starts])
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for name, mask in (masks or {}).items():
                model.get_parameter(name).mul_(mask)
        losses.append(loss.item() / math.log(2))
    return sum(losses[-max(1, steps // 10) :]) / max(1, steps // 10)


def prune(model: Model, sparsity: float) -> dict[str, Tensor]:
    """Zero the smallest weights of every matrix; returns the masks."""
    masks = {}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "blocks" in name:
                threshold = weight.abs().flatten().kthvalue(int(sparsity * weight.numel())).values
                masks[name] = (weight.abs() > threshold).float()
                weight.mul_(masks[name])
    return masks


@torch.no_grad()
def decode(model: Model, prompt: Tensor, new: int, budget: int | None) -> tuple[Tensor, float]:
    """Greedy decoding with a cache; with a budget, each step reads only that many rows of it per query head.

    Returns the new bytes and milliseconds per step.
    """
    size = len(prompt) + new
    keys, values = (torch.zeros(LAYERS, 1, KV_HEADS, size, HEAD_DIM) for _ in range(2))
    labels = [ops.LabelCache.allocate(1, KV_HEADS, size, r=8, bits=4) for _ in range(LAYERS)]
    channels: list[Tensor] = []
    out: list[int] = []
    x, start = model.embed(prompt[None]), 0
    clock = time.perf_counter()
    for _ in range(new):
        stop = start + x.shape[1]
        for i, block in enumerate(model.blocks):
            q, k, v = block.attention.project(block.norm1(x))
            keys[i, :, :, start:stop], values[i, :, :, start:stop] = k, v
            if start == 0:  # the prompt: dense, and it shows which channels carry the scores
                a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                mass = (q.unflatten(1, (KV_HEADS, -1)) * k[:, :, None]).abs().mean((0, 2, 3))
                channels.append(mass.topk(8, dim=-1).indices.to(torch.int32))
            ops.append_labels(labels[i], k, channels[i], start)
            if start > 0:
                key, value = keys[i, :, :, :stop], values[i, :, :, :stop]
                if budget is None or budget >= stop:
                    a = ops.decode_attention(q[:, :, 0], key, value)[:, :, None]
                else:
                    a = ops.label_attention(
                        q[:, :, 0], key, value, channels[i], labels[i], budget, select="query_head"
                    )[0][:, :, None]
            x = x + block.attention.out(a.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.norm2(x))
        out.append(int(model.logits(x[:, -1:]).argmax()))
        x, start = model.embed(torch.tensor([[out[-1]]]), stop) if stop < CONTEXT else x[:, -1:], stop
    return torch.tensor(out), 1e3 * (time.perf_counter() - clock) / new


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="training steps")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    data = torch.frombuffer(bytearray(text("prose").encode()), dtype=torch.uint8).long()
    model = Model()
    result = {"trained": train(model, data, args.steps)}
    print(f"trained:  {result['trained']:.2f} bits per byte")
    masks = prune(model, sparsity=0.5)
    result["pruned"] = train(model, data, max(1, args.steps // 4), masks)
    kept = sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())
    print(
        f"pruned:   {result['pruned']:.2f} bits per byte with {kept:.0%} of the weights, after a little more training"
    )
    prompt = data[1000:1192]
    dense, _ = decode(model, prompt, 60, None)
    sparse, _ = decode(model, prompt, 60, 48)
    result["same"] = float((dense == sparse).float().mean())
    print(f"decoded:  {bytes(dense.tolist())!r}")
    print(f"sparsely: {bytes(sparse.tolist())!r} ({result['same']:.0%} the same, 48 rows of up to 251 read per step)")
    return result


if __name__ == "__main__":
    main()
