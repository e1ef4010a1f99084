"""Numbers and devices are refused by name, with what they may be."""

from dataclasses import replace

import pytest
import torch

from weclip_lib.backbone import find_device
from weclip_lib.config import CRF, RFM_RULES, Budget, DecoderShape, Method, in_range, one_of
from weclip_lib.data.profiles import PROFILES


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Budget(steps=0), "steps is 0: give a whole number from 1 to 1000000000"),
        (lambda: Budget(steps=-5), "steps is -5"),
        (lambda: Budget(crop=-80), "crop is -80"),
        (lambda: Budget(learning_rate=-1.0), "learning_rate is -1.0: give a number of 0.0 or more"),
        (lambda: Budget(learning_rate=float("nan")), "learning_rate is nan"),
        (lambda: Method(box_threshold=1.5), "box_threshold is 1.5: give a number from -1.0 to 1.0"),
        (lambda: Method(rfm_layers=0), "rfm_layers is 0"),
        (lambda: Method(template="a photo"), "template is 'a photo': write {} once"),
        (lambda: DecoderShape(dim=100), "dim is 100: give a multiple of the 8 heads"),
        (lambda: DecoderShape(dropout=2.0), "dropout is 2.0"),
        (lambda: CRF(iterations=-1), "iterations is -1"),
        (lambda: replace(PROFILES["mini"], scales=(0.75, 1.0)), "the first has to be 1"),
        (lambda: replace(PROFILES["mini"], scales=()), "the first has to be 1"),
        (lambda: replace(PROFILES["mini"], scales=(1.0, 0.0)), "a scale is 0.0"),
        (lambda: replace(PROFILES["mini"], long_side=-1), "long_side is -1"),
    ],
)
def test_settings_outside_their_range(make, message) -> None:
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)


def test_kinds_of_values() -> None:
    """Types of dataclasses are checked in tests alone; values of files and options here."""
    for value in (2.0, "2", True, None):
        with pytest.raises(ValueError, match=r"batch is .*: give a whole number "):
            in_range("batch", value, 1)
    in_range("rfm_start", 1, 0.0, 1.0)
    with pytest.raises(ValueError, match="rfm_start is True: give a number from"):
        in_range("rfm_start", True, 0.0, 1.0)
    with pytest.raises(ValueError, match="rfm_rule is 'Absolute': choose one of absolute, signed"):
        one_of("rfm_rule", "Absolute", RFM_RULES)


def test_devices() -> None:
    assert find_device("cpu") == torch.device("cpu")
    assert find_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "cuda:99", "CPU"):
        with pytest.raises(
            ValueError, match=f"device is '{name}': give auto, or what is here: cpu"
        ):
            find_device(name)
