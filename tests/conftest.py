"""Fixtures that every test may use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from gossamer.errors import ModelError
from gossamer.models import load, smollm2_file
from gossamer.models import tiny_model as make_tiny_model


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `long` take minutes: they run only where the marker is named."""
    if "long" not in config.getoption("-m"):
        for item in items:
            if "long" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes minutes: name it with -m long"))


@pytest.fixture(scope="session")
def smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in fp32 and its tokenizer. Shared by the session: a test that changes it restores it."""
    try:
        smollm2_file()
    except ModelError as error:
        pytest.skip(str(error))
    model, tokenizer, _ = load("smollm2")
    return model, tokenizer


@pytest.fixture
def tiny_model() -> Callable[..., Any]:
    """The factory `tiny_model(family, seed=0, **overrides)`: a small random model, a new one at each call."""
    return make_tiny_model


@pytest.fixture(scope="session")
def byte_tokenizer() -> Any:
    """A tokenizer of 257 entries: every byte is one token, id 256 is the padding and end token. Needs no package."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
