"""Dense CRF: sharpen class probabilities along the edges of their picture.

This is the mean-field inference of Krähenbühl and Koltun (NIPS 2011). Its filters use the
permutohedral lattice of Adams et al. (Eurographics 2010), a grid of simplices in feature space.
Pixels are spread onto its corners, blurred along each axis, and gathered. Here each step is a
sparse matrix, so nothing is compiled. The results equal pydensecrf's (tests/test_crf.py).
"""

from functools import lru_cache

import numpy as np
from jaxtyping import Float, Int, UInt8
from scipy.sparse import csr_matrix, identity

from weclip_lib.config import CRF

SMALLEST = 1e-5  # smallest probability, so that its logarithm is finite
POINTS_AT_ONCE = 2**15  # points whose simplices are in memory together: some 30 MB
VALUES_AT_ONCE = 2**25  # filtered together: 128 MB; large pictures take a few channels at a time


def _elevated(
    features: Float[np.ndarray, "point dim"],
) -> Float[np.ndarray, "point corner"]:
    """Map points to the plane where coordinates sum to 0, scaled so that blur has deviation 1."""
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
    """Find the corners of each point's simplex, and the point's barycentric weights.

    Returns:
        Integer coordinates with sum 0, in the last axis; and the weights.
    """
    points, width = elevated.shape
    dim = width - 1
    # Find the nearest corner of colour 0, and the order of the distances to it.
    rounded = np.round(elevated / width).astype(np.int32)
    nearest, excess = rounded * width, rounded.sum(axis=1, keepdims=True, dtype=np.int32)
    order = np.argsort(nearest - elevated, axis=1, kind="stable")
    rank = np.empty_like(rounded)
    numbers = np.arange(width, dtype=np.int32)
    np.put_along_axis(rank, order, numbers[None].repeat(points, 0), axis=1)
    rank += excess
    wrap = np.where(rank < 0, width, np.where(rank > dim, -width, 0)).astype(np.int32)
    rank, nearest = rank + wrap, nearest + wrap
    # The weights are the differences between successive distances, in the order of rank.
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
    """Build the lattice around some points.

    Returns:
        The weight of every corner (a column) for every point (a row); a number for each corner, in
        rising order; and the change of this number for a step along each coordinate but the last.
    """
    elevated = _elevated(features.astype(np.float64))
    points, width = elevated.shape
    # Corners are within two widths of their points. Their neighbours are within three.
    low = np.floor(elevated.min(axis=0)).astype(np.int64) - 3 * width
    spans = np.ceil(elevated.max(axis=0)).astype(np.int64) + 3 * width + 1 - low
    places = np.cumprod(np.concatenate([[1], spans[:-2]]))  # the others give the last
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
    """A Gaussian filter of deviation 1 over features, with symmetric normalisation.

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
    """Replace scores by their probabilities, in place."""
    scores -= scores.max(axis=1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=1, keepdims=True)
    return scores


@lru_cache(maxsize=8)
def _near(height: int, width: int, deviation: float) -> GaussianFilter:
    """Build a filter over positions only; all pictures of one size share it."""
    return GaussianFilter(_positions(height, width) / deviation)


def dense_crf(
    probabilities: Float[np.ndarray, "cls height width"],
    image: UInt8[np.ndarray, "image_h image_w 3"],
    settings: CRF = CRF(),
) -> Float[np.ndarray, "cls height width"]:
    """Return class probabilities after mean-field inference.

    Args:
        probabilities: In [0, 1], at the picture's size.
        image: RGB, 0 to 255.
        settings: Deviations in pixels and in steps of RGB, weights, and the number of iterations.

    Raises:
        ValueError: If the picture and the probabilities have different sizes.
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
