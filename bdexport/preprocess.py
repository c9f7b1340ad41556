"""The one preprocessing of a checkpoint, used by training, calibration, bench, run and serve alike. No torch.

Two steps: *geometry* turns any decoded image into uint8 RGB of the network's size; *normalisation* turns uint8
(N, H, W, 3) into float32 (N, 3, H, W) by ``(pixel / 255 - mean) / std``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from bdexport.errors import ImageError, InputError

Resampling = Literal["bilinear", "bicubic"]
CIFAR_MEAN, CIFAR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # the public CIFAR ResNets use ImageNet's


@dataclass(frozen=True)
class Preprocess:
    """``size`` is (height, width) in pixels.

    With ``resize_short`` an image is first scaled so that its shorter side has that many pixels and then cropped in
    the centre to ``size`` (ImageNet: 256, then 224); without it, the image is scaled to ``size`` whatever its shape
    (an image of that very size is left alone).
    """

    size: tuple[int, int] = (32, 32)
    mean: tuple[float, float, float] = CIFAR_MEAN
    std: tuple[float, float, float] = CIFAR_STD
    resampling: Resampling = "bilinear"
    resize_short: int | None = None

    def __post_init__(self) -> None:
        if len(self.size) != 2 or min(self.size) < 1 or max(self.size) > 4096:
            raise InputError("preprocessing: image size", got=self.size, expected="height and width in 1..4096")
        if len(self.mean) != 3 or len(self.std) != 3 or not all(value > 0 for value in self.std):
            raise InputError("preprocessing: mean/std", got=(self.mean, self.std), expected="three numbers each, std > 0")
        if not np.isfinite([*self.mean, *self.std]).all():
            raise InputError("preprocessing: mean/std", got=(self.mean, self.std), expected="finite numbers")
        if self.resampling not in ("bilinear", "bicubic"):
            raise InputError("preprocessing: resampling", got=repr(self.resampling), expected="bilinear or bicubic")

    def fit_image(self, image: Image.Image) -> NDArray[np.uint8]:
        """Geometry: any Pillow image (greyscale, palette, CMYK, alpha..) -> uint8 RGB (H, W, 3) of ``size``."""
        image = _to_rgb(image)
        height, width = self.size
        resampling = Image.Resampling[self.resampling.upper()]
        if self.resize_short is not None:
            scale = self.resize_short / min(image.size)
            scaled = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
            image = image.resize(scaled, resampling)
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        elif image.size != (width, height):
            image = image.resize((width, height), resampling)
        return np.asarray(image, dtype=np.uint8)

    def fit_array(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Geometry for uint8 (N, h, w, 3): unchanged when already of ``size``, otherwise image by image."""
        if images.shape[1:3] == self.size:
            return images
        return np.stack([self.fit_image(Image.fromarray(image)) for image in images])

    def normalise(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 (N, H, W, 3) -> float32 (N, 3, H, W), contiguous: ``(pixel / 255 - mean) / std``."""
        scale = np.float32(1 / 255) / np.asarray(self.std, np.float32)
        offset = np.asarray(self.mean, np.float32) / np.asarray(self.std, np.float32)
        planes = np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32)
        planes *= scale[:, None, None]
        planes -= offset[:, None, None]
        return planes

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Both steps for uint8 (N, h, w, 3)."""
        return self.normalise(self.fit_array(images))

    def to_json(self) -> dict[str, Any]:
        """A JSON object that :func:`preprocess_from_json` reads back."""
        return asdict(self) | {"size": list(self.size), "mean": list(self.mean), "std": list(self.std)}


def preprocess_from_json(data: dict[str, Any]) -> Preprocess:
    """Inverse of :meth:`Preprocess.to_json`. Raises KeyError, TypeError, ValueError or InputError on anything else."""
    size, mean, std = data["size"], data["mean"], data["std"]
    resize_short = data.get("resize_short")
    if resize_short is not None and (not isinstance(resize_short, int) or resize_short < 1):
        raise ValueError(f"resize_short is {resize_short!r}, expected a positive integer or null")
    return Preprocess(
        size=(int(size[0]), int(size[1])),
        mean=(float(mean[0]), float(mean[1]), float(mean[2])),
        std=(float(std[0]), float(std[1]), float(std[2])),
        resampling=data["resampling"],
        resize_short=resize_short,
    )


def read_image(path: Path) -> Image.Image:
    """Decode an image file completely. Raises :class:`ImageError` naming the file and the reason."""
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file", remedy="check the path") from None
    except UnidentifiedImageError:
        raise ImageError(
            f"{path}: not an image that Pillow can decode", expected="PNG, JPEG, WebP, BMP, TIFF.. "
        ) from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(f"{path}: damaged or unreadable image ({error})") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "F"):  # 16-bit greyscale: keep the upper 8 bits
        values = np.asarray(image, dtype=np.float64)
        top = 255.0 if values.max(initial=0) <= 255 else 65535.0
        return Image.fromarray((np.clip(values / top, 0, 1) * 255).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        opaque = Image.new("RGBA", image.size, (255, 255, 255, 255))
        opaque.alpha_composite(image.convert("RGBA"))
        return opaque.convert("RGB")
    return image.convert("RGB")
