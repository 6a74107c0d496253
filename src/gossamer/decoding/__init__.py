"""Methods that draft several tokens and verify them at once.

Importing this package registers them; a new one is a file here and a line below.
"""

from gossamer.decoding.base import (
    AcceptanceMethod,
    Context,
    Draft,
    Drafter,
    DraftingMethod,
    Match,
    Rule,
    Target,
    Verdict,
)
from gossamer.decoding.cost import ForwardCost, cost_of
from gossamer.decoding.eagle import Eagle
from gossamer.decoding.early_exit import EarlyExit
from gossamer.decoding.engine import DecodingStats, Engine
from gossamer.decoding.guidance import Guidance
from gossamer.decoding.lantern import RelaxedAcceptance
from gossamer.decoding.lookup import PromptLookup
from gossamer.decoding.ppd import PPD
from gossamer.decoding.rules import (
    KSeq,
    KSeqMethod,
    LPOptimum,
    LPOptimumMethod,
    RecursiveRejection,
    RecursiveRejectionMethod,
    SpeculativeSampling,
    SpeculativeSamplingMethod,
    Typical,
    TypicalAcceptance,
)
from gossamer.decoding.sizing import Sizer
from gossamer.decoding.spectr import SpecTr, SpecTrDrafter, spectr_generate
from gossamer.decoding.token_recycling import TokenRecycling

__all__ = [
    "PPD",
    "AcceptanceMethod",
    "Context",
    "DecodingStats",
    "Draft",
    "Drafter",
    "DraftingMethod",
    "Eagle",
    "EarlyExit",
    "Engine",
    "ForwardCost",
    "Guidance",
    "KSeq",
    "KSeqMethod",
    "LPOptimum",
    "LPOptimumMethod",
    "Match",
    "PromptLookup",
    "RecursiveRejection",
    "RecursiveRejectionMethod",
    "RelaxedAcceptance",
    "Rule",
    "Sizer",
    "SpecTr",
    "SpecTrDrafter",
    "SpeculativeSampling",
    "SpeculativeSamplingMethod",
    "Target",
    "TokenRecycling",
    "Typical",
    "TypicalAcceptance",
    "Verdict",
    "cost_of",
    "spectr_generate",
]
