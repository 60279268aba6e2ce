"""What a signed study would do at a hospital, in words and numbers: for whoever decides whether it may.

Arithmetic on the study, the policy and the ledger. Nothing trains, and no image is read.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from pydantic import BaseModel, ConfigDict

from client.newest_roster import refuse_older_roster
from client.policy import SitePolicy
from client.site_folder import SiteFolder
from medfed.adapter_manifest import AdapterManifest, TensorSpec
from medfed.errors import ConsortiumError
from medfed.signed_study import SignedStudy
from medfed.signing import fingerprint, read_key
from medfed.study import StudyConfig
from medfed.tasks import task_of
from privacy.accounting import epsilon_spent
from privacy.ledger_entry import Cap, ChargedMechanism
from privacy.ledger_view import LedgerView
from privacy.plan import PrivacyPlan
from strategies.registry import strategy_of
from strategies.traffic import traffic_of

_WRAPPER = "base_model.model."  # what PEFT puts before every name
_LEAF_PARTS = 3  # as in q_proj.lora_A.weight
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class _Words(BaseModel):
    model_config = ConfigDict(frozen=True)


class TensorGroup(_Words):
    """Tensors that leave and lie in one module, or in modules that differ in their number alone.

    Attributes:
        name: ``*`` stands for numbers of layers, ``{a,b}`` for a and b; every combination is there.
        count: how many.
        shapes: how many of which shape, by first name.
    """

    name: str
    count: int
    shapes: tuple[tuple[int, tuple[int, ...]], ...]


class Upload(_Words):
    """What leaves in a training round.

    Attributes:
        rounds: ``every round``, or ``odd rounds`` and ``even rounds`` where they differ.
        tensors: groups, in the order of the first name.
        num_tensors: in all.
        num_elements: numbers in them.
    """

    rounds: str
    tensors: tuple[TensorGroup, ...]
    num_tensors: int
    num_elements: int


class PrivacyInWords(_Words):
    """What the study promises to each unit of this hospital's training data; with noised counts to held-out ones too.

    Attributes:
        epsilon_round: of one round's training alone.
        epsilon_study: of all rounds, and all noised counts of held-out patients, composed.
        delta: for which both are computed.
        unit: what is hidden.
        adjacency: relation of neighbouring data sets.
        against: from whom.
    """

    epsilon_round: float
    epsilon_study: float
    delta: float
    unit: Literal["patient", "record"]
    adjacency: str
    against: str


class BudgetInWords(_Words):
    """What the hospital's budget says to it; every epsilon is computed at the budget's delta.

    Attributes:
        cohort: that pays.
        cap: what all studies together may spend.
        delta: of the cap.
        spent: by all studies so far.
        after: spent once this study has run all its rounds.
        rounds_that_fit: of this study, before the ledger refuses; all of them if it fits.
    """

    cohort: str
    cap: float
    delta: float
    spent: float
    after: float
    rounds_that_fit: int

    @property
    def left(self) -> float:
        """What would be left; 0 if the study does not fit."""
        return max(0.0, self.cap - self.after)


class StudyInWords(_Words):
    """A study, for whoever decides.

    Attributes:
        study: name.
        digest: SHA-256 of all that is approved.
        consortium: who asks.
        coordinator: fingerprint of the key that signed the study.
        server: where updates go.
        site: who is asked.
        others: who takes part too.
        task: what is learned.
        backbone: name of the frozen model.
        backbone_sha256: of its weights.
        adapter: what trains.
        num_rounds: how often updates leave.
        local: what happens here in a round.
        uploads: tensors that leave.
        bytes_up: that leave in a round.
        bytes_up_total: in all rounds, with keys.
        bytes_down: that come in a round.
        told: what is told beside them.
        protected: what protects, sentence by sentence.
        not_protected: what does not.
        privacy: None where nothing is promised.
        budget: None where nothing is charged.
        patients: whose images train.
    """

    study: str
    digest: str
    consortium: str
    coordinator: str
    server: str
    site: str
    others: tuple[str, ...]
    task: str
    backbone: str
    backbone_sha256: str
    adapter: str
    num_rounds: int
    local: str
    uploads: tuple[Upload, ...]
    bytes_up: int
    bytes_up_total: int
    bytes_down: int
    told: tuple[str, ...]
    protected: tuple[str, ...]
    not_protected: tuple[str, ...]
    privacy: PrivacyInWords | None
    budget: BudgetInWords | None
    patients: str


def study_in_words(signed: SignedStudy, folder: SiteFolder) -> StudyInWords:
    """What a study would do at this site.

    Args:
        signed: verified with the key of the site's kit.
        folder: of the site.

    Raises:
        ConsortiumError: if the study is another consortium's, not one of this site's, names another key for it, or was
            signed under an older roster than this site has seen.
        PolicyError: if the hospital's policy forbids it, whatever is approved.
        LedgerError: if the privacy ledger is not as it was written: then nobody knows what was spent.
        MedfedError: if its parts do not go together.
    """
    study, kit, settings = signed.study, folder.kit, folder.settings()
    _require_ours(signed, folder)
    refuse_older_roster(signed, folder)
    policy = folder.written_policy()
    policy.model_copy(update={"approved_studies": (study.digest,)}).check_study(study)
    plan = None if study.privacy is None else PrivacyPlan.of_study(study)
    private = plan if plan is not None and plan.is_private else None
    traffic = traffic_of(study)
    return StudyInWords(
        study=study.name,
        digest=study.digest,
        consortium=kit.consortium,
        coordinator=fingerprint(kit.coordinator_key),
        server=str(kit.server),
        site=kit.site,
        others=tuple(name for name in study.site_names if name != kit.site),
        task=_task(study),
        backbone=study.backbone.name,
        backbone_sha256=study.backbone.sha256,
        adapter=study.adapter.in_words,
        num_rounds=study.rounds.num_rounds,
        local=_local(study, kit.site),
        uploads=_uploads(study),
        bytes_up=traffic.round_up,
        bytes_up_total=traffic.round_up * study.rounds.num_rounds
        + traffic.keys_up * _exchanges(study, traffic.sums_per_keys),
        bytes_down=traffic.round_down,
        told=_told(study, kit.site),
        protected=_protected(study),
        not_protected=_not_protected(study),
        privacy=None if private is None else _privacy(private, study),
        budget=None if private is None else _budget(private, study, policy, folder, settings.cohort),
        patients=_patients(study, kit.site, settings.cohort, policy),
    )


def _require_ours(signed: SignedStudy, folder: SiteFolder) -> None:
    study, kit = signed.study, folder.kit
    if signed.consortium != kit.consortium:
        raise ConsortiumError(
            f"Expected a study of {kit.consortium!r}, got one of {signed.consortium!r}; ask the coordinator for the "
            "right file."
        )
    named = next((site for site in study.sites if site.name == kit.site), None)
    if named is None:
        raise ConsortiumError(
            f"Expected a study with site {kit.site!r}, got {study.name!r} with {', '.join(study.site_names)}; it is "
            "not for this hospital."
        )
    if study.sums_securely and named.signing_key != folder.enrolment().signing_key:
        raise ConsortiumError(
            f"Expected this site's own key in {study.name!r}, got another under its name: others would be taken for "
            "this hospital. Do not approve it; ask the coordinator who enrolled."
        )


def _task(study: StudyConfig) -> str:
    if study.task.kind == "segmentation":
        return f"segmentation of {', '.join(study.task.classes)}"
    targets = (f"{name} ({', '.join(classes)})" for name, classes in study.task.targets.items())
    return f"classification of {', '.join(targets)}"


def _local(study: StudyConfig, site: str) -> str:
    training, privacy = study.training, study.privacy
    rank = next(one.rank for one in study.sites if one.name == site)
    narrow = "" if rank is None else f", of the first {rank} ranks alone"
    if privacy is None:
        passes = _count(training.local_epochs or 0, "pass", "passes")
        return f"{passes} over all training images, {training.optimizer}{narrow}"
    noised = "" if privacy.trust == "none" else "noised "
    steps = _count(privacy.steps_per_round, f"{noised}step on", f"{noised}steps, each on")
    return f"{steps} {privacy.unit}s drawn with probability {privacy.sampling_rate:g}, {training.optimizer}{narrow}"


def _uploads(study: StudyConfig) -> tuple[Upload, ...]:
    first, second = (phase.upload_manifest for phase in strategy_of(study).phases)
    if first == second:
        return (_upload("every round", first),)
    return _upload("odd rounds", first), _upload("even rounds", second)


def _upload(rounds: str, manifest: AdapterManifest) -> Upload:
    by_module: dict[tuple[str, ...], list[TensorSpec]] = {}
    for spec in manifest.tensors:
        parts = _parts(spec.name)
        by_module.setdefault((*parts[:-_LEAF_PARTS], str(len(parts))), []).append(spec)
    return Upload(
        rounds=rounds,
        tensors=tuple(group for specs in by_module.values() for group in _folded(specs)),
        num_tensors=len(manifest.tensors),
        num_elements=manifest.num_elements,
    )


def _parts(name: str) -> list[str]:
    return _NUMBER.sub("*", name.removeprefix(_WRAPPER)).split(".")


def _folded(specs: Sequence[TensorSpec]) -> list[TensorGroup]:
    """One group for tensors of a module, if its short name stands for exactly these; else one for each name."""
    names = {tuple(_parts(spec.name)) for spec in specs}
    choices = [sorted(set(column)) for column in zip(*names, strict=True)]
    if math.prod(map(len, choices)) != len(names):
        by_name: dict[tuple[str, ...], list[TensorSpec]] = {}
        for spec in specs:
            by_name.setdefault(tuple(_parts(spec.name)), []).append(spec)
        return [group for same in by_name.values() for group in _folded(same)]
    name = ".".join(found[0] if len(found) == 1 else "{" + ",".join(found) + "}" for found in choices)
    shapes = Counter(spec.shape for spec in specs)
    return [TensorGroup(name=name, count=len(specs), shapes=tuple((count, shape) for shape, count in shapes.items()))]


def _exchanges(study: StudyConfig, sums_per_keys: int) -> int:
    """How often keys are exchanged, if no round is lost."""
    if not sums_per_keys:
        return 0
    sums = study.rounds.num_rounds + study.num_evaluations
    return -(-sums // sums_per_keys)


def _told(study: StudyConfig, site: str) -> tuple[str, ...]:
    declared, masked = study.declared_units(site), study.sums_securely
    size = (
        "the number of training images"
        if declared is None
        else f"a public size of {declared}, which stands in the study, instead of the true number of patients"
    )
    found = [size]
    if study.privacy is None:
        found.append(f"the mean training loss of each round{', under masks' if masked else ''}")
    elif study.privacy.trust != "none":
        found.append("the epsilon that this study has spent here so far; what other studies spent is not told")
    if study.withholds_evaluation:
        found.append("no metrics of held-out patients")
    else:
        names = sorted(task_of(study.task).metric_names)
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        number = "" if masked or study.noises_evaluation else ", the number of held-out images"
        noised = " from noised counts" if study.noises_evaluation else ""
        found.append(
            f"{_count(study.num_evaluations, 'time', 'times')}, metrics of held-out patients{noised} ({shown})"
            f"{', under masks' if masked else number}"
        )
    if masked:
        found.append("keys and shares that open sums over sites")
    found.append("if something goes wrong, the kind of error and a fixed sentence; no names, no paths")
    return tuple(found)


def _protected(study: StudyConfig) -> tuple[str, ...]:
    found = ["No image, no label, no patient id and no file name leaves the hospital."]
    privacy = study.privacy
    if study.sums_securely:
        quorum = study.secure_quorum
        helpers = _count(quorum.max_colluding, "site that helps", "sites that help")
        with_help = f", and even with {helpers} it only a sum over {quorum.min_honest} honest ones"
        found.append(
            f"Masks: of each round the server learns one sum over at least {quorum.min_sites} sites"
            f"{with_help if quorum.max_colluding else ', if no site helps it'}."
        )
    if privacy is not None and privacy.trust == "site":
        found.append("Noise: added here to every step, before anything leaves; nobody else has to be trusted for it.")
    if privacy is not None and privacy.trust == "consortium":
        found.append(
            f"Noise: each site adds a share; what is opened carries that of {study.secure_quorum.min_honest} honest "
            "sites at least. This site's share alone is less than epsilon says: it is the masks that hide it."
        )
    if study.noises_evaluation:
        found.append(
            "Counts of held-out patients: noised here in full before they leave; nobody else has to be trusted for it."
        )
    return tuple(found)


def _not_protected(study: StudyConfig) -> tuple[str, ...]:
    found, privacy = [], study.privacy
    if privacy is None or privacy.trust == "none":
        seen = "sums of updates" if study.sums_securely else "this hospital's updates as they are"
        found.append(
            f"NO DIFFERENTIAL PRIVACY: the server sees {seen}, from which it may be inferred whose images trained, or "
            "what they show."
        )
    elif privacy.unit == "record":
        found.append(
            "Patients with several images: each image is hidden on its own; a patient with n of them is hidden less, "
            "by about n times the epsilon."
        )
    if study.shows_held_out:
        among = "summed over sites, but " if study.sums_securely else ""
        found.append(f"Held-out patients: their metrics leave {among}without noise.")
    found.append("That this hospital takes part, and when. What was sent cannot be called back.")
    return tuple(found)


def _privacy(plan: PrivacyPlan, study: StudyConfig) -> PrivacyInWords:
    against = "everybody who sees what leaves, the server included"
    if plan.trust == "consortium":
        colluding = study.secure_quorum.max_colluding
        against = f"the server and up to {_count(colluding, 'site that helps', 'sites that help')} it"
    return PrivacyInWords(
        epsilon_round=epsilon_spent([plan.mechanism(1)], plan.delta).value,
        epsilon_study=plan.epsilon.value,
        delta=plan.delta,
        unit=plan.unit,
        adjacency=plan.adjacency,
        against=against,
    )


def _budget(
    plan: PrivacyPlan, study: StudyConfig, policy: SitePolicy, folder: SiteFolder, cohort: str
) -> BudgetInWords:
    assert policy.budget is not None  # the policy has allowed the study
    cap, earlier = policy.budget.cap, _charged(folder, cohort)
    after = epsilon_spent([*earlier, plan.mechanism(plan.num_rounds), *plan.evaluations], cap.delta).value
    return BudgetInWords(
        cohort=cohort,
        cap=cap.epsilon,
        delta=cap.delta,
        spent=epsilon_spent(earlier, cap.delta).value,
        after=after,
        rounds_that_fit=plan.num_rounds if after <= cap.epsilon else _rounds_that_fit(plan, study, earlier, cap),
    )


def _charged(folder: SiteFolder, cohort: str) -> tuple[ChargedMechanism, ...]:
    """Everything that was ever charged to a cohort; nothing if there is no ledger yet."""
    if not folder.ledger.exists():
        return ()
    view = LedgerView(folder.ledger, read_key(folder.ledger_key).public_key())
    return tuple(spending.charge.mechanism for spending in view.charges(cohort))


def _rounds_that_fit(plan: PrivacyPlan, study: StudyConfig, earlier: tuple[ChargedMechanism, ...], cap: Cap) -> int:
    """The largest number of rounds below the plan's that stays within the cap, with the evaluations before its last."""

    def charged(rounds: int) -> list[ChargedMechanism]:
        released = [replace(one, steps=study.evaluations_before(rounds)) for one in plan.evaluations]
        return [*earlier, plan.mechanism(rounds), *released]

    fitting, too_many = 0, plan.num_rounds
    while too_many - fitting > 1:
        rounds = (fitting + too_many) // 2
        if epsilon_spent(charged(rounds), cap.delta).value <= cap.epsilon:
            fitting = rounds
        else:
            too_many = rounds
    return fitting


def _patients(study: StudyConfig, site: str, cohort: str, policy: SitePolicy) -> str:
    declared = study.declared_units(site)
    unit = "images" if study.privacy is not None and study.privacy.unit == "record" else "patients"
    least = f"at least {policy.minimum_patients} patients (policy)"
    said = "" if declared is None else f" and {declared} {unit} (as the study says)"
    return f"cohort {cohort!r} of this hospital; trains only if it has {least}{said}"


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
