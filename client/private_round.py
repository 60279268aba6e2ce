"""One private round at a site, in the only order that is safe.

1. A request that was answered before gets the same bytes again: they are out already and cost nothing more.
2. The engine passes its self-check on the real model.
3. The ledger reserves the round's privacy, durably. From here on it is spent, whatever happens.
4. Training; then the ledger keeps the reply, and only then may it be sent.
"""

from __future__ import annotations

import logging

from torch import Tensor

from client.private_trainer import checked_engine, train_privately, units_of
from client.site import Site
from medfed.canonical import canonical_bytes, sha256_hex
from medfed.messages import RoundInstruction
from medfed.models.adapted import AdaptedModel
from medfed.payload import decode_adapter, encode_adapter
from medfed.study import StudyConfig
from medfed.tasks import task_of
from privacy.ledger_entry import Charge
from privacy.per_sample.engine import Engine
from privacy.plan import PrivacyPlan
from strategies.strategy import Phase

_log = logging.getLogger("medfed.client.private_round")


def private_reply(
    instruction: RoundInstruction, adapter: bytes, study: StudyConfig, model: AdaptedModel, phase: Phase, site: Site
) -> bytes:
    """The payload of the site's update for this round, private as the study's ``[privacy]`` section says.

    Args:
        instruction: what was asked.
        adapter: the payload that came with it: the global adapter.
        study: resolved and approved, with a privacy section.
        model: of the study.
        phase: what trains and what travels.
        site: whose ledger pays.

    Raises:
        EngineError: if no engine is right for the model; nothing was spent.
        BudgetError: if the cohort's budget does not allow the round; nothing was spent or trained.
        LedgerError: if the ledger cannot be trusted or written; nothing was trained.
        MedfedError: for whatever goes wrong in training; the round is spent.
    """
    assert study.privacy is not None
    manifest = study.resolved_manifest
    start_P = decode_adapter(adapter, manifest)
    plan = PrivacyPlan.of(study.privacy, num_rounds=study.rounds.num_rounds)
    if not plan.is_private:
        after_P, _ = _trained(instruction, start_P, study, model, engine_for(study, model, phase, site), site, plan)
        return _payload(phase, study, start_P, after_P)

    cohort, ledger = site.cohort_name(instruction.scope), site.ledger
    request = sha256_hex(canonical_bytes([study.digest, instruction.scope, instruction.round, sha256_hex(adapter)]))
    if (stored := ledger.stored_reply(cohort, request)) is not None:
        _log.info("event=sent_again round=%d", instruction.round)
        return stored
    engine = engine_for(study, model, phase, site)
    assert site.policy.budget is not None  # the policy refused the study otherwise
    charge = Charge(
        cohort=cohort,
        study=study.name,
        study_digest=study.digest,
        scope=instruction.scope,
        round=instruction.round,
        mechanism=plan.mechanism(1),
        clip_norm=plan.clip_norm,
        delta=plan.delta,
        unit=plan.unit,
        adjacency=plan.adjacency,
        request_digest=request,
    )
    reservation = ledger.reserve(charge, site.policy.budget.cap)
    try:
        after_P, facts = _trained(instruction, start_P, study, model, engine, site, plan)
        payload = _payload(phase, study, start_P, after_P)
    except BaseException:
        ledger.settle(reservation, "failed", None, {})
        raise
    ledger.settle(reservation, "sent", payload, facts)
    return payload


def engine_for(study: StudyConfig, model: AdaptedModel, phase: Phase, site: Site) -> Engine:
    """The engine that passed its self-check on this site's model, for what the phase trains.

    Raises:
        EngineError: if per-patient gradients cannot be right here.
    """
    items = site.cohort(study, model.pixels).train
    return checked_engine(
        model,
        task_of(study.task),
        study,
        trainable=phase.trainable,
        example=items[0],
        features=site.features,
    )


def _trained(
    instruction: RoundInstruction,
    start_P: Tensor,
    study: StudyConfig,
    model: AdaptedModel,
    engine: Engine,
    site: Site,
    plan: PrivacyPlan,
) -> tuple[Tensor, dict[str, float]]:
    declared = study.declared_units(site.name)
    assert declared is not None
    result = train_privately(
        model,
        task_of(study.task),
        units_of(site.cohort(study, model.pixels).train, plan.unit),
        study.training,
        plan,
        engine=engine,
        start_P=start_P,
        declared_units=declared,
        features=site.features,
        stream=site.random_stream(instruction.scope, instruction.round),
    )
    return result.adapter_P, result.facts


def _payload(phase: Phase, study: StudyConfig, start_P: Tensor, after_P: Tensor) -> bytes:
    manifest = study.resolved_manifest
    return encode_adapter(phase.upload_vector(manifest, start_P, after_P), phase.upload_manifest(manifest))
