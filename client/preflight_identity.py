"""Preflight of what DICOM headers say of people: counts for each attribute, and never a value."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from client.dicom_identity import OTHERS, PATIENT, Header, read_header
from client.images import is_dicom
from client.manifest import Row
from client.preflight_check import Check, Outcome, Part, count, some

_IDENTITY: Part = "identity"
_CLEAN = "de-identify the files (DICOM PS3.15 annex E, basic profile)"
_IF_MEANT = "if they are to be pseudonymous"


def identity_checks(rows: Sequence[Row], *, identified_data_allowed: bool) -> Iterator[Check]:
    """What the headers of a site's DICOM files, images and label maps, say of people."""
    dicom = [(row, path) for row in rows for path in (row.image, row.label) if path is not None and is_dicom(path)]
    if not dicom:
        yield Check(_IDENTITY, "DICOM headers", "ok", "no DICOM file; text in pixels or file names is not looked at")
        return
    headers: list[tuple[Row, Header]] = []
    unreadable = []
    for row, path in dicom:
        try:
            headers.append((row, read_header(path)))
        except Exception:  # pydicom raises whatever it likes; what it says may quote the header
            unreadable.append(row.place)
    if unreadable:
        yield Check(
            _IDENTITY,
            "DICOM headers",
            "warn",
            f"{count(len(unreadable), 'header')} cannot be read: {some(unreadable)}.",
            "restore these files, or drop their rows.",
        )
    worst: Outcome = "warn" if identified_data_allowed else "fail"
    found = [
        *_attributes("the patient", PATIENT, headers, worst),
        *(check for group, keywords in OTHERS.items() for check in _attributes(group, keywords, headers, "warn")),
        *_private_tags(headers),
        *_burned_in(headers, worst),
    ]
    yield from found
    yield from _patients_agree(headers)
    if not found and headers:
        told = "none of the attributes that are looked for; text in pixels is not"
        yield Check(_IDENTITY, "DICOM headers", "ok", f"{count(len(headers), 'header')}: {told}")


def _attributes(
    group: str, keywords: Sequence[str], headers: Sequence[tuple[Row, Header]], outcome: Outcome
) -> Iterator[Check]:
    counted = Counter(keyword for _, header in headers for keyword in keywords if keyword in header.keywords)
    if not counted:
        return
    files = sum(not header.keywords.isdisjoint(keywords) for _, header in headers)
    told = ", ".join(f"{keyword} {number}" for keyword, number in counted.most_common())
    as_they_are = "or allow identified data: no header leaves the site" if group == "the patient" else _IF_MEANT
    what_to_do = f"{_CLEAN}, {as_they_are}."
    yield Check(
        _IDENTITY, f"tags: {group}", outcome, f"in {files} of {count(len(headers), 'header')}: {told}.", what_to_do
    )


def _private_tags(headers: Sequence[tuple[Row, Header]]) -> Iterator[Check]:
    files = sum(header.private_tags for _, header in headers)
    if files:
        yield Check(
            _IDENTITY,
            "private tags",
            "warn",
            f"in {files} of {count(len(headers), 'header')}; makers put anything there.",
            f"{_CLEAN}, {_IF_MEANT}.",
        )


def _burned_in(headers: Sequence[tuple[Row, Header]], worst: Outcome) -> Iterator[Check]:
    for state, outcome, told, what_to_do in (
        ("yes", worst, "with text in the picture", "black it out, or drop these images."),
        ("unstated", "warn", "of a kind that often shows text do not say if there is any", "look at some of them."),
    ):
        places = [row.place for row, header in headers if header.burned_in == state]
        if places:
            yield Check(
                _IDENTITY,
                "burned-in text",
                outcome,
                f"{count(len(places), 'image')} {told}: {some(places)}.",
                what_to_do,
            )


def _patients_agree(headers: Sequence[tuple[Row, Header]]) -> Iterator[Check]:
    """Whether the manifest's patients are the headers' patients: both tell who is one person."""
    listed, scanned = defaultdict(set), defaultdict(set)
    for row, header in headers:
        if header.patient_id:
            listed[header.patient_id].add(row.patient_id)
            scanned[row.patient_id].add(header.patient_id)
    split_up = sum(len(ids) > 1 for ids in listed.values())
    merged = sum(len(ids) > 1 for ids in scanned.values())
    if split_up:
        yield Check(
            _IDENTITY,
            "patients in headers",
            "warn",
            f"{count(split_up, 'PatientID')} of the headers under several patient_id of the manifest.",
            "give one person one patient_id: it is what privacy counts. Fine if all headers got one stand-in.",
        )
    if merged:
        yield Check(
            _IDENTITY,
            "patients in headers",
            "warn",
            f"{count(merged, 'patient_id')} of the manifest with several PatientID in the headers.",
            "check that they are one person; protection then covers them together, which is safe.",
        )
