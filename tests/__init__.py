"""The tests; `check` is their run-time type checker: beartype that takes an int for a float."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
