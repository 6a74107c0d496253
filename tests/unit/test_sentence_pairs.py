"""Classification tasks from text, and the encoders that learn them."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel

from gossamer.data import (
    Pairs,
    encode_pairs,
    library_stretches,
    make_pairs,
    make_topics,
    sentences,
    word_tokenizer,
)
from gossamer.errors import InputError, ModelError
from gossamer.models import Plan, tiny_model, train
from gossamer.models.encoders import (
    class_batches,
    classifier,
    evaluate,
    pretraining_batches,
    pretraining_loss,
    sequence_loss,
    small_encoder,
)

PLAIN = [f"the sentence number {i} has {i % 7} apples in it" for i in range(60)]
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64}


@pytest.fixture(scope="module")
def prose() -> list[str]:
    return sentences("prose")


def test_the_manual_has_thousands_of_sentences_of_a_sensible_length(prose):
    assert len(prose) > 2000
    assert all(5 <= len(s.split()) <= 30 and "\n" not in s for s in prose)


def test_a_file_of_the_user_is_taken_as_text(tmp_path):
    (tmp_path / "a.txt").write_text("One two three four five. Six seven.\n\nEight nine ten eleven twelve thirteen.")
    found = sentences(tmp_path / "a.txt")
    assert found == ["One two three four five.", "Eight nine ten eleven twelve thirteen."]


def test_successors_follow_and_others_do_not(prose):
    train_part, test_part = make_pairs(prose, "successor", seed=3)
    place = {s: i for i, s in enumerate(prose)}
    follows = set(itertools.pairwise(prose))
    for part in (train_part, test_part):
        assert sum(part.labels) * 2 == len(part)
        for a, b, label in zip(part.first, part.second, part.labels, strict=True):
            if label:
                assert (a, b) in follows
            elif prose.count(a) == prose.count(b) == 1:
                assert place[b] - place[a] not in (0, 1)
    cut = round(0.8 * len(prose))
    assert set(train_part.first + train_part.second) <= set(prose[:cut])
    assert set(test_part.first + test_part.second) <= set(prose[cut:])


def test_orders_differ_by_one_exchange_of_neighbours(prose):
    part, _ = make_pairs(prose[:200], "order")
    whole = {s for s, label in zip(part.first, part.labels, strict=True) if label}
    assert whole <= set(prose[:200])
    for sentence, label in zip(part.first, part.labels, strict=True):
        if not label:
            words = sentence.split()
            swaps = ([*words[:i], words[i + 1], words[i], *words[i + 2 :]] for i in range(len(words) - 1))
            assert any(" ".join(swap) in whole for swap in swaps)
            assert sentence not in whole


def test_stretches_of_packages_are_labelled_and_parts_do_not_meet():
    stretches = library_stretches(24)
    assert all(len(s.split()) == 24 for s in stretches["email"])
    names = ("email", "json", "logging")
    train_part, test_part = make_topics(stretches, names, each=100)
    for part in (train_part, test_part):
        counts = [part.labels.count(label) for label in range(3)]
        assert len(set(counts)) == 1
        assert all(s in stretches[names[label]] for s, label in zip(part.first, part.labels, strict=True))
    assert len(train_part) == 4 * len(test_part) == 240
    for label, name in enumerate(names):
        cut = round(0.8 * len(stretches[name]))
        ours = [s for s, one in zip(test_part.first, test_part.labels, strict=True) if one == label]
        assert set(ours) <= set(stretches[name][cut:])
    assert make_topics(stretches, names, 100, 1) == make_topics(stretches, names, 100, 1)
    for bad in (("email",), ("email", "no package")):
        with pytest.raises(InputError, match="two packages"):
            make_topics(stretches, bad)
    with pytest.raises(InputError, match="one word"):
        library_stretches(0)


def test_the_seed_decides(prose):
    assert make_pairs(prose, "order", 1) == make_pairs(prose, "order", 1)
    assert make_pairs(prose, "order", 1) != make_pairs(prose, "order", 2)


def test_the_tokenizer_writes_pairs_saves_and_loads(tmp_path):
    tokenizer = word_tokenizer(PLAIN, size=40)
    pairs = Pairs(("The sentence number", "it"), ("apples", "unheard of"), (1, 0))
    inputs, labels = encode_pairs(tokenizer, pairs, 10)
    assert labels.tolist() == [1, 0]
    assert inputs["token_type_ids"].tolist() == [[0] * 5 + [1] * 2 + [0] * 3, [0] * 3 + [1] * 3 + [0] * 4]
    assert inputs["attention_mask"].sum(1).tolist() == [7, 6]
    assert tokenizer.decode(inputs["input_ids"][0][:7]) == "[CLS] the sentence number [SEP] apples [SEP]"
    tokenizer.save_pretrained(tmp_path)
    again, _ = encode_pairs(AutoTokenizer.from_pretrained(tmp_path), pairs, 10)
    assert all(torch.equal(again[name], inputs[name]) for name in inputs)
    cut, _ = encode_pairs(tokenizer, make_pairs(PLAIN)[0], 8)
    assert cut["input_ids"].shape[1] == 8


def test_bad_tasks_get_one_line():
    with pytest.raises(InputError, match="successor or order"):
        make_pairs(PLAIN, "rhyme")
    with pytest.raises(InputError, match="too few"):
        make_pairs(PLAIN[:5])
    with pytest.raises(InputError, match="vocabulary"):
        word_tokenizer(PLAIN, size=5)
    with pytest.raises(InputError, match="8 tokens"):
        encode_pairs(word_tokenizer(PLAIN), make_pairs(PLAIN)[0], 4)
    with pytest.raises(InputError, match="no text"):
        sentences("no such thing")


def test_an_encoder_is_pretrained_and_learns_a_task():
    tokenizer = word_tokenizer(PLAIN)
    inputs, labels = encode_pairs(tokenizer, make_pairs(PLAIN)[0], 24)
    encoder = small_encoder(len(tokenizer), **SMALL)
    batches = list(pretraining_batches(inputs, labels, mask=4, batch=16, steps=40))
    asked = torch.cat([words >= 0 for _, words, _ in batches])
    ids = torch.cat([part["input_ids"] for part, _, _ in batches])
    words = torch.cat([words for _, words, _ in batches])
    assert 0.1 < float(asked.sum() / (torch.where(asked, words, ids) > 4).sum()) < 0.2
    assert 0.7 < float((ids[asked] == 4).float().mean()) < 0.9
    curve = train(encoder, batches, Plan(40, lr=3e-3, warmup=5), loss=pretraining_loss).curve
    assert curve[-1]["loss"] < 0.8 * curve[0]["loss"]
    easy = (inputs["input_ids"] == tokenizer.convert_tokens_to_ids("3")).any(1).long()
    model = classifier(encoder)
    start = evaluate(model, inputs, easy)
    train(model, class_batches(inputs, easy, 16, 80), Plan(80, lr=3e-3, warmup=5), loss=sequence_loss)
    accuracy, loss = evaluate(model, inputs, easy)
    assert loss < 0.5 * start[1]
    assert accuracy > 0.9


def test_a_classifier_takes_over_the_encoder_and_draws_its_head_by_the_seed(tmp_path):
    encoder = small_encoder(50, **SMALL)
    first, second, other = (classifier(encoder, 3, seed) for seed in (0, 0, 1))
    for name, value in encoder.base_model.state_dict().items():
        assert torch.equal(first.base_model.state_dict()[name], value)
    assert first.classifier.weight.shape == (3, 32)
    assert torch.equal(first.classifier.weight, second.classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    first.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded.classifier.weight, first.classifier.weight)


def test_an_encoder_from_a_folder_without_a_pooler_gets_one(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, num_attention_heads=4, **SMALL)
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    model = classifier(tmp_path)
    out = model(torch.arange(8)[None])
    assert out.logits.shape == (1, 2)
    assert bool(out.logits.isfinite().all())


def test_bad_encoders_get_one_line(tmp_path):
    with pytest.raises(ModelError, match="no folder"):
        classifier(tmp_path / "missing")
    with pytest.raises(ModelError, match="cannot load an encoder"):
        classifier(tmp_path)
    with pytest.raises(InputError, match="two classes"):
        classifier(small_encoder(50, **SMALL), classes=1)
    with pytest.raises(InputError, match="small encoder"):
        small_encoder(50, hidden_size=30)
    assert classifier(tiny_model("llama")).config.num_labels == 2  # a decoder's classifier reads the last token
