"""Sort the pixels of a true mask by class, size of the object, and nearness to an outline.

All of it depends on the mask alone. So it is done once a picture, for any number of predictions.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Integer, UInt8, UInt16
from scipy.ndimage import find_objects, label

from weclip_lib.labels import IGNORE_INDEX
from weclip_lib.ops.metrics import PIXELS_AT_ONCE, check_ids

BAND = 2  # pixels; this near an outline, a pixel counts for the boundary mIoU
SIZES = ("small", "medium", "large")
SIZE_LIMITS = (32**2, 96**2)  # pixels of an object in a picture of SIZE_FRAME pixels; COCO
SIZE_FRAME = 640 * 480  # pixels of COCO's usual picture
TOUCHING = np.ones((3, 3), bool)  # pixels that touch at a corner are of one object, too
# A cell is a class, a size (0: no object) and whether an outline is near, in one number.
CELLS_OF_CLASS = 2 * (1 + len(SIZES))
ENTRY = np.dtype([("picture", "<u4"), ("cell", "<u2"), ("predicted", "u1"), ("pixels", "<u4")])
Mask = UInt8[np.ndarray, "height width"]


def near_outline(mask: Mask, width: int = BAND) -> Bool[np.ndarray, "height width"]:
    """Find pixels with another value within `width` pixels, on both axes (chessboard distance).

    IGNORE_INDEX is another value: in VOC it lies between an object and the background, and is the
    outline. The edge of the picture is none.
    Source: the trimap of Chen et al. 2015 (arXiv 1412.7062, section 5, "Mean Pixel IOU along Object
    Boundaries"), a band around the void pixels of VOC; they draw it with 2 pixels, too. They do
    not name the distance. This is the one of Boundary IoU's code (Cheng et al. 2021), which erodes
    masks by squares.
    """
    return _extreme(mask, width, np.maximum) != _extreme(mask, width, np.minimum)


def _extreme(mask: Mask, width: int, extreme: np.ufunc) -> Mask:
    """Return the highest or lowest value in a square of 2 * width + 1 pixels around each pixel."""
    for _ in range(2):  # both axes; shifts of whole rows are faster than filters of scipy
        padded = np.pad(mask, ((width, width), (0, 0)), mode="edge")
        found = padded[: len(mask)].copy()
        for start in range(1, 2 * width + 1):
            extreme(found, padded[start : start + len(mask)], out=found)
        mask = np.ascontiguousarray(found.T)
    return mask


def object_sizes(mask: Mask) -> UInt8[np.ndarray, "height width"]:
    """Return the size of the object of every pixel: 1 small, 2 medium, 3 large; 0: no object.

    An object is a connected component of a class; pixels that touch at a corner are connected. So
    two objects of a class that touch are one, and one that is cut by another is two. Its size is
    its share of the picture. The limits are COCO's, 32² and 96² pixels, as shares of a picture
    of 640x480: 1/300 and 3/100. A larger copy of a picture has the same sizes.
    """
    sizes = np.zeros(mask.shape, np.uint8)
    limits = np.array(SIZE_LIMITS) * mask.size
    boxes = find_objects(np.where(mask == IGNORE_INDEX, 0, mask).astype(np.int32))
    for class_id, box in enumerate(boxes, start=1):
        if box is None:
            continue
        objects, _ = label(mask[box] == class_id, TOUCHING)
        areas = np.bincount(objects.ravel())
        size = 1 + np.searchsorted(limits, areas * SIZE_FRAME, side="right").astype(np.uint8)
        size[0] = 0  # all but the class
        sizes[box] += size[objects]
    return sizes


@dataclass(frozen=True)
class Regions:
    """The known pixels of a mask, in regions; all pixels of a region have one cell."""

    known: Bool[np.ndarray, "height width"]
    region: UInt16[np.ndarray, " pixel"]  # of every known pixel
    cells: UInt16[np.ndarray, " region"]
    class_count: int

    def count(self, found: Integer[np.ndarray, "height width"]) -> np.ndarray:
        """Count the known pixels by cell and predicted class; return an ENTRY a pair that occurs.

        Raises:
            ValueError: If a prediction is outside 0 to class_count - 1.
        """
        assert found.shape == self.known.shape
        predicted, count = found[self.known], self.class_count
        check_ids("prediction", predicted, count)
        table = np.zeros(len(self.cells) * count, np.int64)
        for start in range(0, len(predicted), PIXELS_AT_ONCE):
            part = slice(start, start + PIXELS_AT_ONCE)
            pairs = self.region[part].astype(np.intp) * count + predicted[part]
            table += np.bincount(pairs, minlength=len(table))
        filled = np.flatnonzero(table)
        entries = np.zeros(len(filled), ENTRY)
        entries["cell"], entries["predicted"] = self.cells[filled // count], filled % count
        entries["pixels"] = table[filled]
        return entries


def regions_of(mask: Mask, class_count: int) -> Regions:
    """Sort the known pixels of a mask into regions.

    Args:
        class_count: Number of classes with background.

    Raises:
        ValueError: If the mask holds another class id than IGNORE_INDEX outside of them.
    """
    known = mask != IGNORE_INDEX
    check_ids("truth", mask[known], class_count)
    size, near = object_sizes(mask), near_outline(mask)
    cell = (mask.astype(np.uint16) * CELLS_OF_CLASS + 2 * size + near)[known]
    present = np.bincount(cell, minlength=1) > 0
    cells = np.flatnonzero(present).astype(np.uint16)
    region = (np.cumsum(present) - 1).astype(np.uint16)
    return Regions(known, region[cell], cells, class_count)
