"""``medfed site init``: a hospital's folder, its keys, and the one file that it sends to the coordinator."""

from __future__ import annotations

import json
import secrets
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from client.policy import Budget
from client.site_folder import SiteFolder
from medfed.consortium_documents import EnrolmentRequest, StartupKit, node_key_text
from medfed.device import DeviceChoice
from medfed.durable_file import make_private_folder, replace_durably
from medfed.errors import ConsortiumError, SiteError
from medfed.private_file import create_private
from medfed.signed_document import read_document, verify_self_signed
from medfed.signing import create_key, fingerprint
from privacy.secure_aggregation.identity import create_identity

_FEATURE_KEY_BYTES = 32

MINIMUM_PATIENTS = 20
"""Training patients for any study, unless the hospital says otherwise."""

_SITE_TOML = """\
# What this hospital says of itself to its own machine. Nothing here leaves it.

data = {data}        # manifest of the images; relative to this folder, or absolute
device = {device}    # auto, cpu, cuda or mps
num_threads = 1
cohort = {cohort}    # name of these patients in the privacy ledger; keep it for as long as they are the same patients
"""

_POLICY_TOML = """\
# What may train on this hospital's patients, whatever a study says. The hospital decides; nobody sends this file.
# Read at every request: a change counts from the next one on.

# Training patients below which nothing trains: too few hide nobody.
minimum_patients = {minimum_patients}

# May a study without differential privacy train here? Its updates can give patients away.
allow_unprotected = false

# Studies are approved one by one with 'medfed site approve', which shows what they do and signs what was approved.

# What all studies together may spend on this hospital's patients, over all years. Without it no private study trains.
# epsilon bounds how much anybody can learn about whether one patient was in the training data: the odds of any
# conclusion change by a factor of at most e^epsilon (epsilon 1: 2.7; epsilon 8: 2981), except with probability delta.
# unit: "patient" protects all images of a patient together, "record" each image on its own, which is less.
# delta is well below one over the number of training patients.
{budget}"""

_BUDGET_TOML = """\
[budget]
epsilon = {epsilon!r}
delta = {delta!r}
unit = "{unit}"
"""

_NO_BUDGET_TOML = """\
# Remove the '#' of all four lines, and set epsilon and delta yourself.
#[budget]
#epsilon = 8.0
#delta = 1e-5
#unit = "patient"
"""


def init_site(
    kit_folder: Path,
    root: Path,
    *,
    data: Path,
    cohort: str = "patients",
    device: DeviceChoice = "auto",
    expected_fingerprint: str | None = None,
    minimum_patients: int = MINIMUM_PATIENTS,
    budget: Budget | None = None,
) -> SiteFolder:
    """Make a site's folder from a kit; its keys are made here.

    Args:
        kit_folder: from the coordinator, holds ``startup/kit.json``.
        root: a new or empty folder.
        data: manifest of the hospital's images.
        cohort: name of its patients in the privacy ledger.
        device: where it computes.
        expected_fingerprint: of the coordinator's key, as heard by telephone; None believes the kit as it is.
        minimum_patients: training patients below which nothing trains, at least 1.
        budget: what all studies together may spend; None lets no private study train until the policy says it.

    Raises:
        ConsortiumError: if the kit is not as it was signed, or the fingerprint is another.
        SiteError: if the folder holds anything, or a file cannot be written.
    """
    kit, kit_bytes = read_kit(kit_folder, expected_fingerprint=expected_fingerprint)
    folder = SiteFolder(root.resolve())
    if not data.is_file():
        raise SiteError(f"Expected a manifest of the images at {data}, got nothing; check --data.")
    _require_empty(folder)
    try:
        for place in folder.private_folders:
            make_private_folder(place)
            place.chmod(0o700)
        replace_durably(folder.kit_file, kit_bytes, mode=0o600)
        settings = _SITE_TOML.format(
            data=json.dumps(str(data.resolve()), ensure_ascii=False),
            device=json.dumps(device),
            cohort=json.dumps(cohort),
        )
        replace_durably(folder.settings_file, settings.encode(), mode=0o600)
        replace_durably(folder.policy_file, _policy_toml(minimum_patients, budget).encode(), mode=0o600)
        node_key = ec.generate_private_key(ec.SECP384R1())
        create_private(folder.node_key, _openssh(node_key), "node key")
        identity = create_identity(folder.identity)
        create_key(folder.ledger_key)
        create_private(folder.feature_key, secrets.token_bytes(_FEATURE_KEY_BYTES), "feature cache key")
        folder.settings()  # what was written can be read
        folder.written_policy()
        request = EnrolmentRequest(
            consortium=kit.consortium,
            coordinator_key=kit.coordinator_key,
            site=kit.site,
            node_key=node_key_text(node_key.public_key()),
            signing_key=identity.signing_key.hex(),
        )
        replace_durably(folder.enrolment_file, identity.signed_document(request), mode=0o600)
    except OSError as error:
        raise SiteError(f"Expected to write the site's folder {root}, got: {error}; mend it and start anew.") from None
    return folder


def _policy_toml(minimum_patients: int, budget: Budget | None) -> str:
    written = _NO_BUDGET_TOML if budget is None else _BUDGET_TOML.format(**budget.model_dump())
    return _POLICY_TOML.format(minimum_patients=minimum_patients, budget=written)


def read_kit(kit_folder: Path, *, expected_fingerprint: str | None) -> tuple[StartupKit, bytes]:
    """A kit as its coordinator signed it, and its bytes.

    Raises:
        DocumentError: if it is damaged.
        ConsortiumError: if the coordinator's key has another fingerprint than was expected.
    """
    path = kit_folder / "startup" / "kit.json"
    data = read_document(path)
    kit = verify_self_signed(data, StartupKit, origin=str(path))
    found = fingerprint(kit.coordinator_key)
    if expected_fingerprint is not None and _digits(expected_fingerprint) != _digits(found):
        raise ConsortiumError(
            f"Expected a kit of the coordinator with fingerprint {expected_fingerprint}, got one of {found}; do not "
            "use it: ask the coordinator by telephone who sent it."
        )
    return kit, data


def _digits(text: str) -> str:
    return "".join(text.split()).replace("-", "").lower()


def _require_empty(folder: SiteFolder) -> None:
    root = folder.root
    if root.exists() and not root.is_dir():
        raise SiteError(f"Expected a folder or nothing at {root}, got a file; name another place.")
    if not root.exists() or not any(root.iterdir()):
        return
    if folder.enrolment_file.exists():
        raise SiteError(f"Expected a new folder at {root}, got a site that is there already; its keys are kept.")
    raise SiteError(
        f"Expected a new or empty folder at {root}, got other files, or what an interrupted init left (no "
        "enrolment.json: nobody knows its keys); name another place, or remove it."
    )


def _openssh(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
