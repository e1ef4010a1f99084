"""Class names, prompts, background prompts and colours per data set: constants only."""

IGNORE_INDEX = 255

MINIVOC_CLASSES = (
    "aeroplane",
    "bird",
    "boat",
    "bottle",
    "car",
    "cat",
    "chair",
    "fish",
    "person",
    "plant",
    "train",
    "tv",
)
MINIVOC_BACKGROUNDS = ("grass", "sky", "water", "road", "wall", "sand", "snow", "railway")


def _voc_colormap(count: int) -> tuple[tuple[int, int, int], ...]:
    """The VOC devkit's palette: bits of the class id, spread over the high bits of R, G, B."""
    colours = []
    for class_id in range(count):
        rgb, bits = [0, 0, 0], class_id
        for shift in range(7, -1, -1):
            for channel in range(3):
                rgb[channel] |= ((bits >> channel) & 1) << shift
            bits >>= 3
        colours.append(tuple(rgb))
    return tuple(colours)


VOC_COLORMAP = _voc_colormap(256)
MINIVOC_COLORMAP = VOC_COLORMAP
