"""One private round at a site, in the only order that is safe.

1. A request that was answered before gets the same bytes again: they are out already and cost nothing more.
2. The engine passes its self-check on the real model.
3. The ledger reserves the round's privacy, durably. From here on it is spent, whatever happens.
4. Training; then the ledger keeps the reply, and only then may it be sent.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from client.private_trainer import checked_engine, clipped_integers, train_privately, units_of
from client.round_start import RoundStart
from client.secure_round import MaskedRound
from client.site import Site
from medfed.canonical import canonical_bytes, sha256_hex
from medfed.errors import PolicyError, PrivacyError
from medfed.messages import RoundInstruction
from medfed.models.adapted import AdaptedModel
from medfed.study import StudyConfig
from medfed.tasks import task_of
from privacy.ledger_entry import Charge, ChargedMechanism
from privacy.per_sample.engine import Engine
from privacy.plan import PrivacyPlan
from strategies.secure_channel import SecureChannel
from strategies.subspace import Subspace

_log = logging.getLogger("medfed.client.private_round")


def private_reply(
    instruction: RoundInstruction, start: RoundStart, study: StudyConfig, model: AdaptedModel, site: Site
) -> bytes:
    """The payload of the site's update for this round, private as the study's ``[privacy]`` section says.

    Args:
        instruction: what was asked.
        start: what the round begins with.
        study: resolved and approved, with a privacy section.
        model: of the study; with the round's base weights.
        site: whose ledger pays.

    Raises:
        EngineError: if no engine is right for the model; nothing was spent.
        BudgetError: if the cohort's budget does not allow the round; nothing was spent or trained.
        LedgerError: if the ledger cannot be trusted or written; nothing was trained.
        MedfedError: for whatever goes wrong in training; the round is spent.
    """
    assert study.privacy is not None
    plan = PrivacyPlan.of_study(study).alone
    if not plan.is_private:
        engine = engine_for(study, model, start.trainable, site)
        after_P, _ = _trained(instruction, start, study, model, engine, site, plan)
        return _remembered(instruction, start, study, site, after_P, plan)

    cohort, ledger = site.cohort_name(instruction.scope), site.ledger
    request = sha256_hex(canonical_bytes([study.digest, instruction.scope, instruction.round, start.digest.hex()]))
    if (stored := ledger.stored_reply(cohort, request)) is not None:
        _log.info("event=sent_again round=%d", instruction.round)
        return stored
    engine = engine_for(study, model, start.trainable, site)
    with charged(instruction, study, plan, plan.mechanism(1), plan.clip_norm, request, site) as kept:
        after_P, facts = _trained(instruction, start, study, model, engine, site, plan)
        payload = _remembered(instruction, start, study, site, after_P, plan)
        kept(payload, facts)
    return payload


def shared_noise_reply(
    instruction: RoundInstruction,
    start: RoundStart,
    study: StudyConfig,
    model: AdaptedModel,
    site: Site,
    channel: SecureChannel,
    masked: MaskedRound,
) -> bytes:
    """This site's clipped sum of one step with its share of noise, under masks (trust ``consortium``).

    The ledger is charged before anything is drawn: once the masked vector has left, the other sites can open the
    sum without this one. A round that is asked for under other keys is another round with its own charge; the very same
    question is answered from what was stored, before it comes here.

    Args:
        instruction: what was asked.
        start: what the round begins with; the mean change must be all that its phase tells.
        study: resolved and approved, with trust ``consortium``.
        model: of the study; with the round's base weights.
        site: whose ledger pays.
        channel: of the round.
        masked: of the round; has passed the site's checks.

    Raises:
        PrivacyError: if the phase tells more, or less, than the mean change; nothing was spent.
        MedfedError: as :func:`private_reply`.
    """
    trainable = start.trainable
    if not start.phase.is_mean_delta:
        raise PrivacyError(
            "Expected a strategy of which the mean change is all that travels with trust 'consortium', got another: "
            "shared noise is proven for sums of clipped gradients; change [strategy], or set trust = 'site'."
        )
    plan = PrivacyPlan.of_study(study)
    engine = engine_for(study, model, trainable, site)
    request, _ = sha256_hex(masked.id), channel.room  # that a gradient fits is made sure of before the charge
    with charged(instruction, study, plan, plan.mechanism(1), plan.clip_norm, request, site) as kept:
        result = clipped_integers(
            model,
            task_of(study.task),
            units_of(site.cohort(study, model.pixels).train, plan.unit),
            study.training,
            plan,
            engine=engine,
            trainable=trainable,
            start_P=start.adapter_P,
            fitting=channel.fitting,
            features=site.features,
            stream=site.random_stream(instruction.scope, instruction.round),
        )
        reply = masked.masked(channel.noised(result.integers_Z))
        kept(sha256_hex(reply).encode(), result.facts)  # a receipt: the vector itself is never sent twice
    return reply


def _remembered(
    instruction: RoundInstruction, start: RoundStart, study: StudyConfig, site: Site, after_P: Tensor, plan: PrivacyPlan
) -> bytes:
    """The payload of a result, once the site remembers what it keeps of it; both come from noised steps alone."""
    result = start.result(after_P, plan.steps_per_round)
    if start.strategy.remembers_at_sites:
        site.memory(study, instruction.scope).remember(instruction.round, start.remembered(after_P, result))
    return start.payload(result)


@contextmanager
def charged(
    instruction: RoundInstruction,
    study: StudyConfig,
    plan: PrivacyPlan,
    mechanism: ChargedMechanism,
    clip_norm: float,
    request: str,
    site: Site,
) -> Iterator[Callable[[bytes, dict[str, float]], None]]:
    """Reserves a release's privacy before the body, and settles it with what the body keeps: a reply and facts.

    Args:
        instruction: what was asked.
        study: approved.
        plan: of the study.
        mechanism: what the release costs.
        clip_norm: L2 bound of what one unit contributes to it.
        request: digest of what was asked.
        site: whose ledger pays.

    Raises:
        BudgetError: if the cohort's budget does not allow the round; nothing was spent.
        PolicyError: if there is no budget any more; likewise.
        LedgerError: if the ledger cannot be trusted or written.
    """
    if (budget := site.policy.budget) is None:  # taken back since the policy allowed the study
        raise PolicyError("Expected a [budget] to charge the round to, got none; nothing was trained.")
    charge = Charge(
        cohort=site.cohort_name(instruction.scope),
        study=study.name,
        study_digest=study.digest,
        scope=instruction.scope,
        round=instruction.round,
        mechanism=mechanism,
        clip_norm=clip_norm,
        delta=plan.delta,
        unit=plan.unit,
        adjacency=plan.adjacency,
        request_digest=request,
    )
    reservation = site.ledger.reserve(charge, budget.cap)
    settled = False

    def keep(reply: bytes, facts: dict[str, float]) -> None:
        nonlocal settled
        settled = True
        site.ledger.settle(reservation, "sent", reply, facts)

    try:
        yield keep
    except BaseException:
        if not settled:
            site.ledger.settle(reservation, "failed", None, {})
        raise


def engine_for(study: StudyConfig, model: AdaptedModel, trainable: Subspace, site: Site) -> Engine:
    """The engine that passed its self-check on this site's model, for what trains.

    Raises:
        EngineError: if per-patient gradients cannot be right here.
    """
    items = site.cohort(study, model.pixels).train
    return checked_engine(
        model,
        task_of(study.task),
        study,
        trainable=trainable,
        example=items[0],
        features=site.features,
    )


def _trained(
    instruction: RoundInstruction,
    start: RoundStart,
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
        trainable=start.trainable,
        start_P=start.adapter_P,
        declared_units=declared,
        features=site.features,
        stream=site.random_stream(instruction.scope, instruction.round),
        pull=start.pull,
    )
    return result.adapter_P, result.facts
