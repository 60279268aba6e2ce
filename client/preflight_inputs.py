"""What a preflight looks at, from a site's folder."""

from __future__ import annotations

from pathlib import Path

from client.newest_roster import refuse_older_roster
from client.preflight_check import PreflightInputs
from client.site_folder import existing_site
from medfed.signed_study import SUFFIX, read_signed_study
from medfed.study import read_study


def inputs_of_site(root: Path, study: Path | None, *, identified_data_allowed: bool = False) -> PreflightInputs:
    """The inputs of a site that ``medfed site init`` made.

    Args:
        root: the site's folder.
        study: a signed study, which must be the coordinator's, or a study file on its way to one.
        identified_data_allowed: as :class:`PreflightInputs` has it.

    Raises:
        SiteError: if the folder is not whole, or its settings cannot be read.
        DocumentError: if kit, enrolment or study is not as it was signed.
        ConsortiumError: if the study was signed under an older roster than this site has seen.
        StudyError: if the study file is wrong.
    """
    folder = existing_site(root)
    kit, settings = folder.kit, folder.settings()
    looked_at = None
    if study is not None and study.suffix == SUFFIX:
        signed = read_signed_study(study, public_key=kit.coordinator_key)
        refuse_older_roster(signed, folder)
        looked_at = signed.study
    elif study is not None:
        looked_at = read_study(study)
    keys = (folder.node_key, folder.identity, folder.ledger_key)
    return PreflightInputs(
        site_name=kit.site,
        manifests=(settings.data,),
        study=looked_at,
        policy=folder.policy_file,
        ledger=folder.ledger,
        # A folder that is missing is made at the start: journals, for one, are in no backup.
        private_files=(*keys, folder.feature_key, *filter(Path.exists, folder.private_folders)),
        state=folder.state,
        device=settings.device,
        server=str(kit.server),
        ca_certificate=kit.ca_certificate,
        identified_data_allowed=identified_data_allowed,
    )
