"""Class names, prompts, background prompts and colours per data set: constants only."""

from dataclasses import dataclass, field

IGNORE_INDEX = 255


def _channel(class_id: int, first: int) -> int:
    """Return every third bit of a class id, from bit `first`, as the high bits of a byte."""
    return sum((class_id >> (3 * place + first) & 1) << (7 - place) for place in range(3))


# RGB by class_id, from the VOC devkit's palette; IGNORE_INDEX has the colour (224, 224, 192).
COLORMAP = tuple((_channel(i, 0), _channel(i, 1), _channel(i, 2)) for i in range(256))


@dataclass(frozen=True)
class LabelSet:
    """The words of a data set. The prompt of a class is its name, if `prompts` has no other."""

    name: str
    classes: tuple[str, ...]  # foreground, in the order of their ids 1 to C
    backgrounds: tuple[str, ...]  # prompts of things that are never a class
    prompts: dict[str, str] = field(default_factory=dict)

    @property
    def class_prompts(self) -> tuple[str, ...]:
        """Return the text of each class for the template."""
        return tuple(self.prompts.get(name, name) for name in self.classes)

    @property
    def class_count(self) -> int:
        """Count the foreground classes and the background."""
        return 1 + len(self.classes)


VOC_CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
# Official clip/clip_text.py; REFERENCE, Settings.
VOC_PROMPTS = {
    "bird": "bird avian",
    "chair": "chair seat",
    "person": "person with clothes,people,human",
    "tvmonitor": "tvmonitor screen",
}
VOC_BACKGROUNDS = (
    "ground",
    "land",
    "grass",
    "tree",
    "building",
    "wall",
    "sky",
    "lake",
    "water",
    "river",
    "sea",
    "railway",
    "railroad",
    "keyboard",
    "helmet",
    "cloud",
    "house",
    "mountain",
    "ocean",
    "road",
    "rock",
    "street",
    "valley",
    "bridge",
    "sign",
)

COCO_CLASSES = (
    "person",
    "bicycle",
    "car",
    "motorcycle",
    "airplane",
    "bus",
    "train",
    "truck",
    "boat",
    "traffic light",
    "fire hydrant",
    "stop sign",
    "parking meter",
    "bench",
    "bird",
    "cat",
    "dog",
    "horse",
    "sheep",
    "cow",
    "elephant",
    "bear",
    "zebra",
    "giraffe",
    "backpack",
    "umbrella",
    "handbag",
    "tie",
    "suitcase",
    "frisbee",
    "skis",
    "snowboard",
    "sports ball",
    "kite",
    "baseball bat",
    "baseball glove",
    "skateboard",
    "surfboard",
    "tennis racket",
    "bottle",
    "wine glass",
    "cup",
    "fork",
    "knife",
    "spoon",
    "bowl",
    "banana",
    "apple",
    "sandwich",
    "orange",
    "broccoli",
    "carrot",
    "hot dog",
    "pizza",
    "donut",
    "cake",
    "chair",
    "couch",
    "potted plant",
    "bed",
    "dining table",
    "toilet",
    "tv",
    "laptop",
    "mouse",
    "remote",
    "keyboard",
    "cell phone",
    "microwave",
    "oven",
    "toaster",
    "sink",
    "refrigerator",
    "book",
    "clock",
    "vase",
    "scissors",
    "teddy bear",
    "hair drier",
    "toothbrush",
)
# The official code also spells `sknowboard`.
COCO_PROMPTS = {
    "person": "person with clothes,people,human",
    "bird": "bird avian",
    "backpack": "backpack,bag",
    "umbrella": "umbrella,parasol",
    "handbag": "handbag,purse",
    "tie": "necktie",
    "snowboard": "sknowboard",
    "baseball glove": "glove",
    "spoon": "dessertspoon",
    "chair": "chair seat",
    "tv": "tvmonitor screen",
    "remote": "remote control",
    "hair drier": "hairdrier,blowdrier",
    "motorcycle": "motorbike",
    "airplane": "aeroplane",
    "couch": "sofa",
    "potted plant": "pottedplant",
    "dining table": "diningtable",
}
COCO_BACKGROUNDS = tuple(name for name in VOC_BACKGROUNDS if name not in ("keyboard", "sign"))

# VOC's, in words of a small vocabulary.
_PLAIN_WORDS = {"diningtable": "table", "pottedplant": "plant", "tvmonitor": "tv"}
MINIVOC_CLASSES = tuple(_PLAIN_WORDS.get(name, name) for name in VOC_CLASSES)
MINIVOC_1_CLASSES = (  # of version 1
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

VOC = LabelSet("VOC 2012", VOC_CLASSES, VOC_BACKGROUNDS, VOC_PROMPTS)
COCO = LabelSet("COCO 2014", COCO_CLASSES, COCO_BACKGROUNDS, COCO_PROMPTS)
MINIVOC = LabelSet("MiniVOC", MINIVOC_CLASSES, MINIVOC_BACKGROUNDS)
MINIVOC_1 = LabelSet("MiniVOC 1", MINIVOC_1_CLASSES, MINIVOC_BACKGROUNDS)
