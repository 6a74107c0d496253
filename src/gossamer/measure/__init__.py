"""Quality, cost and reports, by one yardstick for all methods."""
