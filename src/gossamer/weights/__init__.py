"""Methods that prune, mask, slice and restructure weights."""
