"""The draft–verify engine, drafters and acceptance rules."""
