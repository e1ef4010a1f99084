"""Dense CRF: sharpen class probabilities along the edges of the picture they were predicted for.

Mean-field inference of Krähenbühl and Koltun (NIPS 2011), filters by the permutohedral lattice of
Adams et al. (Eurographics 2010): pixels are spread onto the corners of a grid of simplices that
tile the space of features, blurred there along each axis, and gathered. Each step is a sparse
matrix here, so that nothing has to be compiled. Equal to pydensecrf (tests/test_crf.py).
"""

from functools import lru_cache

import numpy as np
from jaxtyping import Float, Int, UInt8
from scipy.sparse import csr_matrix, identity

from weclip_lib.config import CRF

SMALLEST = 1e-5  # of a probability, so that its logarithm is finite
POINTS_AT_ONCE = 2**15  # whose simplices are held together: some 30 MB
VALUES_AT_ONCE = 2**25  # filtered together: 128 MB; of large pictures, not all channels at once


def _elevated(
    features: Float[np.ndarray, "point dim"],
) -> Float[np.ndarray, "point corner"]:
    """Onto the plane whose coordinates sum to 0, so that blurring there has unit deviation."""
    points, dim = features.shape
    steps = np.arange(1, dim + 1)
    scaled = features * (np.sqrt(2 / 3) * (dim + 1) / np.sqrt(steps * (steps + 1)))
    tails = np.cumsum(scaled[:, ::-1], axis=1)[:, ::-1]
    elevated = np.concatenate([tails, np.zeros((points, 1))], axis=1)
    elevated[:, 1:] -= steps * scaled
    return elevated


def _simplex(
    elevated: Float[np.ndarray, "point corner"],
) -> tuple[Int[np.ndarray, "point corner corner"], Float[np.ndarray, "point corner"]]:
    """Corners of the simplex that each point lies in, and the point's barycentric weights.

    Returns:
        Integer coordinates, in the last axis, which sum to 0; and the weights.
    """
    points, width = elevated.shape
    dim = width - 1
    # The nearest corner of colour 0, and the order of the distances to it.
    rounded = np.round(elevated / width).astype(np.int32)
    nearest, excess = rounded * width, rounded.sum(axis=1, keepdims=True, dtype=np.int32)
    order = np.argsort(nearest - elevated, axis=1, kind="stable")
    rank = np.empty_like(rounded)
    numbers = np.arange(width, dtype=np.int32)
    np.put_along_axis(rank, order, numbers[None].repeat(points, 0), axis=1)
    rank += excess
    wrap = np.where(rank < 0, width, np.where(rank > dim, -width, 0)).astype(np.int32)
    rank, nearest = rank + wrap, nearest + wrap
    # In the order of rank, successive differences of the distances are the weights.
    distance = np.zeros((points, width + 1))
    np.put_along_axis(distance, dim - rank, (elevated - nearest) / width, axis=1)
    weights = distance[:, :width] - np.roll(distance, 1, axis=1)[:, :width]
    weights[:, 0] += 1 - distance[:, dim]
    colours = numbers[:, None]
    canonical = np.where(numbers <= dim - colours, colours, colours - width)
    return nearest[:, None] + canonical[:, rank].swapaxes(0, 1), weights


def _lattice(
    features: Float[np.ndarray, "point dim"],
) -> tuple[csr_matrix, Int[np.ndarray, " known"], Int[np.ndarray, " dim"]]:
    """The lattice around some points.

    Returns:
        The weight of every corner (a column) for every point (a row); a number for each corner, in
        rising order; and by how much a step along each coordinate but the last changes it.
    """
    elevated = _elevated(features.astype(np.float64))
    points, width = elevated.shape
    # Corners are within two widths of their points; their neighbours, within three.
    low = np.floor(elevated.min(axis=0)).astype(np.int64) - 3 * width
    spans = np.ceil(elevated.max(axis=0)).astype(np.int64) + 3 * width + 1 - low
    places = np.cumprod(np.concatenate([[1], spans[:-2]]))  # the last coordinate follows
    keys = np.empty((points, width), np.int64)
    weights = np.empty((points, width), np.float32)
    for start in range(0, points, POINTS_AT_ONCE):
        some = slice(start, start + POINTS_AT_ONCE)
        corners, weights[some] = _simplex(elevated[some])
        keys[some] = (corners - low)[..., :-1] @ places
    known, found = np.unique(keys.ravel(), return_inverse=True)
    rows = np.arange(0, keys.size + 1, width)
    gather = csr_matrix((weights.ravel(), found, rows), (points, len(known)))
    gather.sort_indices()
    return gather, known, places


