"""A study as its coordinator stands for it: resolved, for real hospitals, and signed."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import field_validator

from medfed.consortium_documents import RosterSerial
from medfed.signed_document import DocumentBody, read_document, verify_document
from medfed.study import StudyConfig
from medfed.study_sections import Name

SUFFIX = ".study"
"""Of files with a signed study."""


class SignedStudy(DocumentBody):
    """What hospitals are asked to approve.

    Attributes:
        version: of the format.
        consortium: whose sites take part.
        roster_serial: of the roster of which they are members; sites refuse one older than they have seen.
        study: resolved: it names every tensor that may travel; without data, which hospitals know themselves.
    """

    kind: ClassVar[str] = "study"

    version: Literal[2] = 2
    consortium: Name
    roster_serial: RosterSerial
    study: StudyConfig

    @field_validator("study")
    @classmethod
    def _is_for_hospitals(cls, study: StudyConfig) -> StudyConfig:
        if study.manifest is None:
            raise ValueError("expected a resolved study")
        if study.cohort is not None or any(site.data is not None for site in study.sites):
            raise ValueError("expected a study without simulated or own data")
        return study


def read_signed_study(path: Path, *, public_key: str) -> SignedStudy:
    """The study in a file, if this coordinator signed it.

    Args:
        path: of the file.
        public_key: the coordinator's, hexadecimal.

    Raises:
        DocumentError: if it is damaged, or somebody else signed it.
    """
    return parse_signed_study(read_document(path), public_key=public_key, origin=str(path))


def parse_signed_study(data: bytes, *, public_key: str, origin: str) -> SignedStudy:
    """The study in the bytes of a file; as :func:`read_signed_study`."""
    return verify_document(data, SignedStudy, public_key=public_key, origin=origin)
