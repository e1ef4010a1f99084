from io import BytesIO

import numpy as np
from PIL import Image

from weclip_lib.figures import panels
from weclip_lib.figures.plotting import colours


def test_label_colours_are_mixed_not_wrapped_around() -> None:
    """Two thirds colour, one third picture; background as it is."""
    under = np.full((2, 2, 3), 90, np.uint8)
    label = np.array([[0, 2], [2, 0]])
    shown = panels.label_map(label, colours(3), under)
    half = panels.SIDE // 2
    assert shown[0, 0].tolist() == [90, 90, 90]
    colour = colours(3)[2].tolist()
    assert shown[0, half + 1].tolist() == [(90 + 2 * value) // 3 for value in colour]


def test_a_class_has_its_own_colour_whatever_is_asked() -> None:
    classes = ("a", "b", "c")
    table = panels.word_colours(("c", "other"), classes)
    assert (table[1] == colours(4)[3]).all()
    assert (table[0] == 0).all() and (table[255] == 255).all()
    assert not any((table[2] == colours(4)[number]).all() for number in range(4))


def test_boxes_darken_what_is_outside() -> None:
    picture = np.full((8, 8, 3), 200, np.uint8)
    inside = np.zeros((4, 4), bool)
    inside[1:3, 1:3] = True
    shown = panels.boxes(picture, inside)
    quarter = panels.SIDE // 4
    assert shown[5, 5].tolist() == [50, 50, 50]
    assert tuple(shown[quarter, quarter].tolist()) == panels.OUTLINE
    assert shown[2 * quarter, 2 * quarter].tolist() == [200, 200, 200]


def test_sheet_and_png() -> None:
    pictures = [np.full((10, 20, 3), value, np.uint8) for value in (10, 20, 30)]
    sheet, rows, columns = panels.sheet(pictures, 24, 2)
    assert (rows, columns, sheet.shape) == (2, 2, (48, 48, 3))
    assert sheet[4, 26].tolist() == [20] * 3 and sheet[47, 47].tolist() == [255] * 3
    image = Image.open(BytesIO(panels.as_png(sheet)))
    assert (np.array(image) == sheet).all()


def test_bars_escape_names() -> None:
    text = panels.bars([("<script>", 0.25, True)], limit=0.5, mark=0.1)
    assert "&lt;script&gt;" in text and "width:50.0%" in text and "left:20.0%" in text
