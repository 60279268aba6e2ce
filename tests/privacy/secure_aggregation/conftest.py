"""What the tests of secure aggregation share: a consortium with journals, honest rounds, and the server's knowledge."""

import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from medfed.consortium import Quorum
from privacy.randomness import RandomStream
from privacy.secure_aggregation.client import SecureClient, _SlotSecrets
from privacy.secure_aggregation.encoding import Ring
from privacy.secure_aggregation.identity import Identity
from privacy.secure_aggregation.journal import Journal
from privacy.secure_aggregation.masking import add_mask
from privacy.secure_aggregation.masks import add_pair_masks, own_mask_key
from privacy.secure_aggregation.messages import (
    Advertised,
    Masked,
    OpenRequest,
    Relay,
    Roster,
    RoundStart,
    Setup,
    Shares,
    Upload,
    VoteRequest,
)
from privacy.secure_aggregation.plan import SecureAggregationPlan
from privacy.secure_aggregation.server import Epoch, SecureSum, SetupPhase
from privacy.secure_aggregation.shamir import reconstruct

MODEL = b"m" * 32


@dataclass
class Consortium:
    """Sites with journals in a folder. Every call makes a new :class:`SecureClient`, as after a restart."""

    plan: SecureAggregationPlan
    identities: Mapping[str, Identity]
    folder: Path
    stream: RandomStream | None = None
    epoch: Epoch | None = None

    @property
    def sites(self) -> tuple[str, ...]:
        return self.plan.sites

    def client(self, site: str) -> SecureClient:
        folder = self.folder / site
        if self.stream is None:
            return SecureClient(site, self.identities[site], self.plan, folder)
        return SecureClient(site, self.identities[site], self.plan, folder, random_bytes=self.stream.bytes)

    def journal(self, site: str) -> Journal:
        return Journal(self.folder / site)

    def advertised(self, epoch: int = 1, sites: Collection[str] | None = None) -> SetupPhase:
        """A setup in which sites have made their keys known, and the roster is there."""
        phase = SetupPhase(self.plan, epoch)
        for site in self.sites:
            if sites is None or site in sites:
                advertised = self.client(site).advertise(epoch)
                phase.advertise(Advertised.parse(advertised.to_bytes()))
        assert phase.roster.epoch == epoch
        return phase

    def begin(self, epoch: int = 1, sites: Collection[str] | None = None) -> Epoch:
        """An honest setup."""
        phase = self.advertised(epoch, sites)
        present, roster = phase.roster.sites, phase.roster.to_bytes()
        for site in present:
            phase.add(Setup.parse(self.client(site).setup(Roster.parse(roster)).to_bytes()))
        for site in present:
            phase.accept(self.client(site).accept(Relay.parse(phase.relay_to(site).to_bytes())))
        self.epoch = phase.finish()
        return self.epoch

    def start(
        self,
        slot: int = 0,
        sites: Collection[str] | None = None,
        *,
        channel: bytes | None = None,
        model: bytes = MODEL,
    ) -> RoundStart:
        """The start of a round; every slot of every epoch sums something else unless a channel is named."""
        assert self.epoch is not None
        return self.epoch.start(
            slot,
            channel=channel or sha256(f"slot {slot} of epoch {self.epoch.number}".encode()).digest(),
            model=model,
            sites=list(self.epoch.setups if sites is None else sites),
        )

    def round_id(self, start: RoundStart) -> bytes:
        assert self.epoch is not None
        return start.round_id(tuple(self.epoch.body_digests[site] for site in start.sites))

    def mask(self, site: str, start: RoundStart, vector_P: Ring) -> Masked:
        return self.client(site).mask(start, vector_P, channel=start.channel, model=start.model)

    @staticmethod
    def upload(masked: Masked) -> Upload:
        """Proof that a site uploaded."""
        (_, vector_digest) = Masked.signed_fields(masked.round_id, masked.vector)
        return Upload(masked.site, vector_digest, masked.signature)

    def run(
        self,
        start: RoundStart,
        vectors: Mapping[str, Ring],
        *,
        before_upload: Collection[str] = (),
        before_vote: Collection[str] = (),
        before_open: Collection[str] = (),
    ) -> tuple[Ring, tuple[str, ...], SecureSum]:
        """An honest round in which some sites drop out; everything goes over the wire as bytes."""
        assert self.epoch is not None
        (first, *_) = vectors.values()
        server = SecureSum(self.epoch, start, num_elements=len(first), ring_bits=32 if first.itemsize == 4 else 64)
        there = [site for site in start.sites if site not in before_upload]
        for site in there:
            server.add(Masked.parse(self.mask(site, RoundStart.parse(start.to_bytes()), vectors[site]).to_bytes()))
        server.close()
        there = [site for site in there if site not in before_vote]
        if server.needs_votes:
            for site in there:
                server.add_vote(self.client(site).vote(VoteRequest.parse(server.vote_request().to_bytes())))
        request = server.open_request().to_bytes()
        for site in there:
            if site not in before_open:
                server.add_shares(Shares.parse(self.client(site).open(OpenRequest.parse(request)).to_bytes()))
        total_P, blamed = server.opened()
        assert blamed == ()
        return total_P, server.survivors, server


