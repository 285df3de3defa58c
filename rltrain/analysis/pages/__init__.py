"""HTML pages of runs: one file each, with everything inside, that opens from a disk without a network."""
