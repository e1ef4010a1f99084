import numpy as np

from weclip_lib.evaluation.errors import KINDS, errors, outline, picture_errors
from weclip_lib.labels import IGNORE_INDEX


def scene() -> np.ndarray:
    """A 10x10 object of class 2 amid 30x30 pixels; void at one corner."""
    mask = np.zeros((30, 30), np.uint8)
    mask[10:20, 10:20] = 2
    mask[:2, :2] = IGNORE_INDEX
    return mask


def test_outline_by_hand() -> None:
    near = outline(scene(), 3)
    assert near[7, 15] and near[12, 15] and not near[6, 15] and not near[13, 15]
    assert not near[:3, :3].any()  # void is no outline


def test_every_wrong_pixel_is_of_one_kind() -> None:
    mask = scene()
    found = mask.copy()
    found[mask == IGNORE_INDEX] = 1
    found[13:15, 13:17] = 0  # 8 inside
    found[15:17, 13:17] = 1  # 8 inside
    found[25:28, 0:4] = 2  # 12 far away
    found[9, 10:20] = 2  # 10 along the outline
    kinds = errors(found, mask)
    assert [int(kinds[kind].sum()) for kind in KINDS] == [8, 8, 12, 10]
    assert (sum(kinds.values()) == ((found != mask) & (mask != IGNORE_INDEX))).all()


def test_the_worst_comes_first() -> None:
    mask = scene()
    good, bad = mask.copy(), np.zeros_like(mask)
    good[mask == IGNORE_INDEX] = 0
    rows = picture_errors([good, bad], [mask, mask], ["good", "bad"], 3)
    assert [row.name for row in rows] == ["bad", "good"]
    assert rows[1].miou == 100 and set(rows[1].share.values()) == {0}
    # background: 796 of 896 known; class 2: none
    assert np.isclose(rows[0].miou, 100 * (796 / 896) / 2)
    assert np.isclose(rows[0].share["missed"], 100 * 16 / 896)
    assert np.isclose(rows[0].share["boundary"], 100 * 84 / 896)
