"""Names that the code inside and outside the sandbox shares."""

NOBODY = 65534
DEVICES = ("null", "zero", "full", "random", "urandom")
