"""Each example runs, and shows what it says it shows."""

import importlib.util
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_attention(smollm2, capsys):
    result = load("attention").main(["--new", "8", "--tokens", "1/8"])
    assert result["read"] < 0.5
    assert "of the cache bytes were read" in capsys.readouterr().out


def test_from_scratch(capsys):
    result = load("from_scratch").main(["--steps", "40"])
    assert result["trained"] < 5.5  # bits per byte; 8 before training
    assert result["pruned"] < result["trained"] + 0.5
    assert "rows of up to" in capsys.readouterr().out


def test_lazy_neurons(capsys):
    result = load("lazy_neurons").main(["--steps", "60"])
    assert result["percent"] < 48  # 50 before training
    assert result["top256"] < result["dense"] + 0.1
    assert result["top32"] > result["top256"]
    assert "of the neurons fire, by layer" in capsys.readouterr().out


def test_relu_sparsity(capsys):
    result = load("relu_sparsity").main(["--steps", "60"])
    assert result["zeros_silu"] == 0
    assert result["zeros"] > 0.5
    assert result["same"] == 1
    assert result["read"] < 0.85
    assert "of the MLPs' weights were read" in capsys.readouterr().out


def test_prune_and_save(capsys):
    result = load("prune_and_save").main(["--steps", "60"])
    assert result["sparsegpt"] <= result["magnitude"] + 0.02 < result["random-weights"] + 0.04
    assert result["trained"] < result["sparsegpt"]
    assert abs(result["zeros"] - 0.5) < 0.01
    assert "loaded again" in capsys.readouterr().out
