"""How many mutated inputs ended how, by command; pytest prints the counts."""

from collections import Counter

OUTCOMES: Counter[str] = Counter()
