"""What independent drafts are drawn from: another model, the first layers of the same one, or counts of n-grams.

A source follows one text and several continuations of it at once. It says logits; the drafter makes laws of them, by the same
processors as the target's, and draws.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import CalibrationError, InputError, ModelError
from gossamer.hf import AttentionRuntime, GossamerCache
from gossamer.hf.views import text_config
from gossamer.patterns import Tree


class DraftSource:
    """Logits behind a text and behind continuations of it.

    Attributes:
        vocabulary: how many tokens it knows.
    """

    vocabulary: int

    def begin(self, ids: Tensor) -> Tensor:
        """Logits float ``[V]`` behind a text int64 ``[n]``, which most often is an earlier one and a little more."""
        raise NotImplementedError

    def extend(self, tokens: Sequence[int]) -> Tensor:
        """Give each continuation its next token; returns logits ``[K, V]`` behind them. Their number is that of the first call."""
        raise NotImplementedError

    def keep(self, tokens: Sequence[int], nodes: Sequence[int]) -> None:
        """Of what was extended these tokens became text; `nodes` of the tree of chains (see `Tree.of_chains`) hold them."""


def vocabulary_of(model: nn.Module) -> int:
    """Rows of a language-model head.

    Raises:
        ModelError: there is none.
    """
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        raise ModelError(f"{type(model).__name__} has no language-model head")
    return int(head.weight.shape[0])


def sharing_weights(model: nn.Module, layers: int | None = None) -> nn.Module:
    """A model of the same class with the same weights in memory, of its first `layers` layers (None: all of them).

    Final norm and head are the model's own, so fewer layers are an early exit. Nothing is copied, and nothing that is attached to
    the model, or will be, touches the other.

    Raises:
        InputError: there are not so many layers, or none were asked for.
        ModelError: the weights are not those that the class makes (replaced or packed modules).

    >>> from gossamer.models import tiny_model
    >>> model = tiny_model("llama")
    >>> early = sharing_weights(model, 1)
    >>> early.lm_head.weight is model.lm_head.weight, len(early.model.layers)
    (True, 1)
    """
    count = int(text_config(model).num_hidden_layers)
    if layers is not None and not 1 <= layers <= count:
        raise InputError(f"an early exit is behind layer 1 to {count} of this model, got {layers}")
    whole: Any = model
    config = copy.deepcopy(whole.config)
    if config.get_text_config(decoder=True) is not config:
        raise ModelError(f"{type(model).__name__} is not supported: it is more than a language model")
    config.num_hidden_layers = layers or count
    if getattr(config, "layer_types", None):
        config.layer_types = list(config.layer_types)[: config.num_hidden_layers]
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        made: nn.Module = type(whole)(config)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    for path, module in made.named_modules():
        for own, theirs in ((module._parameters, parameters), (module._buffers, buffers)):
            for name, tensor in own.items():
                full = f"{path}.{name}" if path else name
                if tensor is None:
                    continue
                if full not in theirs or theirs[full].shape != tensor.shape:
                    raise ModelError(f"{type(model).__name__} cannot be shared: its {full} was replaced")
                own[name] = theirs[full]
    return made.eval()


class ModelSource(DraftSource):
    """A language model, whose rows of accepted drafts stay in its cache and whose other rows leave it.

    All continuations are read in one forward a position, behind the text's rows, which are there once.

    Args:
        model: is not touched; the source reads another one with the same weights (see `sharing_weights`).
        layers: of it; None for all.
    """

    def __init__(self, model: nn.Module, layers: int | None = None) -> None:
        self.vocabulary = vocabulary_of(model)
        self.model: Any = sharing_weights(model, layers)
        self.runtime = AttentionRuntime(self.model)
        self.device = next(self.model.parameters()).device
        self.cache: Any = GossamerCache()
        self.text: list[int] = []
        self.rows = 0  # of continuations, behind the text's

    def begin(self, ids: Tensor) -> Tensor:
        """As `DraftSource`; only what was not read yet is read."""
        text, same = ids.tolist(), 0
        most = min(len(text) - 1, len(self.text))
        while same < most and text[same] == self.text[same]:
            same += 1
        extra = self.cache.get_seq_length() - same
        if extra:
            self.cache.crop(-extra)
        unread = ids[None, same:].to(self.device)
        logits: Tensor = self.model(unread, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        self.text, self.rows = text, 0
        return logits.float()

    def extend(self, tokens: Sequence[int]) -> Tensor:
        """As `DraftSource`: the next nodes of a tree of chains whose root is the text's last token."""
        count = len(tokens)
        depth = self.rows // count
        tree = Tree.of_chains(count, depth + 1)
        positions = torch.full((1, count), len(self.text) + depth, device=self.device)
        with self.runtime.tree_forward(tree, read=1 + self.rows):
            given = torch.tensor([tokens], device=self.device)
            logits: Tensor = self.model(
                given, past_key_values=self.cache, use_cache=True, position_ids=positions
            ).logits[0]
        self.rows += count
        return logits.float()

    def keep(self, tokens: Sequence[int], nodes: Sequence[int]) -> None:
        """As `DraftSource`; nodes of the last depth were never read."""
        rows = [node - 1 for node in nodes if node <= self.rows]
        for layer in self.cache.layers:
            layer.accept(len(self.text), torch.tensor(rows, dtype=torch.long))
        self.text, self.rows = self.text + list(tokens[: len(rows)]), 0


