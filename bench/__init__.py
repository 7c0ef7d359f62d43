"""What the pack costs, as ratios and counts measured in one run: `make bench`."""
