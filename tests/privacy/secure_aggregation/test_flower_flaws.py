"""What is wrong with Flower's SecAgg+ (1.41), shown with its own functions; and that ours is not affected."""

import inspect
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

import simulation.flower_private as flower_private

# isort: split
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.common import Code, FitRes, Status, bytes_to_ndarray, ndarrays_to_parameters
from flwr.common.secure_aggregation.crypto.shamir import combine_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt, encrypt, generate_shared_key
from flwr.common.secure_aggregation.quantization import dequantize, quantize
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, RECORD_KEY_STATE, Key, Stage
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen, share_keys_plaintext_concat
from flwr.compat.common.recorddict_compat import fitres_to_recorddict
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes

from medfed.errors import SecureAggregationError
from privacy.secure_aggregation.encoding import FixedPoint
from privacy.secure_aggregation.messages import OpenRequest, VoteRequest

SITES = (1, 2, 3)
THRESHOLD = 2
UPDATE = np.array([0.25, -1.5, 3.0], dtype=np.float32)


class FlowerRound:
    """Sites of Flower's modifier and a server that may send them anything; every site has ``UPDATE``."""

    def __init__(self, *, num_examples: int = 1000, max_weight: float = 1000.0) -> None:
        self.num_examples = num_examples
        self.workflow = SecAggPlusWorkflow(num_shares=3, reconstruction_threshold=THRESHOLD, max_weight=max_weight)
        self.contexts = {site: Context(1, site, {}, RecordDict(), {}) for site in SITES}
        self.num_messages: Counter[int] = Counter()
        settings: dict[str, Any] = {
            Key.SAMPLE_NUMBER: len(SITES),
            Key.SHARE_NUMBER: len(SITES),
            Key.THRESHOLD: THRESHOLD,
            Key.CLIPPING_RANGE: self.workflow.clipping_range,
            Key.TARGET_RANGE: self.workflow.quantization_range,
            Key.MOD_RANGE: self.workflow.modulus_range,
            Key.MAX_WEIGHT: self.workflow.max_weight,
        }
        answers = {site: self.answer(site, Stage.SETUP, settings) for site in SITES}
        self.public = {site: [answers[site][Key.PUBLIC_KEY_1], answers[site][Key.PUBLIC_KEY_2]] for site in SITES}

    def answer(self, site: int, stage: str, configs: dict[str, Any]) -> dict[str, Any]:
        flower_private.set_task_identity(run_id=1, node_id=flower_private.SERVER_NODE_ID)
        content = RecordDict({RECORD_KEY_CONFIGS: ConfigRecord({**configs, Key.STAGE: stage})})
        message = Message(content, site, MessageType.TRAIN)
        result = FitRes(Status(Code.OK, ""), ndarrays_to_parameters([UPDATE]), self.num_examples, {})
        trained = Message(fitres_to_recorddict(result, keep_input=True), reply_to=message)
        reply = secaggplus_mod(message, self.contexts[site], lambda _message, _context: trained)
        self.num_messages[site] += 1
        return dict(reply.content.config_records[RECORD_KEY_CONFIGS])

    def masked(self) -> dict[int, list[np.ndarray]]:
        """Keys and shares as an honest server passes them on; the masked vectors."""
        keys = {str(site): pair for site, pair in self.public.items()}
        boxes: dict[int, list[tuple[int, bytes]]] = {site: [] for site in SITES}
        for site in SITES:
            shared = self.answer(site, Stage.SHARE_KEYS, keys)
            for receiver, box in zip(shared[Key.DESTINATION_LIST], shared[Key.CIPHERTEXT_LIST], strict=True):
                boxes[receiver].append((site, box))
        return {site: self.collect(site, boxes[site]) for site in SITES}

    def collect(self, site: int, boxes: list[tuple[int, bytes]]) -> list[np.ndarray]:
        configs = {Key.CIPHERTEXT_LIST: [box for _, box in boxes], Key.SOURCE_LIST: [sender for sender, _ in boxes]}
        vectors = self.answer(site, Stage.COLLECT_MASKED_VECTORS, configs)[Key.MASKED_PARAMETERS]
        return [bytes_to_ndarray(data) for data in vectors]

    def unmasked(self, vector: list[np.ndarray], site: int, seed: bytes, pair_keys: dict[int, bytes]) -> np.ndarray:
        """One site's update, once its masks are known."""
        shapes, mod = [array.shape for array in vector], self.workflow.modulus_range
        plain = [array - mask for array, mask in zip(vector, pseudo_rand_gen(seed, mod, shapes), strict=True)]
        for other, key in pair_keys.items():
            sign = -1 if site > other else 1
            plain = [array + sign * mask for array, mask in zip(plain, pseudo_rand_gen(key, mod, shapes), strict=True)]
        factor, quantized = (array & (mod - 1) for array in plain)
        (weighted,) = dequantize([quantized], self.workflow.clipping_range, self.workflow.quantization_range)
        return weighted * (self.workflow.quantization_range / factor[0])


