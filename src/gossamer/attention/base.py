"""The base of this family's methods (see `gossamer.policies`)."""

from gossamer.policies import PolicyHandle as AttentionHandle
from gossamer.policies import PolicyMethod as AttentionMethod
from gossamer.policies import attach

__all__ = ["AttentionHandle", "AttentionMethod", "attach"]
