"""What the DICOM headers of a site's images say of people: attributes by group, never a value.

Source of the groups: DICOM PS3.15 annex E, table E.1-1, the attributes that its Basic Application Level
Confidentiality Profile removes or replaces. The most common ones are here, not all: UIDs are left out (they link
files and name nobody to this software), and so are sex, age, size and weight (the table's option "Retain Patient
Characteristics"). That a file is found clean here is no proof of anonymity: pixels are not looked at, and a number
that leads to a person at this hospital is not told from one that does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.images import without_remarks

PATIENT = (
    *("PatientName", "PatientID", "PatientBirthName", "PatientMotherBirthName", "OtherPatientNames"),
    *("OtherPatientIDs", "OtherPatientIDsSequence", "PatientBirthDate", "PatientBirthTime", "PatientAddress"),
    *("PatientTelephoneNumbers", "PatientTelecomInformation", "MedicalRecordLocator", "ResponsiblePerson"),
    *("PersonName", "PersonAddress", "PersonTelephoneNumbers", "PersonTelecomInformation"),
    *("InsurancePlanIdentification", "MilitaryRank", "RegionOfResidence", "CountryOfResidence"),
)
"""Attributes that lead to the patient. ``PatientName`` and ``PatientID`` count where they are no pseudonym."""

OTHERS: Mapping[str, tuple[str, ...]] = {
    "hospital and staff": (
        *("InstitutionName", "InstitutionAddress", "InstitutionalDepartmentName", "StationName"),
        *("ReferringPhysicianName", "ReferringPhysicianAddress", "ReferringPhysicianTelephoneNumbers"),
        *("PerformingPhysicianName", "OperatorsName", "NameOfPhysiciansReadingStudy", "PhysiciansOfRecord"),
        *("RequestingPhysician", "ScheduledPerformingPhysicianName", "ConsultingPhysicianName"),
        *("RequestingService", "CurrentPatientLocation", "PatientInstitutionResidence"),
    ),
    "numbers and dates": (
        *("AccessionNumber", "StudyID", "AdmissionID", "RequestedProcedureID", "ScheduledProcedureStepID"),
        *("PlacerOrderNumberImagingServiceRequest", "FillerOrderNumberImagingServiceRequest"),
        *("IssuerOfPatientID", "DeviceSerialNumber", "ServiceEpisodeID"),
        *("StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate", "AcquisitionDateTime", "AdmittingDate"),
    ),
    "free text": (
        *("PatientComments", "ImageComments", "AdditionalPatientHistory", "AdmittingDiagnosesDescription"),
        *("StudyDescription", "SeriesDescription", "ProtocolName", "DerivationDescription", "Occupation"),
        *("MedicalAlerts", "Allergies", "ReasonForStudy", "RequestedProcedureDescription", "VisitComments"),
        *("StudyComments", "InterpretationText", "TextComments", "AcquisitionComments", "SpecialNeeds"),
    ),
}
"""Attributes that lead to the patient together with the hospital's records, by group."""

_NO_NAME = frozenset(
    (
        *("anon", "anonym", "anonymous", "anonymised", "anonymized", "deidentified", "removed", "redacted", "unknown"),
        *("none", "no", "name", "patient", "subject", "case", "test", "phantom", "pseudonym", "xxx"),
    )
)
_TEXT_BURNED_IN = {
    "1.2.840.10008.5.1.4.1.1.6.1",  # Ultrasound Image Storage
    "1.2.840.10008.5.1.4.1.1.7",  # Secondary Capture Image Storage
    "1.2.840.10008.5.1.4.1.1.77.1.4",  # VL Photographic Image Storage
}
"""Kinds of image that often show text (PS3.15 E.3.1 asks to clean their pixels)."""


@dataclass(frozen=True)
class Header:
    """What one DICOM header holds about people.

    Attributes:
        keywords: attributes of :data:`PATIENT` and :data:`OTHERS` that have a value, anywhere in the header.
        private_tags: whether a manufacturer's private attributes are in it.
        burned_in: whether text is in the pixels: ``yes``, ``no``, or ``unstated`` where such images often have it.
        patient_id: the header's, to compare with the manifest's; never shown.
    """

    keywords: frozenset[str]
    private_tags: bool
    burned_in: str
    patient_id: str


def read_header(path: Path) -> Header:
    """What a DICOM file's header holds; pixels are not read.

    Raises:
        Exception: whatever pydicom meets in a damaged file.
    """
    import pydicom

    with without_remarks():
        dataset = pydicom.dcmread(path, stop_before_pixels=True)
        elements = list(_elements(dataset))
        filled = {element.keyword for element in elements if not _is_empty(element)}
        patient_id = str(dataset.get("PatientID", "") or "").strip()
        name = str(dataset.get("PatientName", "") or "").strip()
        keywords = filled & _ALL
        if is_pseudonym(name, patient_id):
            keywords -= {"PatientName"}
        if not looks_like_a_name(patient_id):
            keywords -= {"PatientID"}
        stated = str(dataset.get("BurnedInAnnotation", "") or "").strip().upper()
        often = str(dataset.get("SOPClassUID", "")) in _TEXT_BURNED_IN
        return Header(
            keywords=frozenset(keywords),
            private_tags=any(element.tag.is_private for element in elements),
            burned_in={"YES": "yes", "NO": "no"}.get(stated, "unstated" if often else "no"),
            patient_id=patient_id,
        )


def is_pseudonym(name: str, patient_id: str) -> bool:
    """Whether a PatientName is a stand-in: empty, the PatientID again, with digits, or a word for nobody."""
    return not name or name == patient_id or any(map(str.isdigit, name)) or not (set(_words(name)) - _NO_NAME)


def looks_like_a_name(text: str) -> bool:
    """Whether an identifier is made of two or more words of letters, none of them a word for nobody."""
    words = _words(text)
    return len(words) > 1 and not any(map(str.isdigit, text)) and not set(words) & _NO_NAME


def _words(text: str) -> list[str]:
    parts = "".join(letter if letter.isalnum() else " " for letter in text.casefold()).split()
    return [part for part in parts if len(part) > 1]


_ALL = frozenset({*PATIENT, *(keyword for group in OTHERS.values() for keyword in group)})


def _elements(dataset: Any) -> Iterator[Any]:
    """Every attribute, also those inside sequences."""
    yield from dataset.iterall()


def _is_empty(element: Any) -> bool:
    value = element.value
    return value is None or (hasattr(value, "__len__") and len(value) == 0) or not str(value).strip()
