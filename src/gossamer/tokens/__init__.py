"""Methods that drop, merge or summarise tokens."""
