"""Texts, blocks and synthetic tasks: disjoint, seeded, of the length asked for."""

from __future__ import annotations

import random
import re
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.data import TASKS, encode, make_task, split, text, token_blocks
from gossamer.data.tasks import common_words, multi_needle, passkey, variable_tracking
from gossamer.errors import InputError, UnknownNameError

# --- text -------------------------------------------------------------------------------------------------------------


def test_sources() -> None:
    prose, code = text(), text("code")
    assert prose == text("prose")
    assert 300_000 < len(prose) < 1_000_000
    assert 500_000 < len(code) <= 1_000_000
    assert "The Python interpreter" in prose
    assert "import" in code


def test_prose_does_not_repeat_itself() -> None:
    paragraphs = [" ".join(p.split()) for p in text().split("\n\n")]
    long = [p for p in paragraphs if len(p) >= 60]
    assert len(long) == len(set(long))


def test_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.md").write_text("first é", encoding="utf-8")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.txt").write_text("third")
    (tmp_path / "ignored.py").write_text("no")
    assert text(tmp_path) == "first é\n\nsecond\n\nthird"
    assert text(str(tmp_path / "b.txt")) == "second"
    assert text(tmp_path / "ignored.py") == "no"


def test_text_errors(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x80")
    (tmp_path / "none").mkdir()
    cases = {"missing.txt": "there is no text", "empty.txt": "empty", "binary.txt": "not UTF-8", "none": "holds no"}
    for name, message in cases.items():
        with pytest.raises(InputError, match=message) as caught:
            text(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="there is no text 'pros'"):
        text("pros")


@given(st.text(max_size=300))
def test_split_cuts_once(whole: str) -> None:
    assert split(whole, "calibration") + split(whole, "evaluation") == whole


def test_split_is_a_third_and_disjoint() -> None:
    first, rest = split(text(), "calibration"), split(text(), "evaluation")
    assert abs(len(first) / (len(first) + len(rest)) - 1 / 3) < 0.01
    paragraphs = [{" ".join(p.split()) for p in part.split("\n\n") if len(p) >= 60} for part in (first, rest)]
    assert not paragraphs[0] & paragraphs[1]
    with pytest.raises(InputError, match="calibration or evaluation"):
        split(text(), "training")  # type: ignore[arg-type]


def test_token_blocks_in_order(byte_tokenizer: Any) -> None:
    whole = "abcdefghijklmnopqrstuvwxyz"
    blocks = token_blocks(byte_tokenizer, whole, 4, 3, offset=2)
    assert blocks.dtype == torch.int64
    assert [byte_tokenizer.decode(row) for row in blocks] == ["cdef", "ghij", "klmn"]


@given(
    block=st.integers(1, 20), count=st.integers(1, 20), offset=st.integers(0, 9), seed=st.none() | st.integers(0, 99)
)
@settings(deadline=None)
def test_token_blocks_never_overlap(byte_tokenizer: Any, block: int, count: int, offset: int, seed: int | None) -> None:
    whole = "".join(random.Random(0).choices(string.ascii_letters, k=409))
    blocks = token_blocks(byte_tokenizer, whole, block, count, offset=offset, seed=seed)
    assert blocks.shape == (count, block)
    assert torch.equal(blocks, token_blocks(byte_tokenizer, whole, block, count, offset=offset, seed=seed))
    rows = [byte_tokenizer.decode(row) for row in blocks]
    grid = [whole[start : start + block] for start in range(offset, 409 - block + 1, block)]
    assert set(rows) <= set(grid)
    if seed is None:
        assert rows == grid[:count]
    elif block >= 10:  # so long that each is different in this text
        assert len(set(rows)) == count


def test_drawn_blocks_differ(byte_tokenizer: Any) -> None:
    whole = "".join(f"{i:04d}" for i in range(100))
    drawn = token_blocks(byte_tokenizer, whole, 4, 100, seed=3)
    assert len(set(map(tuple, drawn.tolist()))) == 100
    assert not torch.equal(drawn, token_blocks(byte_tokenizer, whole, 4, 100))
    assert not torch.equal(drawn, token_blocks(byte_tokenizer, whole, 4, 100, seed=4))


def test_token_blocks_errors(byte_tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r"has 10 tokens, and 3 blocks of 4 from token 1 on need 13"):
        token_blocks(byte_tokenizer, "0123456789", 4, 3, offset=1)
    with pytest.raises(InputError, match="too short"):
        token_blocks(byte_tokenizer, "", 4, 1)
    for block, count, offset in ((0, 1, 0), (1, 0, 0), (1, 1, -1)):
        with pytest.raises(InputError, match="at least"):
            token_blocks(byte_tokenizer, "abc", block, count, offset=offset)


# --- tasks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_examples_are_seeded(byte_tokenizer: Any, name: str) -> None:
    examples = make_task(name, byte_tokenizer, 4000, 3, seed=1)
    assert examples == make_task(name, byte_tokenizer, 4000, 3, seed=1)
    assert examples[:2] == make_task(name, byte_tokenizer, 4000, 2, seed=1)
    others = make_task(name, byte_tokenizer, 4000, 3, seed=2)
    assert len({e.prompt for e in examples + others}) == 6


@pytest.mark.parametrize("name", TASKS)
@given(context=st.integers(2000, 20_000), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=15)
def test_length_and_answerability(byte_tokenizer: Any, name: str, context: int, seed: int) -> None:
    (example,) = make_task(name, byte_tokenizer, context, 1, seed)
    prompt, answer = encode(byte_tokenizer, example)
    assert 0.9 * context <= len(prompt) + len(answer) <= context
    assert example.meta["tokens"] == len(prompt) + len(answer)
    assert example.meta["task"] == name
    assert example.answer.startswith(" ")
    assert example.prompt == example.prompt.rstrip()
    for part in example.meta["parts"]:
        assert part in example.answer
        assert part in example.prompt


@pytest.mark.parametrize("name", TASKS)
def test_too_small_a_context(byte_tokenizer: Any, name: str) -> None:
    with pytest.raises(InputError, match=f"too small for the task {name}"):
        make_task(name, byte_tokenizer, 20, 1)
    with pytest.raises(InputError, match="at least 1"):
        make_task(name, byte_tokenizer, 4000, 0)


def test_unknown_task(byte_tokenizer: Any) -> None:
    with pytest.raises(UnknownNameError, match="did you mean passkey"):
        make_task("paskey", byte_tokenizer, 1000, 1)
    with pytest.raises(UnknownNameError, match="choose from passkey"):
        make_task("qqqq", byte_tokenizer, 1000, 1)


@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0])
def test_passkey_depth(byte_tokenizer: Any, depth: float) -> None:
    for example in passkey(byte_tokenizer, 8000, 4, 0, depth=depth):
        (key,) = example.meta["parts"]
        assert re.fullmatch("[1-9][0-9]{4}", key)
        assert example.prompt.count(key) == 2
        assert example.answer == f" {key}"
        assert abs(example.prompt.index(key) / len(example.prompt) - depth) < 0.05


