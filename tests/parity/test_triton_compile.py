"""Every kernel compiles for an H100 (sm_90) down to machine code, with what the wrappers really pass; no GPU needed.

The interpreter accepts much that the compiler refuses, and says nothing of shared memory. So the wrappers are called
on CPU tensors in a process of its own, where a stand-in for the driver names the target and launches are turned into
compilations.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

SHARED_MEMORY = 227 * 1024 // 2
"""Bytes that let two programs run on a multiprocessor of an H100."""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Triton's CUDA assembler comes with the Linux wheels")
def test_kernels_compile_for_an_h100(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert {line.split()[0] for line in run.stdout.splitlines()} == {
        "_attend",
        "_attend_codes",
        "_merge",
        "_select",
        "_append",
        "_pool",
        "_score",
        "_key_scores",
        "_read",
        "_weigh",
        "_rows",
        "_columns",
        "_compact",
        "_join",
        "_prefill",
        "_walk",
        "_gate",
        "_product",
        "_down",
        "_list_changes",
        "_list_channels",
        "_sum_rows",
        "_multiply_blocks",
    }


def main():
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from gossamer.gpu.attention_row import attention_row, decode_attention_with_row
    from gossamer.gpu.attention_statistics import attention_columns
    from gossamer.gpu.channel_sparse_linear import channel_sparse_linear
    from gossamer.gpu.compact_rows import compact_rows
    from gossamer.gpu.decode_attention import decode_attention
    from gossamer.gpu.delta_linear import delta_linear
    from gossamer.gpu.key_scores import key_scores
    from gossamer.gpu.labels import append_labels, label_scores
    from gossamer.gpu.merge_rows import merge_rows
    from gossamer.gpu.pooled_attention import pooled_attention
    from gossamer.gpu.prefill_attention import block_sparse_attention, vertical_slash_attention
    from gossamer.gpu.quantized_kv import quantized_decode_attention
    from gossamer.gpu.select_topk import select_topk
    from gossamer.gpu.sparse_linear import sparse_linear
    from gossamer.gpu.sparse_mlp import sparse_mlp
    from gossamer.ops import LabelCache, NeuronWeights, QuantizedRows, pack

    class H100:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, _):
            return 0

    driver.set_active(H100())
    launch = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        assert kernel.asm["cubin"]
        assert kernel.metadata.shared <= SHARED_MEMORY, (self.__name__, kernel.metadata.shared)
        print(self.__name__, kernel.metadata.shared, flush=True)

    JITFunction.run = compile_only

    def ids(*shape):
        return torch.zeros(shape, dtype=torch.int32)

    for dim, dtype in ((128, torch.bfloat16), (80, torch.float16), (256, torch.float32)):
        query, key = torch.zeros(2, 16, dim, dtype=dtype), torch.zeros(2, 4, 2048, dim, dtype=dtype)
        decode_attention(query, key, key, starts=ids(2), lengths=ids(2), scale=1.0)
        decode_attention(query, key, key, indices=ids(2, 4, 256), counts=ids(2, 4), scale=1.0)
        for reduce in ("none", "max", "sum"):
            key_scores(query, key, starts=ids(2), lengths=ids(2), reduce=reduce)
        attention_row(query, key, torch.zeros(2, 4, 2048), starts=ids(2), scale=1.0)
        decode_attention_with_row(query, key, key, torch.zeros(2, 4, 2048), starts=None, scale=1.0)
        block, how = query[:, :, None].expand(-1, -1, 300, -1), {"starts": ids(2), "scale": 1.0}
        attention_columns(block, key, torch.zeros(2, 300), ids(300), window=0, causal=True, **how)
        attention_columns(block, key, torch.zeros(2, 300), ids(300), window=64, causal=True, **how)
        compact_rows(key, ids(2, 4, 256).long(), 2048)
        merge_rows(key, torch.zeros(2, 4, 2048), ids(2, 4, 64), ids(2, 4, 64), dim == 128)
        prompt = torch.zeros(2, 16, 256, dim, dtype=dtype)
        blocks = torch.ones(2, 4, 4, 32, dtype=torch.bool)
        block_sparse_attention(prompt, key, key, blocks, None, 64, 64, 99, ids(2), 1.0)
        vertical_slash_attention(key, key, key, ids(2, 4, 30), ids(2, 4, 99), 64, None, 1.0)
        pooled_attention(prompt, key, 64, 64, starts=ids(2), scale=1.0)
        pooled_attention(prompt, key, 1, 128, scale=1.0)
    compact_rows(torch.zeros(2, 4, 2048, 20, dtype=torch.uint8), ids(2, 4, 256), 2048)
    decode_attention(query, key, key, indices=ids(2, 16, 64), scale=1.0)
    block_sparse_attention(prompt[:, :, :64], key, key, ids(2, 16, 4, 9), ids(2, 16, 4), 16, 128, None, None, 1.0)
    for rows, dtype, kind in (
        (1, torch.float32, torch.int32),
        (8, torch.bfloat16, torch.int16),
        (3, torch.float16, torch.int16),
    ):
        codes, weight = torch.zeros(rows, 4096, dtype=kind), torch.zeros(4096, 11008, dtype=dtype)
        delta_linear(torch.zeros(rows, 11008), codes, codes.clone(), weight, torch.ones(4096 if rows > 1 else 1))
        x = torch.zeros(rows, 4096, dtype=dtype)
        for limit in (None, torch.tensor(0.5), torch.zeros(4096)):
            channel_sparse_linear(x, weight, limit, None, None, None)
        channel_sparse_linear(
            x, weight.to(torch.int8), limit, torch.zeros(11008), torch.zeros(4096), ids(rows + 1).long()
        )
    select_topk(torch.zeros(2, 4, 500), 256, starts=ids(2), lengths=ids(2))
    select_topk(torch.zeros(1, 4, 200000), 256)  # in chunks
    for bits, r in ((1, 32), (4, 32), (8, 128), (12, 40), (16, 128)):
        labels = LabelCache.allocate(2, 4, 2048, r, bits, torch.bfloat16)
        query, key = torch.zeros(2, 16, 128).bfloat16(), torch.zeros(2, 4, 100, 128).bfloat16()
        append_labels(labels, key, ids(4, r), 7)
        for reduce in ("none", "sum") if r > 32 else ("max",):
            label_scores(query, ids(4, r), labels, 2000, lengths=ids(2), reduce=reduce, kv_heads=4, protect_last=True)
    for dim, dtype, bits, axes in (
        (128, torch.bfloat16, (4, 4), ("channel", "token")),
        (64, torch.float16, (8, 2), ("token", "token")),
        (256, torch.float32, (2, 8), ("channel", "channel")),
    ):
        key, value = (
            QuantizedRows.allocate(
                2, 4, 2048, dim, bits=b, axis=a, group=64 if a == "channel" else None, scales=torch.bfloat16
            )
            for b, a in zip(bits, axes, strict=True)
        )
        query = torch.zeros(2, 16, dim, dtype=dtype)
        how = {"recent": None, "split": 2048, "scale": 1.0}
        quantized_decode_attention(query, key, value, starts=ids(2), lengths=ids(2), **how)
        quantized_decode_attention(query, key, value, indices=ids(2, 4, 256), counts=ids(2, 4), **how)
    for rows, dtype, activation in (
        (1, torch.bfloat16, "silu"),
        (8, torch.float32, "gelu"),
        (2, torch.float16, "gelu_tanh"),
    ):
        matrices = [torch.zeros(11008, 4096, dtype=dtype) for _ in range(3)]
        weights = NeuronWeights(*matrices, activation=activation)
        sparse_mlp(torch.zeros(rows, 4096, dtype=dtype), weights, torch.tensor(0.5), None, None, None)
    sparse_mlp(torch.zeros(1, 4096), weights.quantized(), None, None, ids(99), None)
    for tokens, dtype, activation in (
        (1, torch.bfloat16, None),
        (128, torch.float16, "gelu"),
        (20, torch.float32, "silu"),
    ):
        blocks, bias = pack(torch.ones(64, 256, dtype=dtype)), torch.zeros(64, dtype=dtype)
        sparse_linear(
            torch.zeros(tokens, 256, dtype=dtype), blocks, bias, activation, torch.zeros(tokens, 64, dtype=dtype)
        )


if __name__ == "__main__":
    main()
