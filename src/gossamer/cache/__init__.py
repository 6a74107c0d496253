"""Methods that choose what the KV cache keeps, where, and at which precision.

Importing this package registers them; a new one is a file here and a line below.
"""

from gossamer.cache import a2sf, ems, h2o, rtn_kv, sliding_window, snapkv, tova
from gossamer.cache.base import CacheMethod

__all__ = ["CacheMethod", "a2sf", "ems", "h2o", "rtn_kv", "sliding_window", "snapkv", "tova"]
