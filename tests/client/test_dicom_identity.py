"""What DICOM headers say of people is counted by attribute, and never quoted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset

from client.dicom_identity import OTHERS, PATIENT, is_pseudonym, looks_like_a_name, read_header
from client.manifest import Row
from client.preflight_check import Check
from client.preflight_identity import identity_checks

SCANS = Path(pydicom.__file__).parent / "data" / "test_files"
Scan = Callable[..., Row]


@pytest.fixture
def scan(tmp_path: Path) -> Scan:
    """A CT image with a clean header but for what is given, as a row of the manifest."""

    def write(number: int = 0, *, patient: str = "P0", **attributes: Any) -> Row:
        source = pydicom.dcmread(SCANS / "CT_small.dcm")
        clean = Dataset()
        for keyword in ("SOPClassUID", "SOPInstanceUID", "Rows", "Columns", "PixelSpacing", "PixelData"):
            clean[keyword] = source[keyword]
        for keyword in ("SamplesPerPixel", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"):
            clean[keyword] = source[keyword]
        clean.PhotometricInterpretation, clean.file_meta = "MONOCHROME2", source.file_meta
        private = attributes.pop("private", None)
        for keyword, value in attributes.items():
            setattr(clean, keyword, value)
        if private:
            clean.private_block(0x0011, "SECRET MAKER", create=True).add_new(1, "LO", private)
        path = tmp_path / f"scan{number}.dcm"
        clean.save_as(path, enforce_file_format=True)
        return Row(tmp_path / "m.csv", f"row {number + 2}", path, patient, "train", None, {})

    return write


def looked_at(*rows: Row, allowed: bool = False) -> dict[str, Check]:
    return {check.name: check for check in identity_checks(rows, identified_data_allowed=allowed)}


def test_every_keyword_is_of_the_dicom_dictionary() -> None:
    keywords = [*PATIENT, *(keyword for group in OTHERS.values() for keyword in group)]
    assert [keyword for keyword in keywords if tag_for_keyword(keyword) is None] == []
    assert len(set(keywords)) == len(keywords)


def test_clean_header_is_told_as_clean(scan: Scan) -> None:
    checks = looked_at(scan(), scan(1))
    assert [(check.outcome, check.found) for check in checks.values()] == [
        ("ok", "2 headers: none of the attributes that are looked for; text in pixels is not")
    ]


@pytest.mark.parametrize(
    ("attributes", "name", "outcome", "found"),
    [
        ({"PatientName": "Doe^Jane"}, "tags: the patient", "fail", "PatientName 1"),
        ({"PatientID": "Doe^Jane"}, "tags: the patient", "fail", "PatientID 1"),
        ({"PatientBirthDate": "19700101"}, "tags: the patient", "fail", "PatientBirthDate 1"),
        ({"PatientAddress": "Elm Street 1"}, "tags: the patient", "fail", "PatientAddress 1"),
        ({"InstitutionName": "General"}, "tags: hospital and staff", "warn", "InstitutionName 1"),
        ({"ReferringPhysicianName": "Roe^R"}, "tags: hospital and staff", "warn", "ReferringPhysicianName 1"),
        ({"AccessionNumber": "77"}, "tags: numbers and dates", "warn", "AccessionNumber 1"),
        ({"ImageComments": "Jane, bed 4"}, "tags: free text", "warn", "ImageComments 1"),
        ({"private": "Jane"}, "private tags", "warn", "in 1 of 2 headers"),
        ({"BurnedInAnnotation": "YES"}, "burned-in text", "fail", "1 image with text in the picture: row 2"),
    ],
)
def test_identifying_attribute_is_counted(
    scan: Scan, attributes: dict[str, str], name: str, outcome: str, found: str
) -> None:
    checks = looked_at(scan(**attributes), scan(1))
    assert checks[name].outcome == outcome
    assert found in checks[name].found
    assert len(checks) == 1


def test_attribute_inside_a_sequence_is_found(scan: Scan) -> None:
    inner = Dataset()
    inner.PatientBirthDate = "19700101"
    assert "PatientBirthDate 1" in looked_at(scan(ReferencedStudySequence=[inner]))["tags: the patient"].found


def test_what_a_hospital_allows_is_a_warning(scan: Scan) -> None:
    row = scan(PatientName="Doe^Jane", BurnedInAnnotation="YES")
    assert {check.outcome for check in looked_at(row).values()} == {"fail"}
    assert {check.outcome for check in looked_at(row, allowed=True).values()} == {"warn"}


def test_no_value_of_a_header_is_shown(scan: Scan) -> None:
    secrets = {
        "PatientName": "Zebra^Quagga",
        "PatientID": "Zebra^Q",
        "AccessionNumber": "998877",
        "StudyDate": "20010203",
    }
    checks = looked_at(scan(private="Okapi", ImageComments="Tapir", **secrets), scan(1, patient="P1", **secrets))
    text = json.dumps([(check.found, check.what_to_do) for check in checks.values()])
    for secret in ("Zebra", "Quagga", "998877", "20010203", "Okapi", "Tapir", "P0", "P1"):
        assert secret not in text
    assert "patients in headers" in checks


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *((text, True) for text in ("Doe^Jane", "DOE, JANE", "jane.doe", "Müller Hans")),
        *((text, False) for text in ("", "12345", "P-0001", "Anon^Patient", "ABCDEF", "Doe^1970")),
    ],
)
def test_patient_id_that_looks_like_a_name(text: str, expected: bool) -> None:
    assert looks_like_a_name(text) is expected


@pytest.mark.parametrize(
    ("name", "patient_id", "expected"),
    [
        *(("Doe^Jane", "1", False), ("Doe", "1", False), ("Müller", "", False)),
        *(("", "1", True), ("ABC", "ABC", True), ("Subject^0012", "1", True), ("ANONYMOUS", "1", True)),
    ],
)
def test_patient_name_that_stands_for_nobody(name: str, patient_id: str, expected: bool) -> None:
    assert is_pseudonym(name, patient_id) is expected


def test_manifest_and_headers_that_tell_people_apart_otherwise_are_pointed_out(scan: Scan) -> None:
    split_up = looked_at(scan(patient="P0", PatientID="7"), scan(1, patient="P1", PatientID="7"))
    assert "1 PatientID of the headers under several" in split_up["patients in headers"].found
    merged = looked_at(scan(patient="P0", PatientID="7"), scan(1, patient="P0", PatientID="8"))
    assert "1 patient_id of the manifest with several" in merged["patients in headers"].found
    agreed = looked_at(scan(patient="P0", PatientID="7"), scan(1, patient="P1", PatientID="8"))
    assert "patients in headers" not in agreed


def test_kind_of_image_that_often_shows_text_must_say_whether_it_does() -> None:
    assert read_header(SCANS / "examples_rgb_color.dcm").burned_in == "unstated"
    assert read_header(SCANS / "CT_small.dcm").burned_in == "no"


def test_headers_of_real_files_are_read_or_counted_as_unreadable(tmp_path: Path) -> None:
    files = sorted(SCANS.glob("*.dcm"))
    rows = [Row(tmp_path / "m.csv", f"row {n}", path, "P", "train", None, {}) for n, path in enumerate(files, 2)]
    checks = looked_at(*rows)
    assert "PatientName" in checks["tags: the patient"].found
    assert "cannot be read" in checks["DICOM headers"].found


def test_site_without_dicom_is_told_what_is_not_looked_at(tmp_path: Path) -> None:
    (check,) = looked_at(Row(tmp_path / "m.csv", "row 2", tmp_path / "a.png", "P", "train", None, {})).values()
    assert (check.outcome, "not looked at" in check.found) == ("ok", True)
