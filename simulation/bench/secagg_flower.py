"""A round of Flower's SecAgg+, run by its own unchanged code: ``secaggplus_mod`` and ``SecAggPlusWorkflow``.

Messages are handed over in memory: what Flower's transport would add to them is not counted. The round is the one
that suits it best: the whole update is one array, nobody drops out, all ranges are its defaults, and the weight is
the one at which its quantiser loses least.

Every site masks with every other one, and every site holds shares of every other one (``num_shares=1.0``). Of the
sites only one is run in full. What its peers send it is made by the functions of Flower that they would call,
but for the shares of their keys: random bytes of the right length, which nobody needs if nobody drops out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, cast

import simulation.flower_private as flower_private

# isort: split
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.common import Code, FitRes, Status, bytes_to_ndarray, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.secure_aggregation.crypto.shamir import create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import encrypt, generate_shared_key
from flwr.common.secure_aggregation.ndarrays_arithmetic import parameters_addition, parameters_mod
from flwr.common.secure_aggregation.quantization import quantize
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, RECORD_KEY_STATE, Key, Stage
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen, share_keys_plaintext_concat
from flwr.compat.common.recorddict_compat import fitres_to_recorddict
from flwr.server.compat.legacy_context import LegacyContext
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD
from flwr.server.workflow.constant import Key as WorkflowKey
from flwr.server.workflow.secure_aggregation.secaggplus_workflow import WorkflowState
from numpy.typing import NDArray

from privacy.randomness import RandomStream
from simulation.bench.cpu_clock import CpuClock

# Legend: P parameters.

_RUN: Final = 1
_NUM_EXAMPLES: Final = 1000  # Flower's default max_weight: no smaller weight is quantised as finely


class FlowerArm:
    """Rounds over ``num_sites`` sites, whose update is ``update_P``, all the same.

    Attributes:
        upload_bytes: what one site sends in a round, in as many messages as ``num_messages``; set by :meth:`client`.
        num_messages: in a round in which nobody drops out.
    """

    name = "flwr"

    def __init__(self, num_sites: int, threshold: int, update_P: NDArray[np.float32]) -> None:
        self.upload_bytes = 0.0
        self.num_messages = 0
        self._update_P = update_P
        self._sites = list(range(1, num_sites + 1))
        self._workflow = SecAggPlusWorkflow(num_shares=1.0, reconstruction_threshold=threshold)
        self._settings: dict[str, Any] = {
            Key.SAMPLE_NUMBER: num_sites,
            Key.SHARE_NUMBER: num_sites,
            Key.THRESHOLD: threshold,
            Key.CLIPPING_RANGE: self._workflow.clipping_range,
            Key.TARGET_RANGE: self._workflow.quantization_range,
            Key.MOD_RANGE: self._workflow.modulus_range,
            Key.MAX_WEIGHT: self._workflow.max_weight,
        }
        self._threshold = threshold
        self._contexts = {site: Context(_RUN, site, {}, RecordDict(), {}) for site in self._sites}
        self._masked: list[bytes] = []
        stream = RandomStream.for_simulation(0, "seeds of Flower's masks")
        self._seeds = [stream.bytes(32) for _ in self._sites]
        self._shares_of = [create_shares(seed, threshold, num_sites) for seed in self._seeds]
        keys = {peer: self._answer(peer, Stage.SETUP, self._settings, CpuClock()) for peer in self._sites[1:]}
        self._peer_keys = {str(peer): [k[Key.PUBLIC_KEY_1], k[Key.PUBLIC_KEY_2]] for peer, k in keys.items()}

    def client(self) -> CpuClock:
        """One site in all four stages, its training left out."""
        me, *peers = self._sites
        clock = CpuClock()
        keys = self._answer(me, Stage.SETUP, self._settings, clock)
        own = [keys[Key.PUBLIC_KEY_1], keys[Key.PUBLIC_KEY_2]]
        shared = self._answer(me, Stage.SHARE_KEYS, {str(me): own, **self._peer_keys}, clock)
        boxes = [self._box(peer, me, own[1]) for peer in peers]
        collect = {Key.CIPHERTEXT_LIST: boxes, Key.SOURCE_LIST: peers}
        masked = self._answer(me, Stage.COLLECT_MASKED_VECTORS, collect, clock)
        survivors = {Key.ACTIVE_NODE_ID_LIST: self._sites, Key.DEAD_NODE_ID_LIST: []}
        unmask = self._answer(me, Stage.UNMASK, survivors, clock)
        self._masked = masked[Key.MASKED_PARAMETERS]
        answers = (keys, shared, masked, unmask)
        self.num_messages = len(answers)
        self.upload_bytes = sum(_num_bytes(value) for answer in answers for value in answer.values())
        return clock

    def server_adds(self) -> CpuClock:
        """One masked vector is read and added to the sum."""
        total = [bytes_to_ndarray(data) for data in self._masked]
        clock = CpuClock()
        with clock:
            parameters_addition(total, [bytes_to_ndarray(data) for data in self._masked])
        return clock

    def server_opens(self) -> tuple[CpuClock, NDArray[np.float64]]:
        """The workflow's last stage, with everybody's shares at hand, and the mean update."""
        everybody = set(self._sites)
        mean = FitRes(Status(Code.OK, ""), ndarrays_to_parameters([]), _NUM_EXAMPLES, {})
        state = WorkflowState(
            sampled_node_ids=everybody,
            active_node_ids=everybody,
            num_shares=len(everybody),
            threshold=self._threshold,
            clipping_range=self._workflow.clipping_range,
            quantization_range=self._workflow.quantization_range,
            mod_range=self._workflow.modulus_range,
            max_weight=self._workflow.max_weight,
            nid_to_neighbours={site: set(everybody) for site in everybody},
            aggregate_ndarrays=self._sum_under_own_masks(),
            legacy_results=[(cast(Any, None), mean)],
        )
        context = LegacyContext(Context(_RUN, 1, {}, RecordDict(), {}), strategy=cast(Any, _LeavesTheMeanAlone()))
        context.state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({WorkflowKey.CURRENT_ROUND: 1})
        grid = _AnsweredGrid(
            {
                site: {Key.NODE_ID_LIST: self._sites, Key.SHARE_LIST: [shares[place] for shares in self._shares_of]}
                for place, site in enumerate(self._sites)
            }
        )
        clock = CpuClock()
        with clock:
            done = self._workflow.unmask_stage(cast(Any, grid), context, state)
        assert done
        (mean_P,) = parameters_to_ndarrays(mean.parameters)
        return clock, mean_P

    def _answer(self, site: int, stage: str, configs: dict[str, Any], clock: CpuClock) -> dict[str, Any]:
        """What a site answers to a stage."""
        flower_private.set_task_identity(run_id=_RUN, node_id=flower_private.SERVER_NODE_ID)
        record = ConfigRecord({**configs, Key.STAGE: stage})
        message = Message(RecordDict({RECORD_KEY_CONFIGS: record}), site, MessageType.TRAIN)
        result = FitRes(Status(Code.OK, ""), ndarrays_to_parameters([self._update_P]), _NUM_EXAMPLES, {})
        trained = Message(fitres_to_recorddict(result, keep_input=True), reply_to=message)
        with clock:
            reply = secaggplus_mod(message, self._contexts[site], lambda _message, _context: trained)
        return dict(reply.content.config_records[RECORD_KEY_CONFIGS])

    def _box(self, sender: int, receiver: int, receiver_key: bytes) -> bytes:
        """The shares that a peer seals for the site under test."""
        state = self._contexts[sender].state.config_records[RECORD_KEY_STATE]
        key_share = create_shares(cast(bytes, state["sk1"]), 2, 2)[0]  # as long as a share of a higher threshold
        plaintext = share_keys_plaintext_concat(sender, receiver, self._shares_of[sender - 1][receiver - 1], key_share)
        shared_key = generate_shared_key(
            cast(EllipticCurvePrivateKey, load_pem_private_key(cast(bytes, state["sk2"]), password=None)),
            cast(EllipticCurvePublicKey, load_pem_public_key(receiver_key)),
        )
        return encrypt(shared_key, plaintext)

    def _sum_under_own_masks(self) -> list[NDArray[Any]]:
        """The sum of all masked vectors: the masks of pairs have cancelled, each site's own is left."""
        workflow, num_sites = self._workflow, len(self._sites)
        factor = round(_NUM_EXAMPLES / workflow.max_weight * workflow.quantization_range)
        weighted_P = self._update_P * (factor / workflow.quantization_range)
        (quantized_P,) = quantize([cast(Any, weighted_P)], workflow.clipping_range, workflow.quantization_range)
        total: list[NDArray[Any]] = [np.array([num_sites * factor]), num_sites * quantized_P.astype(np.int64)]
        for seed in self._seeds:
            total = parameters_addition(total, pseudo_rand_gen(seed, workflow.modulus_range, [a.shape for a in total]))
        return parameters_mod(total, workflow.modulus_range)


class _AnsweredGrid:
    """A grid on which every site has answered already."""

    def __init__(self, answers: dict[int, dict[str, Any]]) -> None:
        self._contents = {
            site: RecordDict({RECORD_KEY_CONFIGS: ConfigRecord(answer)}) for site, answer in answers.items()
        }

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return [Message(self._contents[message.metadata.dst_node_id], reply_to=message) for message in messages]


class _LeavesTheMeanAlone:
    """A strategy without an optimiser: what comes after the mean is not counted."""

    def aggregate_fit(self, *_: object) -> tuple[None, dict[str, Any]]:
        return None, {}


def _num_bytes(value: object) -> int:
    """Bytes of a record's value, 8 for a number; what the record's form adds is left out."""
    if isinstance(value, list):
        return sum(map(_num_bytes, value))
    return len(value) if isinstance(value, bytes) else 8