def test_depths_are_spread(byte_tokenizer: Any) -> None:
    depths = sorted(e.meta["depth"] for e in passkey(byte_tokenizer, 2000, 8, 0))
    assert max(b - a for a, b in zip([0.0, *depths], [*depths, 1.0], strict=True)) < 0.3
    with pytest.raises(InputError, match="depth"):
        passkey(byte_tokenizer, 2000, 1, 0, depth=1.5)


def test_lines_and_keys_are_unambiguous(byte_tokenizer: Any) -> None:
    for example in make_task("line_retrieval", byte_tokenizer, 5000, 3):
        lines = re.findall(r"^line (\d+) -> (\d{5})$", example.prompt, re.MULTILINE)
        assert [int(number) for number, _ in lines] == list(range(1, len(lines) + 1))
        assert dict(lines)[str(example.meta["line"])] == example.answer.strip()
    for example in make_task("needle_kv", byte_tokenizer, 5000, 3):
        pairs = re.findall(r"^(\S+) -> (\d{5})$", example.prompt, re.MULTILINE)
        assert len({key for key, _ in pairs}) == len(pairs)
        assert dict(pairs)[example.meta["key"]] == example.answer.strip()


def test_multi_needle(byte_tokenizer: Any) -> None:
    (example,) = multi_needle(byte_tokenizer, 6000, 1, 0, needles=5)
    whole = example.prompt + example.answer
    assert len(example.meta["cities"]) == 5
    for city, number in zip(example.meta["cities"], example.meta["parts"], strict=True):
        assert whole.count(f"The number of {city} is {number}.") == 2  # hidden, and answered
    with pytest.raises(InputError, match="needles"):
        multi_needle(byte_tokenizer, 6000, 1, 0, needles=0)


def test_variable_tracking(byte_tokenizer: Any) -> None:
    (example,) = variable_tracking(byte_tokenizer, 6000, 1, 0, hops=4)
    steps = re.findall(r"VAR ([A-Z]{3}) = (?:VAR )?(\w+)\.", example.prompt)
    names = example.meta["parts"]
    assert steps == list(zip(names, [example.meta["value"], *names[:-1]], strict=True))
    assert example.answer == " " + ", VAR ".join(names)
    with pytest.raises(InputError, match="hops"):
        variable_tracking(byte_tokenizer, 6000, 1, 0, hops=-1)


def test_common_words(byte_tokenizer: Any) -> None:
    (example,) = common_words(byte_tokenizer, 6000, 1, 0, common=4)
    words = example.prompt.split("\n\n")[1].split(", ")
    ranked = sorted(set(words), key=lambda word: -words.count(word))
    assert ranked[:4] == example.meta["parts"]
    assert words.count(ranked[3]) >= 3 * words.count(ranked[4])
    with pytest.raises(InputError, match="common"):
        common_words(byte_tokenizer, 6000, 1, 0, common=11)


@pytest.mark.slow
def test_dense_smollm2_can_answer(smollm2: tuple[Any, Any]) -> None:
    """The easy tasks measure attention only if the dense model answers them; five digits by chance are 1 in 90,000."""
    model, tokenizer = smollm2
    for name in ("passkey", "needle_kv"):
        for example in make_task(name, tokenizer, 900, 2, seed=7):
            prompt, answer = encode(tokenizer, example)
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer]), logits_to_keep=len(answer) + 1).logits[0, :-1]
            chance = logits.float().log_softmax(-1)[range(len(answer)), answer]
            assert chance.mean() > -0.6, (name, example.meta)
