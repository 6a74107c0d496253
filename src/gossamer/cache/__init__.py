"""Methods that choose what the KV cache keeps, where, and at which precision."""