def test_flower_site_that_is_listed_as_active_and_dead_gives_its_update_away() -> None:
    """The lists go to each site as they are; nothing checks that they do not overlap."""
    victim, round = 2, FlowerRound()
    masked = round.masked()
    seeds, keys = [], []
    for site in (1, 3):
        both = {Key.ACTIVE_NODE_ID_LIST: list(SITES), Key.DEAD_NODE_ID_LIST: [victim]}
        answer = round.answer(site, Stage.UNMASK, both)
        shares = answer[Key.SHARE_LIST]
        seeds.append(shares[SITES.index(victim)])
        keys.append(shares[len(SITES)])
    private = load_pem_private_key(combine_shares(keys), password=None)
    pair_keys = {
        site: generate_shared_key(private, load_pem_public_key(round.public[site][0]))  # type: ignore[arg-type]
        for site in (1, 3)
    }
    np.testing.assert_allclose(
        round.unmasked(masked[victim], victim, combine_shares(seeds), pair_keys), UPDATE, atol=8e-6
    )


def test_our_site_has_no_message_that_lists_a_site_twice_over(consortium: Any) -> None:
    """See also test_malicious_server.py: no order of messages makes it give both shares."""
    start = consortium.start(0)
    for site in consortium.sites:
        consortium.mask(site, start, np.zeros(3, np.uint32))
    some = ("site-0", "site-2", "site-3")
    consortium.client("site-2").vote(VoteRequest(start, some))
    with pytest.raises(SecureAggregationError):
        consortium.client("site-2").open(OpenRequest(start, start.sites))


def test_flower_server_in_the_middle_reads_a_vector() -> None:
    """Public keys are those that the server says: it puts its own in the place of every peer's."""
    victim, round = 1, FlowerRound()
    own = {site: (generate_key_pairs(), generate_key_pairs()) for site in (2, 3)}
    shown = {str(site): [public_key_to_bytes(pair[1]) for pair in pairs] for site, pairs in own.items()}
    shared = round.answer(victim, Stage.SHARE_KEYS, {str(victim): round.public[victim], **shown})
    seeds, boxes, pair_keys = [], [], {}
    of_victim = [load_pem_public_key(key) for key in round.public[victim]]
    for receiver, box in zip(shared[Key.DESTINATION_LIST], shared[Key.CIPHERTEXT_LIST], strict=True):
        (first, _), (second, _) = own[receiver]
        key = generate_shared_key(second, of_victim[1])  # type: ignore[arg-type]
        plaintext = decrypt(key, box)
        length = int.from_bytes(plaintext[16:20], "little")
        seeds.append(plaintext[20 : 20 + length])
        boxes.append((receiver, encrypt(key, share_keys_plaintext_concat(receiver, victim, b"", b""))))
        pair_keys[receiver] = generate_shared_key(first, of_victim[0])  # type: ignore[arg-type]
    vector = round.collect(victim, boxes)
    np.testing.assert_allclose(round.unmasked(vector, victim, combine_shares(seeds), pair_keys), UPDATE, atol=8e-6)


def test_flower_seeds_of_pair_masks_have_28_bits() -> None:
    """Base64 text, folded by exclusive or to 32 bits: in each byte, the top bit is never set, and more is known."""

    def folded(key: bytes) -> int:
        seed = 0
        for start in range(0, len(key), 4):
            seed ^= int.from_bytes(key[start : start + 4], "little")
        return seed

    first, second = generate_key_pairs(), generate_key_pairs()
    key = generate_shared_key(first[0], second[1])
    assert (len(key), set(key) <= set(range(128))) == (44, True)
    # The generator of the masks has this seed and nothing else:
    (mask,) = pseudo_rand_gen(key, 2**32, [(8,)])
    np.testing.assert_array_equal(np.random.RandomState(folded(key)).randint(0, 2**32 - 1, 8, dtype=np.int64), mask)
    assert "np.random.RandomState(seed32)" in inspect.getsource(pseudo_rand_gen)
    import base64

    seen = [folded(base64.urlsafe_b64encode(os.urandom(32))) for _ in range(4096)]
    ever = np.bitwise_or.reduce(np.array(seen, dtype=np.uint32))
    always = np.bitwise_and.reduce(np.array(seen, dtype=np.uint32))
    assert int(ever & ~always).bit_count() == 28


