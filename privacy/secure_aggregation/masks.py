"""Which masks lie on a site's vector in a round, and the keys they come from.

With the sites of a round in order, site i sends ``y_i = x_i + PRG(b_i) + sum_{j > i} PRG(k_ij) - sum_{j < i}
PRG(k_ij)``, all mod 2**32 (Bonawitz et al. 2017, figure 4). The pair masks cancel in the sum over all sites; what
is left is each site's own mask, whose seed b_i is opened for survivors only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from privacy.secure_aggregation.encoding import Ring
from privacy.secure_aggregation.identity import derived_key, shared_secret
from privacy.secure_aggregation.masking import add_mask


def own_mask_key(seed: bytes, round_id: bytes, site: str) -> bytes:
    """Key of the mask that a site shares with nobody."""
    return derived_key(seed, "own mask", round_id, site.encode())


def pair_mask_key(round_key: bytes, public_key: bytes, round_id: bytes, first: str, second: str) -> bytes:
    """Key of the mask of two sites, ``first`` before ``second``; either's private key and the other's public one.

    Raises:
        SecureAggregationError: if the public key gives no secret.
    """
    secret = shared_secret(X25519PrivateKey.from_private_bytes(round_key), public_key)
    return derived_key(secret, "pair mask", round_id, first.encode(), second.encode())


def add_pair_masks(
    total_P: Ring,
    site: str,
    round_key: bytes,
    public_keys: Mapping[str, bytes],
    *,
    sites: Sequence[str],
    others: Sequence[str],
    round_id: bytes,
    negative: bool = False,
) -> None:
    """Add what ``site`` adds to its vector for its pairs with ``others``; ``negative`` takes it away again.

    Args:
        total_P: changed in place.
        site: whose masks.
        round_key: its private key of the round.
        public_keys: round key of each of the others.
        sites: all sites of the round, in order.
        others: with whom.
        round_id: of the round.
        negative: subtract instead of add.
    """
    place = {name: index for index, name in enumerate(sites)}
    for other in others:
        first, second = sorted((site, other), key=place.__getitem__)
        key = pair_mask_key(round_key, public_keys[other], round_id, first, second)
        add_mask(total_P, key, negative=negative != (site == second))
