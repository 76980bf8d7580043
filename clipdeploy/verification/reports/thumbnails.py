"""Makes thumbnails of the cropped images, small enough to embed in a page."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image

from clipdeploy.core.errors import DatasetError
from clipdeploy.core.passport import Preprocess
from clipdeploy.imaging import ImageFolder
from clipdeploy.imaging.preprocess import crop_file
from clipdeploy.verification.records import ImageRecord

__all__ = ["Thumbnails", "make_thumbnails"]

_EDGE = 160
_QUALITY = 88


@dataclass
class Thumbnails:
    """Data URIs by image name, and a sentence for each missing thumbnail."""

    uris: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


def make_thumbnails(
    records: Sequence[ImageRecord], images: ImageFolder, spec: Preprocess
) -> Thumbnails:
    """Return the crops of these images, without those that are missing or have changed."""
    made = Thumbnails()
    reader = images.reader()
    known = {entry.name for entry in images.entries}
    try:
        for record in records:
            if record.name not in known:
                made.missing.append(f"{record.name} no longer exists")
                continue
            try:
                data = reader.read(record.name)
                if hashlib.sha256(data).hexdigest() != record.sha256:
                    made.missing.append(f"{record.name} has changed since the verification")
                    continue
                made.uris[record.name] = _thumbnail(data, record.name, spec)
            except DatasetError as error:
                made.missing.append(error.message)
    finally:
        reader.close()
    return made


def _thumbnail(data: bytes, name: str, spec: Preprocess) -> str:
    crop = Image.fromarray(crop_file(data, name, spec))
    crop.thumbnail((_EDGE, _EDGE))
    stream = io.BytesIO()
    crop.save(stream, "JPEG", quality=_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
