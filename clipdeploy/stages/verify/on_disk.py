"""Records against the files that they are of, before shards of other machines are believed."""

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
    """Make sure that every artifact is still the file that the records are of.

    Raises:
        ArtifactError: it is another one, or gone.
        FileError: it cannot be read.
    """
    for entry in results.run_key.artifacts:
        path = Path(entry.artifact)
        if not path.exists():
            raise ArtifactError(
                f"{path} is not there: its records cannot be held against it",
                hint="put it back under this path, or verify again",
            )
        if digest_of_artifact(path) != entry.sha256:
            raise ArtifactError(
                f"{path} has been replaced since the shards were verified",
                hint="verify every shard again",
            )


def check_against_disk(results: Results, images: ImageFolder, progress: Progress = SILENT) -> None:
    """Make sure that every record is of the file that lies among ``images`` under its name.

    Files that are unchanged since the whole run saw them are not read again.

    Raises:
        DatasetError: a file has other bytes, or is gone.
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
    """Make sure that labels which a user names are those that the shards were judged by.

    Raises:
        DatasetError: an image has another class, or none.
    """
    labels = {entry.name: entry.label for entry in images.entries}
    for record in results.records:
        if labels.get(record.name) != record.label:
            raise DatasetError(
                f"the labels give {record.name} another class than the shards have, or none",
                hint="leave the options of labels out, or verify every shard again with them",
            )


def _other(record: ImageRecord, images: ImageFolder) -> DatasetError:
    return DatasetError(
        f"{images.root} holds another {record.name} than the one that was verified, or none",
        hint="the shards are of other images: verify them again, or name the images with --data",
    )
