"""Compares the records of shards with the files on disk before they are merged."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from clipdeploy.core.errors import ArtifactError, DatasetError
from clipdeploy.core.progress import SILENT, Progress
from clipdeploy.imaging import ImageFolder
from clipdeploy.imaging.decoding import usable_cores
from clipdeploy.verification.batches import digest_of_files
from clipdeploy.verification.records import ImageRecord
from clipdeploy.verification.results import Results
from clipdeploy.verification.targets import digest_of_artifact

__all__ = ["check_against_disk", "check_artifacts", "check_labels"]


def check_artifacts(results: Results) -> None:
    """Check that every artifact is still the file that was judged.

    Raises:
        ArtifactError: it has changed or is missing.
        FileError: it cannot be read.
    """
    for entry in results.run_key.artifacts:
        path = Path(entry.artifact)
        if not path.exists():
            raise ArtifactError(
                f"{path} is missing: its records cannot be compared with it",
                hint="restore it under this path, or verify again",
            )
        if digest_of_artifact(path) != entry.sha256:
            raise ArtifactError(
                f"{path} has been replaced since the shards were verified",
                hint="verify every shard again",
            )


def check_against_disk(results: Results, images: ImageFolder, progress: Progress = SILENT) -> None:
    """Check that every record is of the file with its name among ``images``.

    Files that have not changed since the whole run are not read again.

    Raises:
        DatasetError: a file has other bytes, or is missing.
    """
    places = {entry.name: entry for entry in images.entries}
    records = results.records
    for record in records:
        if record.name not in places:
            raise _other(record, images)
    # The records are in the order in which the run took the state of the files.
    listed = ImageFolder(images.root, tuple(places[record.name] for record in records))
    if results.stamps and digest_of_files(listed) == results.stamps:
        return
    reader = images.reader()

    def digest(record: ImageRecord) -> str:
        entry = places[record.name]
        return hashlib.sha256(reader.read(entry.name, entry.place)).hexdigest()

    try:
        with (
            ThreadPoolExecutor(2 * usable_cores()) as pool,
            progress.task("compare the images with the records", len(records)) as advance,
        ):
            for record, found in zip(records, pool.map(digest, records), strict=True):
                if found != record.sha256:
                    raise _other(record, images)
                advance(1)
    finally:
        reader.close()


def check_labels(results: Results, images: ImageFolder) -> None:
    """Check that labels named by the user are those that the shards were judged by.

    Raises:
        DatasetError: an image has another class, or none.
    """
    labels = {entry.name: entry.label for entry in images.entries}
    for record in results.records:
        if labels.get(record.name) != record.label:
            raise DatasetError(
                f"the labels give {record.name} another class than the shards, or none",
                hint="leave out the label options, or verify every shard again with them",
            )


def _other(record: ImageRecord, images: ImageFolder) -> DatasetError:
    return DatasetError(
        f"{record.name} in {images.root} is not the image that was verified, or is missing",
        hint="verify the shards again, or pass the images that they are of with --data",
    )
