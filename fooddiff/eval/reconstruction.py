"""How alike two images of equal size are, pixel by pixel: PSNR and SSIM. NumPy in float64, on uint8 images."""

import numpy as np

from fooddiff.arrays import Float, Pixels

PEAK = 255.0
WINDOW = 11  # pixels
SIGMA = 1.5  # of the window's Gaussian, in pixels
K1, K2 = 0.01, 0.03


def psnr(a: Pixels, b: Pixels) -> Float[np.ndarray, " n"]:
    """Peak signal-to-noise ratio of every pair of images.

    Args:
        a: u8[n, h, w, c].
        b: u8[n, h, w, c].

    Returns:
        f64[n] in dB. Equal images have that of a single grey level of error in one value, since none has infinity.
    """
    squared = (a.astype(np.float64) - b) ** 2
    least = 1 / squared[0].size
    return 10 * np.log10(PEAK**2 / np.maximum(squared.mean(axis=(1, 2, 3)), least))


def ssim(a: Pixels, b: Pixels) -> Float[np.ndarray, " n"]:
    """Structural similarity of every pair of images (Wang et al. 2004, eq. 13), mean over windows and channels.

    Windows are Gaussian, and lie inside the image whole.

    Args:
        a: u8[n, h, w, c].
        b: u8[n, h, w, c].

    Returns:
        f64[n], 1 for equal images.

    Raises:
        ValueError: images smaller than a window.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    mean_a, mean_b = _windowed(a), _windowed(b)
    var_a, var_b = _windowed(a**2) - mean_a**2, _windowed(b**2) - mean_b**2
    cov = _windowed(a * b) - mean_a * mean_b
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * cov + c2) / (var_a + var_b + c2)
    return (luminance * structure).mean(axis=(1, 2, 3))


def check_size(height: int, width: int) -> None:
    """Raises ValueError if images are too small for `ssim`."""
    if min(height, width) < WINDOW:
        raise ValueError(f"images of {height}x{width} pixels have no SSIM: expected at least {WINDOW}x{WINDOW}")


def _windowed(x: Float[np.ndarray, "n h w c"]) -> Float[np.ndarray, "n h2 w2 c"]:
    """Means weighted by a Gaussian window at each of its places in the image."""
    _, height, width, _ = x.shape
    check_size(height, width)
    return np.einsum("ih,nhwc,jw->nijc", _bands(height), x, _bands(width), optimize=True)


def _bands(size: int) -> Float[np.ndarray, "places size"]:
    """Row i holds the window's weights at place i."""
    offsets = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * SIGMA**2))
    bands = np.zeros((size - WINDOW + 1, size))
    for i, row in enumerate(bands):
        row[i : i + WINDOW] = weights / weights.sum()
    return bands