class NGrams:
    """Counts of n-grams, mixed from the longest to the shortest that the text behind has been seen with.

        law_n(y | c) = (1 - share) law_{n-1}(y | c') + share count(c y) / count(c)     where c was seen, else law_{n-1}(y | c')

    c' is c without its first token; below unigrams all tokens are equal. `share` is fixed: 0.9 for unigrams, 0.7 above.

    Args:
        tables: for each length 1, 2, … of n-grams int64 ``[rows, length + 1]``: the tokens, and how often they were seen; rows
            ascend in their tokens.
        vocabulary: number of tokens.

    >>> grams = NGrams.count(torch.tensor([[0, 1, 0, 1, 0, 2]]), order=2, vocabulary=4)
    >>> law = grams.law([3, 0])
    >>> round(float(law.sum()), 6), int(law.argmax()), bool((law > 0).all())
    (1.0, 1, True)
    """

    SHARES = 0.9, 0.7

    def __init__(self, tables: Sequence[Tensor], vocabulary: int) -> None:
        self.tables, self.vocabulary = list(tables), vocabulary
        for length, table in enumerate(self.tables, 1):
            right = table.ndim == 2 and table.shape[1] == length + 1 and not table.is_floating_point()
            if not right or not len(table) or int(table[:, :-1].min()) < 0 or int(table[:, :-1].max()) >= vocabulary:
                raise CalibrationError(
                    f"these are no counts of {length}-grams over {vocabulary} tokens: calibrate again"
                )
            if int(table[:, -1].min()) < 1:
                raise CalibrationError(f"counts of {length}-grams are at least 1: calibrate again")
        # The rows of each context stand together: where they begin and end.
        self.places: list[dict[tuple[int, ...], tuple[int, int]]] = []
        for table in self.tables:
            contexts, counts = (
                table[:, :-2].unique_consecutive(dim=0, return_counts=True)
                if table.shape[1] > 2
                else (
                    torch.empty(1, 0, dtype=torch.long),
                    torch.tensor([len(table)]),
                )
            )
            ends = counts.cumsum(0)
            spans = zip((ends - counts).tolist(), ends.tolist(), strict=True)
            self.places.append(dict(zip(map(tuple, contexts.tolist()), spans, strict=True)))

    @classmethod
    def count(cls, tokens: Tensor, order: int, vocabulary: int) -> NGrams:
        """Count in blocks of tokens, integer ``[count, block]``; n-grams never reach over two blocks.

        Raises:
            InputError: tokens that are no integer matrix, blocks shorter than an n-gram, or tokens of another vocabulary.
        """
        if tokens.ndim != 2 or not tokens.numel() or tokens.is_floating_point() or order < 1 or tokens.shape[1] < order:
            raise InputError(f"n-grams of {order} are counted in integer blocks [count, {order} or more]")
        if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
            raise InputError(f"these tokens are not of a vocabulary of {vocabulary}")
        tables = []
        for length in range(1, order + 1):
            grams, counts = tokens.long().unfold(1, length, 1).reshape(-1, length).unique(dim=0, return_counts=True)
            tables.append(torch.cat([grams, counts[:, None]], dim=1))
        return cls(tables, vocabulary)

    def law(self, text: Sequence[int]) -> Tensor:
        """float64 ``[V]``: the law of what follows a text, of which the last tokens count."""
        law = torch.full((self.vocabulary,), 1 / self.vocabulary, dtype=torch.float64)
        for length, (table, places) in enumerate(zip(self.tables, self.places, strict=True), 1):
            if len(text) < length - 1:
                break
            span = places.get(tuple(text[len(text) - length + 1 :]))
            if span is None:
                break
            rows, share = table[span[0] : span[1]], self.SHARES[min(length - 1, 1)]
            counts = rows[:, -1].double()
            law *= 1 - share
            law[rows[:, -2]] += share * counts / counts.sum()
        return law


class NGramSource(DraftSource):
    """Drafts from counts of n-grams: a few microseconds, no model.

    Args:
        grams: the counts.
    """

    def __init__(self, grams: NGrams) -> None:
        self.grams, self.vocabulary = grams, grams.vocabulary
        self.ends: list[list[int]] = []

    def begin(self, ids: Tensor) -> Tensor:
        """As `DraftSource`."""
        self.ends = [ids[-len(self.grams.tables) :].tolist()]
        return self.grams.law(self.ends[0]).log().float()

    def extend(self, tokens: Sequence[int]) -> Tensor:
        """As `DraftSource`."""
        ends = self.ends * len(tokens) if len(self.ends) == 1 else self.ends
        self.ends = [[*end, token] for end, token in zip(ends, tokens, strict=True)]
        return torch.stack([self.grams.law(end).log().float() for end in self.ends])