class GaussianFilter:
    """A Gaussian of unit deviation over features, normalised symmetrically, for any values.

    Args:
        features: Positions of the points, in standard deviations.
    """

    def __init__(self, features: Float[np.ndarray, "point dim"]) -> None:
        self._gather, known, places = _lattice(features)
        self._spread = self._gather.T.tocsr()
        self._blurs = []
        points, width = len(features), 1 + len(places)
        for axis in range(width):
            step = np.full(width, -1)
            step[axis] = width - 1
            blur = identity(len(known), np.float32, "csr")
            for sign in (1, -1):
                wanted = known + sign * int(step[:-1] @ places)
                at = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
                here = np.flatnonzero(known[at] == wanted)
                half = np.full(len(here), 0.5, np.float32)
                blur = blur + csr_matrix((half, (here, at[here])), blur.shape)
            self._blurs.append(blur)
        self._scale = np.float32(1 / (1 + 2.0 ** (1 - width)))
        total = self._filter(np.ones((points, 1), np.float32))
        self._norm = 1 / np.sqrt(total + 1e-20)

    def _filter(self, values: Float[np.ndarray, "point channel"]) -> np.ndarray:
        values = self._spread @ values
        for blur in self._blurs:
            values = blur @ values
        return self._gather @ values * self._scale

    def __call__(
        self, values: Float[np.ndarray, "point channel"]
    ) -> Float[np.ndarray, "point channel"]:
        """Filter every channel."""
        together = max(1, VALUES_AT_ONCE // max(self._gather.shape))
        found = np.empty_like(values)
        for start in range(0, values.shape[1], together):
            some = slice(start, start + together)
            found[:, some] = self._filter(values[:, some] * self._norm) * self._norm
        return found


def _positions(height: int, width: int) -> Float[np.ndarray, "point 2"]:
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns.ravel(), rows.ravel()], axis=1).astype(np.float64)


def _softmax(scores: Float[np.ndarray, "point channel"]) -> Float[np.ndarray, "point channel"]:
    """Probabilities in the place of their scores."""
    scores -= scores.max(axis=1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=1, keepdims=True)
    return scores


@lru_cache(maxsize=8)
def _near(height: int, width: int, deviation: float) -> GaussianFilter:
    """Filter over positions alone: the same for all pictures of a size."""
    return GaussianFilter(_positions(height, width) / deviation)


def dense_crf(
    probabilities: Float[np.ndarray, "cls height width"],
    image: UInt8[np.ndarray, "image_h image_w 3"],
    settings: CRF = CRF(),
) -> Float[np.ndarray, "cls height width"]:
    """Class probabilities after mean-field inference.

    Args:
        probabilities: In [0, 1], at the picture's size.
        image: RGB, 0 to 255.
        settings: Deviations in pixels and in steps of RGB; weights.

    Raises:
        ValueError: If the picture has another size than the probabilities.
    """
    count, height, width = probabilities.shape
    if image.shape[:2] != (height, width):
        raise ValueError(
            f"the picture has {image.shape[1]}x{image.shape[0]} pixels, the probabilities "
            f"{width}x{height}: enlarge them to the picture's size first"
        )
    where, colours = _positions(height, width), image.reshape(-1, 3).astype(np.float64)
    alike = GaussianFilter(
        np.concatenate([where / settings.bilateral_xy, colours / settings.bilateral_rgb], axis=1)
    )
    near = _near(height, width, settings.gaussian_xy)
    evidence = np.array(probabilities.reshape(count, -1).T, np.float32, order="C")
    np.log(np.maximum(evidence, SMALLEST, out=evidence), out=evidence)
    found = _softmax(evidence.copy())
    for _ in range(settings.iterations):
        message = near(found)
        message *= settings.gaussian_weight
        also = alike(found)
        also *= settings.bilateral_weight
        message += also
        message += evidence
        found = _softmax(message)
    return np.ascontiguousarray(found.T).reshape(count, height, width)
