"""Every error a user of medfed can meet, as one tree.

::

    MedfedError                     exit 1   anything below
    +-- StudyError                  exit 2   the study file, or what it points to, is wrong
    |   +-- IndividualsError        exit 2   a strategy that must see single sites, where sums are secure; a TypeError
    +-- DataError                   exit 3   a cohort breaks the rules it must keep
    +-- WeightsError                exit 4   backbone weights are missing or not the ones the study names
    +-- MissingExtraError           exit 5   an optional extra is not installed
    +-- AdapterMismatchError        exit 6   a tensor that the manifest does not name, or names otherwise
    |   +-- PayloadError            exit 6   bytes that are not an adapter payload
    |   +-- DivergedError           exit 6   training that ended with NaN or infinity
    +-- MessageError                exit 7   a round message that cannot be read
    +-- RoundError                  exit 8   a round that cannot be completed (quorum, deadline)
    |   +-- LostRoundError          exit 8   a secure sum that was agreed on and can no longer be opened
    +-- CheckpointError             exit 9   a run folder that cannot be continued
    +-- DeviceError                 exit 10  a device that was asked for and is not there
    +-- SiteError                   exit 11  the site's own set-up is not as it must be
    +-- PrivacyError                exit 12  a privacy plan that contradicts itself or cannot be kept
    |   +-- EngineError             exit 12  a model whose per-sample gradients cannot be made right
    +-- BudgetError                 exit 13  a charge that would pass the cap of a cohort
    +-- LedgerError                 exit 14  a privacy ledger that was changed, lost or cannot be written
    +-- PolicyError                 exit 15  something that the site's policy does not allow
    +-- SecureAggregationError      exit 16  a step of secure aggregation that may not or cannot be taken
    +-- ConsortiumError             exit 17  a consortium's folder, kit or enrolment that is not as it must be
    |   +-- DocumentError           exit 17  a signed document that is damaged, or that somebody else signed
    +-- LinkError                   exit 18  the other side refuses the connection, or speaks another version
    |   +-- LinkDownError           exit 18  the other side cannot be reached now; trying again may help
    +-- AuditLogError               exit 19  an audit log that was changed or cannot be written

A message says what was expected, what was got and what to do. It is shown to the person in front of the
process that raised it and is never sent over the network: it may name files. What travels is the name of
the class and its :attr:`MedfedError.public` sentence, which names nothing.
"""

from __future__ import annotations

from typing import ClassVar


class MedfedError(Exception):
    """Base of all errors that are a user's or a peer's to mend; shown as one line, without a traceback.

    Attributes:
        exit_code: process exit status of the command line when this error ends it.
        public: what may be told to the other side of the network: the kind of error, no names.
    """

    exit_code: ClassVar[int] = 1
    public: ClassVar[str] = "the site met an error"


class StudyError(MedfedError):
    """The study file has a wrong key, value, path or digest."""

    exit_code = 2
    public = "the study could not be read or is not the expected one"


class IndividualsError(StudyError, TypeError):
    """A strategy that needs each site's own update, in a study that opens nothing but sums: known by its type."""

    public = "the study's strategy needs single updates, and secure aggregation opens sums alone"


class DataError(MedfedError):
    """A cohort is empty, has an image without patient, a label outside the classes, a NaN voxel, and so on."""

    exit_code = 3
    public = "the site's cohort failed validation"


class WeightsError(MedfedError):
    """Backbone weights are missing, incomplete, or do not have the digest that the study names."""

    exit_code = 4
    public = "the site does not hold the backbone weights that the study names"


class MissingExtraError(MedfedError):
    """An optional part of medfed is needed and not installed."""

    exit_code = 5
    public = "an optional package is missing"


class AdapterMismatchError(MedfedError):
    """A tensor with a name, shape, dtype or value that the adapter manifest does not allow."""

    exit_code = 6
    public = "an adapter does not match the manifest"


class PayloadError(AdapterMismatchError):
    """Bytes that are not an adapter payload of a known version, or that were damaged on the way."""

    public = "an adapter payload could not be decoded"


class DivergedError(AdapterMismatchError):
    """Local training ended with NaN or infinity."""

    public = "training diverged to NaN or infinity; lower the learning rate"


class MessageError(MedfedError):
    """A round message with a missing, unknown or ill-typed field."""

    exit_code = 7
    public = "a message could not be read"


class RoundError(MedfedError):
    """A round that did not reach its quorum before its deadline."""

    exit_code = 8
    public = "the round did not reach its quorum"


class LostRoundError(RoundError):
    """A secure sum whose survivors were agreed on, too few of whom are left to open it; no other may be opened."""

    public = "the sum of the round can no longer be opened"


class CheckpointError(MedfedError):
    """A run folder whose checkpoint is missing, damaged, or belongs to another study."""

    exit_code = 9
    public = "the run cannot be continued"


class SiteError(MedfedError):
    """The site's own set-up is not as it must be, for example a key that others can read."""

    exit_code = 11
    public = "the site's own set-up needs attention"


class DeviceError(MedfedError):
    """A compute device that the site asked for and does not have."""

    exit_code = 10
    public = "the site's compute device is not available"


class PrivacyError(MedfedError):
    """A privacy plan that contradicts itself, or that cannot be kept on this data."""

    exit_code = 12
    public = "the privacy plan cannot be kept"


class EngineError(PrivacyError):
    """Per-sample gradients of this model cannot be made right: nothing was trained and nothing spent."""

    public = "per-sample gradients of this model cannot be made right at the site"


class BudgetError(MedfedError):
    """A charge after which a cohort's epsilon would pass its cap."""

    exit_code = 13
    public = "the privacy budget of the site's cohort does not allow it"


class LedgerError(MedfedError):
    """A privacy ledger that was changed, is not the newest, or cannot be written."""

    exit_code = 14
    public = "the site's privacy ledger needs attention"


class PolicyError(MedfedError):
    """The hospital's own policy does not allow what was asked."""

    exit_code = 15
    public = "the site's policy does not allow it"


class SecureAggregationError(MedfedError):
    """A message of secure aggregation that is not as agreed, or a step that could open a single site's update."""

    exit_code = 16
    public = "the site refused a step of secure aggregation"


class ConsortiumError(MedfedError):
    """A consortium's folder, a kit or an enrolment that is not as it must be, or belongs to another consortium."""

    exit_code = 17
    public = "the consortium's files need attention"


class DocumentError(ConsortiumError):
    """A signed document that is damaged, of another kind, or signed by somebody who is not believed."""

    public = "a signed document is not as it must be"


class LinkError(MedfedError):
    """The connection between a site and the consortium's server is refused, or cannot be as the two are set up."""

    exit_code = 18
    public = "the connection was refused"


class LinkDownError(LinkError):
    """The other side cannot be reached, or does not answer; trying again may help."""

    public = "the connection is down"


class AuditLogError(MedfedError):
    """The log of what left the site was changed, or cannot be written: nothing leaves without an entry in it."""

    exit_code = 19
    public = "the site's audit log needs attention"
