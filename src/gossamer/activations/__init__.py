"""Methods that skip neurons and channels."""