def test_our_masks_have_keys_of_256_bits(consortium: Any, vectors: Callable[..., dict[str, Any]]) -> None:
    from privacy.secure_aggregation.masks import pair_mask_key

    keys = [pair_mask_key(os.urandom(32), consortium.epoch.setups["site-1"].round_keys[0], bytes(32), "a", "b")
            for _ in range(512)]  # fmt: skip
    as_bits = np.unpackbits(np.frombuffer(b"".join(keys), np.uint8)).reshape(512, 256)
    assert as_bits.any(axis=0).all()
    assert not as_bits.all(axis=0).any()


def test_flower_weight_above_max_weight_corrupts_the_mean_and_only_warns() -> None:
    """A mean of three equal updates that is not the update: the products are clipped to 8 without a sign of it."""
    round = FlowerRound(num_examples=300_000)
    shapes = [(1,), UPDATE.shape]
    masked = round.masked()
    everybody = {Key.ACTIVE_NODE_ID_LIST: list(SITES), Key.DEAD_NODE_ID_LIST: []}
    shares = {site: round.answer(site, Stage.UNMASK, everybody)[Key.SHARE_LIST] for site in SITES}
    total = [sum(vector[place] for vector in masked.values()) for place in (0, 1)]
    for place, _ in enumerate(SITES):
        seed = combine_shares([shares[site][place] for site in SITES])
        total = [
            array - mask
            for array, mask in zip(total, pseudo_rand_gen(seed, round.workflow.modulus_range, shapes), strict=True)
        ]
    factor, quantized = (array & (round.workflow.modulus_range - 1) for array in total)
    (added,) = dequantize([quantized], round.workflow.clipping_range, round.workflow.quantization_range)
    mean = (added - 2 * round.workflow.clipping_range) * round.workflow.quantization_range / factor[0]
    assert abs(mean[2]) < 0.1  # instead of 3


def test_our_encoding_refuses_what_could_wrap() -> None:
    """Weights are public numbers of the plan; a vector of any size is scaled to the norm, and no sum can wrap."""
    with pytest.raises(SecureAggregationError, match="so that no sum wraps"):
        FixedPoint(1.0, 256)
    fixed = FixedPoint(1.0, 3)
    total = sum(fixed.encode(np.float32(1e6) * UPDATE) for _ in SITES)
    clipped = UPDATE / np.linalg.norm(UPDATE)
    np.testing.assert_allclose(fixed.decode(total.astype(np.uint32), num_summands=3), 3 * clipped, atol=1e-6)


def test_flower_default_quantiser_loses_an_update_of_1e_5_and_ours_does_not() -> None:
    generator = np.random.default_rng(0)
    small = (1e-6 * generator.standard_normal(2000)).astype(np.float32)  # what is left of 1e-5 at a weight of 100/1000
    np.random.seed(0)  # noqa: NPY002  # Flower's quantiser draws from it
    (back,) = dequantize(quantize([small], 8.0, 2**22), 8.0, 2**22)
    assert np.linalg.norm(back - small) > np.linalg.norm(small)
    norm = float(np.linalg.norm(small))
    fixed = FixedPoint(norm, 3)
    ours = fixed.decode(fixed.encode(small), num_summands=1)
    assert np.linalg.norm(ours - small) < 1e-5 * norm


def test_flower_sends_8_bytes_for_a_parameter_in_four_messages_and_we_send_4_in_two(
    consortium: Any, vectors: Callable[..., dict[str, Any]]
) -> None:
    round = FlowerRound()
    masked = round.masked()
    everybody = {Key.ACTIVE_NODE_ID_LIST: list(SITES), Key.DEAD_NODE_ID_LIST: []}
    round.answer(1, Stage.UNMASK, everybody)
    assert round.num_messages[1] == 4
    assert masked[1][1].nbytes == 8 * UPDATE.size
    start = consortium.start(0)
    sent = consortium.mask("site-1", start, vectors(consortium.sites, 1000)["site-1"])
    assert len(sent.vector) == 4 * 1000
    assert len(sent.to_bytes()) < 4 * 1000 + 200
    consortium.client("site-1").open(OpenRequest(start, start.sites))  # the second message, and the last
    assert RECORD_KEY_STATE in round.contexts[1].state.config_records