MakeConsortium = Callable[..., Consortium]


def identity_of(name: str) -> Identity:
    return Identity(sha256(name.encode()).digest())


def openable(
    sites: Iterable[str], masked: Collection[str], seeds: Collection[str], keys: Collection[str]
) -> list[frozenset[str]]:
    """The smallest sums that can be computed in a round: sets of sites whose vectors' unknown masks all cancel.

    Args:
        sites: of the round.
        masked: whose vector under masks the adversary has, but for those it controls.
        seeds: whose own mask it knows.
        keys: whose pair masks it knows, those it controls among them.
    """
    unknown = [site for site in sites if site not in keys]
    usable = {site for site in masked if site in seeds}
    found, left = [], set(usable)
    while left:
        reached, new = set(), {left.pop()}
        while new:
            one = new.pop()
            reached.add(one)
            if one not in keys:
                new |= set(unknown) - reached
        left -= reached
        if reached <= usable:
            found.append(frozenset(reached))
    return found


@dataclass
class Adversary:
    """All that a malicious server and the sites that collude with it know; and what follows from it."""

    consortium: Consortium
    corrupt: tuple[str, ...]
    _shares: dict[tuple[str, str, int], dict[int, bytes]] = field(default_factory=dict)
    _secrets: dict[tuple[str, str, int], bytes] = field(default_factory=dict)
    _masked: list[tuple[RoundStart, Masked]] = field(default_factory=list)

    def join(self, epoch: int, slots: Iterable[int]) -> None:
        """The corrupt sites tell all they know of these slots, before it is destroyed."""
        for site in self.corrupt:
            for slot in slots:
                secrets = _SlotSecrets.parse(self.consortium.journal(site).secret(epoch, slot))
                self._secrets["key", site, slot] = secrets.own.round_key
                self._secrets["seed", site, slot] = secrets.own.seed
                for dealt in secrets.dealt:
                    self._share("key", dealt.site, slot, site, dealt.key_share)
                    self._share("seed", dealt.site, slot, site, dealt.seed_share)

    def hear_masked(self, start: RoundStart, masked: Masked) -> None:
        self._masked.append((start, masked))

    def hear_shares(self, request: OpenRequest, shares: Shares) -> None:
        for dealer, share in zip(request.start.sites, shares.shares, strict=True):
            kind = "seed" if dealer in request.survivors else "key"
            self._share(kind, dealer, request.start.slot, shares.site, share)

    def _share(self, kind: str, dealer: str, slot: int, holder: str, share: bytes) -> None:
        self._shares.setdefault((kind, dealer, slot), {})[self.consortium.plan.point(holder)] = share

    def secret(self, kind: str, site: str, slot: int) -> bytes | None:
        """The private round key of a site, or the seed of its own mask; None if it cannot be had."""
        if (kind, site, slot) in self._secrets:
            return self._secrets[kind, site, slot]
        shares = self._shares.get((kind, site, slot), {})
        if len(shares) < self.consortium.plan.threshold:
            return None
        as_arrays = {point: np.frombuffer(share, dtype=np.uint8) for point, share in shares.items()}
        return reconstruct(as_arrays).tobytes()

    def sums(self) -> dict[frozenset[str], Ring]:
        """Every smallest sum of honest sites' vectors that can be computed, over all rounds."""
        found: dict[frozenset[str], Ring] = {}
        epoch = self.consortium.epoch
        assert epoch is not None
        for start in {start for start, _ in self._masked}:
            vectors = {masked.site: masked for other, masked in self._masked if other == start}
            slot, round_id = start.slot, self.consortium.round_id(start)
            seeds = {site: self.secret("seed", site, slot) for site in start.sites}
            keys = {site: self.secret("key", site, slot) for site in start.sites}
            for group in openable(
                start.sites,
                vectors,
                [site for site, seed in seeds.items() if seed is not None],
                [site for site, key in keys.items() if key is not None],
            ):
                total_P: Ring = np.zeros(len(vectors[min(group)].vector) // 4, np.uint32)
                for site in group:
                    total_P += np.frombuffer(vectors[site].vector, dtype="<u4")
                    seed = seeds[site]
                    assert seed is not None
                    add_mask(total_P, own_mask_key(seed, round_id, site), negative=True)
                    for other in start.sites:
                        if other in group:
                            continue
                        # What `other` adds for the pair is minus what `site` added.
                        by, key, with_, own = other, keys[other], site, False
                        if key is None:
                            by, key, with_, own = site, keys[site], other, True
                        assert key is not None
                        public = {with_: epoch.setups[with_].round_keys[slot]}
                        add_pair_masks(
                            total_P, by, key, public, sites=start.sites, others=[with_], round_id=round_id, negative=own
                        )
                found[group] = total_P
        return found


@pytest.fixture
def journals(tmp_path: Path) -> Iterator[Path]:
    """A folder for journals, in memory where there is such a place: the tests sync thousands of times."""
    if not Path("/dev/shm").is_dir():
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="medfed-test-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def make_consortium(journals: Path) -> MakeConsortium:
    """A consortium of ``num_sites``, with the smallest threshold and sum that hold; keyword arguments replace them.

    ``weakened`` replaces them unchecked, for tests that have switched the check off.
    """
    made = 0

    def make(
        num_sites: int = 4,
        max_colluding: int = 1,
        *,
        threshold: int | None = None,
        min_sites: int | None = None,
        rounds_per_epoch: int = 4,
        study: bytes = bytes(32),
        scope: str = "federated",
        seed: int | None = None,
        weakened: Mapping[str, int] | None = None,
    ) -> Consortium:
        nonlocal made
        made += 1
        quorum = Quorum.of(num_sites=num_sites, max_colluding=max_colluding, threshold=threshold, min_sites=min_sites)
        identities = {f"site-{number}": identity_of(f"site-{number}") for number in range(num_sites)}
        numbers = {
            "threshold": quorum.threshold,
            "max_colluding": quorum.max_colluding,
            "min_sites": quorum.min_sites,
            **(weakened or {}),
        }
        plan = SecureAggregationPlan(
            study_digest=study,
            scope=scope,
            members=tuple(identity.member(site) for site, identity in identities.items()),
            rounds_per_epoch=rounds_per_epoch,
            **numbers,
        )
        stream = None if seed is None else RandomStream.for_simulation(seed, "secure aggregation")
        return Consortium(plan, identities, journals / f"consortium-{made}", stream)

    return make


@pytest.fixture
def consortium(make_consortium: MakeConsortium) -> Consortium:
    """Four sites, one of them corrupt, three votes, sums of three; in the first epoch."""
    made = make_consortium()
    made.begin()
    return made


@pytest.fixture
def adversary_of() -> Callable[..., Adversary]:
    """The knowledge of a server that controls some sites."""
    return Adversary


@pytest.fixture
def sums_open_to() -> Callable[..., list[frozenset[str]]]:
    return openable


@pytest.fixture
def vectors() -> Callable[..., dict[str, Ring]]:
    """A vector of random ring elements for every site."""

    def make(sites: Iterable[str], num_elements: int = 5, *, ring_bits: int = 32, seed: int = 0) -> dict[str, Ring]:
        generator = np.random.default_rng([seed, 7])
        dtype = np.uint32 if ring_bits == 32 else np.uint64
        return {site: generator.integers(0, 2**ring_bits, num_elements, dtype=dtype) for site in sites}

    return make
