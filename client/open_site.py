"""A real hospital's site from its folder: nothing trains that its policy and approvals do not allow at that moment."""

from __future__ import annotations

import logging
from pathlib import Path

from client.approvals import read_approvals
from client.features import FeatureCache, cache_key
from client.policy import SitePolicy
from client.reply_store import ReplyStore
from client.site import Site
from client.site_folder import SiteFolder, existing_site
from medfed.device import choose_device, prepare_cpu
from medfed.study import FEDERATED

_log = logging.getLogger("medfed.client.open_site")


class CurrentPolicy:
    """What a hospital allows now: read anew at every call, as its people may change their minds while a site runs.

    A call reads the policy and verifies the approvals: some milliseconds, beside rounds of minutes.

    Args:
        folder: of the site.
        signing_key: the only key whose approvals count, hexadecimal.
    """

    def __init__(self, folder: SiteFolder, signing_key: str) -> None:
        self._folder = folder
        self._signing_key = signing_key
        self._told: frozenset[str] = frozenset()

    def __call__(self) -> SitePolicy:
        """The policy with every approved study.

        Raises:
            SiteError: if the policy cannot be read; then nothing trains.
        """
        written = self._folder.written_policy()
        approvals = read_approvals(self._folder, signing_key=self._signing_key)
        for line in approvals.refused:
            if line not in self._told:
                _log.warning("event=approval_refused detail=%s", line)
        self._told = frozenset(approvals.refused)
        approved = tuple(dict.fromkeys((*written.approved_studies, *approvals.digests)))
        return written.model_copy(update={"approved_studies": approved})


def open_site(root: Path) -> Site:
    """The site of a folder that ``medfed site init`` made, ready to serve. Draws come from the operating system.

    Raises:
        SiteError: if the folder, its settings, its policy or its keys are not as they must be.
        DocumentError: if its kit or enrolment is not as it was signed.
        DeviceError: if it has no such device.
    """
    folder = existing_site(root)
    settings = folder.settings()
    policy = CurrentPolicy(folder, folder.enrolment().signing_key)
    policy()  # a policy that cannot be read is said before anything is asked
    prepare_cpu(settings.num_threads)
    return Site(
        folder.kit.site,
        (settings.data,),
        device=choose_device(settings.device),
        features=FeatureCache(folder.features, cache_key(folder.feature_key)),
        policy=policy,
        cohorts={FEDERATED: settings.cohort},
        ledger=folder.ledger,
        ledger_key=folder.ledger_key,
        identity=folder.identity,
        journal=folder.journals,
        memory=folder.memories,
        noise_seed=None,
        replies=ReplyStore(folder.replies),
    )
