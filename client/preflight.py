"""Preflight: everything that can be known before a study whether this site is ready for it. It changes nothing."""

from __future__ import annotations

from client.policy import SitePolicy, read_policy
from client.preflight_check import Check, PreflightInputs, guarded
from client.preflight_data import data_checks
from client.preflight_identity import identity_checks
from client.preflight_network import network_checks
from client.preflight_site import site_checks
from client.survey import Findings, Progress, survey
from medfed.errors import StudyError


def preflight(inputs: PreflightInputs, *, on_progress: Progress | None = None) -> tuple[Check, ...]:
    """Look at everything; nothing that is wrong with a site raises out of here.

    Args:
        inputs: what to look at.
        on_progress: called after each image with how many were opened and how many there are.
    """
    checks: list[Check] = []
    policies: list[SitePolicy] = []
    findings = [Findings()]

    def read_data() -> tuple[Check, ...]:
        findings[0] = survey(inputs.manifests, inputs.study.task if inputs.study else None, on_progress)
        return ()

    def read_rules() -> tuple[Check, ...]:
        if inputs.policy is None:
            return (Check("set-up", "policy", "warn", "not looked at: none is named.", "nothing trains without one."),)
        policies.append(read_policy(inputs.policy))
        return ()

    def find_site() -> tuple[Check, ...]:
        study = inputs.study
        if study is not None and inputs.site_name not in study.site_names:
            raise StudyError(
                f"the study has the sites {', '.join(study.site_names)}, not {inputs.site_name}; "
                "ask the coordinator to enter this site, or correct its name."
            )
        return ()

    set_up = [*guarded("set-up", "policy", read_rules), *guarded("set-up", "study", find_site)]
    checks += guarded("data", "files", read_data)
    policy = policies[0] if policies else None
    checks += data_checks(findings[0], inputs, policy)
    checks += guarded(
        "identity",
        "DICOM headers",
        lambda: identity_checks(findings[0].rows, identified_data_allowed=inputs.identified_data_allowed),
    )
    checks += [*set_up, *site_checks(inputs, policy)]
    checks += guarded("network", "server", lambda: network_checks(inputs))
    return tuple(checks)
