"""Dense CRF: sharpen class probabilities along the edges of the picture they were predicted for.

Mean-field inference of Krähenbühl and Koltun (NIPS 2011), filters by the permutohedral lattice of
Adams et al. (Eurographics 2010): pixels are spread onto the corners of a grid of simplices that
tile the space of features, blurred there along each axis, and gathered. Each step is a sparse
matrix here, so that nothing has to be compiled. Equal to pydensecrf (tests/test_crf.py).
"""

from functools import lru_cache

import numpy as np
from jaxtyping import Float, UInt8
from scipy.sparse import csr_matrix, identity
from scipy.special import softmax

from weclip_lib.config import CRF

SMALLEST = 1e-5  # of a probability, so that its logarithm is finite


def _simplex(
    features: Float[np.ndarray, "point dim"],
) -> tuple[np.ndarray, Float[np.ndarray, "point corner"]]:
    """Corners of the simplex that each point lies in, and the point's barycentric weights.

    Returns:
        Integer coordinates (point, corner, dim + 1), which sum to 0, and the weights.
    """
    points, dim = features.shape
    # Onto the plane whose coordinates sum to 0, so that blurring there has unit deviation.
    steps = np.arange(1, dim + 1)
    scaled = features * (np.sqrt(2 / 3) * (dim + 1) / np.sqrt(steps * (steps + 1)))
    tails = np.cumsum(scaled[:, ::-1], axis=1)[:, ::-1]
    elevated = np.concatenate([tails, np.zeros((points, 1))], axis=1)
    elevated[:, 1:] -= steps * scaled
    # The nearest corner of colour 0, and the order of the distances to it.
    rounded = np.round(elevated / (dim + 1)).astype(np.int64)
    nearest, excess = rounded * (dim + 1), rounded.sum(axis=1, keepdims=True)
    order = np.argsort(nearest - elevated, axis=1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(dim + 1)[None].repeat(points, 0), axis=1)
    rank += excess
    wrap = np.where(rank < 0, dim + 1, np.where(rank > dim, -dim - 1, 0))
    rank, nearest = rank + wrap, nearest + wrap
    # In the order of rank, successive differences of the distances are the weights.
    distance = np.zeros((points, dim + 2))
    np.put_along_axis(distance, dim - rank, (elevated - nearest) / (dim + 1), axis=1)
    weights = distance[:, : dim + 1] - np.roll(distance, 1, axis=1)[:, : dim + 1]
    weights[:, 0] += 1 - distance[:, dim]
    colours = np.arange(dim + 1)[:, None]
    canonical = np.where(np.arange(dim + 1) <= dim - colours, colours, colours - dim - 1)
    return nearest[:, None] + canonical[:, rank].swapaxes(0, 1), weights


class GaussianFilter:
    """A Gaussian of unit deviation over features, normalised symmetrically, for any values.

    Args:
        features: Positions of the points, in standard deviations.
    """

    def __init__(self, features: Float[np.ndarray, "point dim"]) -> None:
        corners, weights = _simplex(features.astype(np.float64))
        points, count, width = corners.shape
        low = corners.min(axis=(0, 1)) - width  # room for neighbours
        spans = corners.max(axis=(0, 1)) + width + 1 - low
        places = np.cumprod(np.concatenate([[1], spans[:-2]]))  # the last coordinate follows
        keys = ((corners - low)[..., :-1] * places).sum(axis=-1)
        known, found = np.unique(keys.ravel(), return_inverse=True)
        rows = np.repeat(np.arange(points), count)
        shape = (points, len(known))
        self._gather = csr_matrix((weights.ravel().astype(np.float32), (rows, found)), shape)
        self._spread = self._gather.T.tocsr()
        self._blurs = []
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
        return self._filter(values * self._norm) * self._norm


def _positions(height: int, width: int) -> Float[np.ndarray, "point 2"]:
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns.ravel(), rows.ravel()], axis=1).astype(np.float64)


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
    flat = np.ascontiguousarray(probabilities.reshape(count, -1).T, np.float32)
    evidence = np.log(np.maximum(flat, SMALLEST))
    found = softmax(evidence, axis=1)
    for _ in range(settings.iterations):
        message = settings.gaussian_weight * near(found) + settings.bilateral_weight * alike(found)
        found = softmax(evidence + message, axis=1)
    return np.ascontiguousarray(found.T).reshape(count, height, width)
