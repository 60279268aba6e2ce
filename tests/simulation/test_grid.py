from __future__ import annotations

import hashlib
import itertools
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from medfed.errors import MedfedError
from simulation.grid import FIRST_NODE_ID, WORKER_DIED, InProcessGrid

# isort: split
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

PATIENT_FILE = "/data/patient_0042.nii.gz"
WORKER_COUNTS = [0, pytest.param(1, marks=pytest.mark.process), pytest.param(2, marks=pytest.mark.process)]

client_app = ClientApp()


@client_app.train()
def count_and_hash(message: Message, context: Context) -> Message:
    """A tiny stateful client: its reply depends on every message it has ever had."""
    before = str(context.state["log"]["digest"]) if "log" in context.state else ""
    told = f"{before}|{context.node_config['partition-id']}|{context.run_config['seed']}"
    digest = hashlib.sha256(told.encode() + bytes(message.content["m"]["payload"])).hexdigest()
    context.state["log"] = ConfigRecord({"digest": digest})
    return Message(RecordDict({"m": ConfigRecord({"digest": digest, "pid": os.getpid()})}), reply_to=message)


@client_app.train("deface")
def deface(message: Message, context: Context) -> Message:
    message.content["m"]["list"].append(99)
    message.content["a"]["w"].data = b"defaced"
    message.content["m"]["payload"] = b"defaced"
    return Message(message.content, reply_to=message)


@client_app.train("keep")
def keep_and_send_state(message: Message, context: Context) -> Message:
    if "kept" not in context.state:
        context.state["kept"] = ConfigRecord({"list": [1]})
    context.state["kept"]["list"].append(2)
    return Message(RecordDict({"m": context.state["kept"]}), reply_to=message)


@client_app.train("sleep")
def sleep(message: Message, context: Context) -> Message:
    time.sleep(float(message.content["m"]["seconds"]))
    context.state["slept"] = ConfigRecord({"for": message.content["m"]["seconds"]})
    return Message(RecordDict({"m": message.content["m"]}), reply_to=message)


@client_app.train("fail")
def fail(message: Message, context: Context) -> Message:
    context.state["half"] = ConfigRecord({"done": True})
    raise FileNotFoundError(PATIENT_FILE)


@client_app.train("exit")
def leave(message: Message, context: Context) -> Message:
    raise SystemExit(PATIENT_FILE)


@client_app.train("silent")
def return_nothing(message: Message, context: Context) -> Message:
    return None  # type: ignore[return-value]


@client_app.train("die")
def die(message: Message, context: Context) -> Message:
    if int(context.node_config["partition-id"]) == int(message.content["m"]["victim"]):
        os.kill(os.getpid(), signal.SIGKILL)
    return Message(RecordDict({"m": ConfigRecord({"pid": os.getpid()})}), reply_to=message)


@client_app.train("overlap")
def span(message: Message, context: Context) -> Message:
    begun = time.monotonic()
    time.sleep(0.02)
    times = ConfigRecord({"begun": begun, "ended": time.monotonic()})
    return Message(RecordDict({"m": times}), reply_to=message)


@pytest.fixture
def make_grid() -> Iterator[Callable[..., InProcessGrid]]:
    grids: list[InProcessGrid] = []

    def make(*, nodes: int = 4, workers: int = 0) -> InProcessGrid:
        configs = [{"site": f"s{index}"} for index in range(nodes)]
        grids.append(InProcessGrid(client_app, node_configs=configs, run_config={"seed": 3}, workers=workers))
        return grids[-1]

    yield make
    for grid in grids:
        grid.close()


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(holds: Callable[[], bool], *, timeout_s: float = 10.0) -> None:
    give_up = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < give_up, "gave up waiting"
        time.sleep(0.01)


def record(**values: object) -> RecordDict:
    return RecordDict({"m": ConfigRecord(values)})  # type: ignore[arg-type]


def to_all(grid: Grid, content: RecordDict, kind: str = "train") -> list[Message]:
    return [Message(content, node_id, kind) for node_id in grid.get_node_ids()]


def digests(replies: list[Message]) -> list[str]:
    return [str(reply.content["m"]["digest"]) for reply in replies]


def rounds(grid: InProcessGrid, num_rounds: int) -> list[list[str]]:
    return [
        digests(grid.send_and_receive(to_all(grid, record(payload=bytes([r])), "train"))) for r in range(num_rounds)
    ]


@pytest.mark.process
def test_results_are_bit_identical_for_zero_one_and_two_workers(
    make_grid: Callable[..., InProcessGrid],
) -> None:
    results = [rounds(make_grid(workers=workers), 5) for workers in (0, 1, 2)]
    assert results[0] == results[1] == results[2]
    assert len({digest for digests_ in results[0] for digest in digests_}) == 20  # oracle: all depend on all


@pytest.mark.parametrize("workers", WORKER_COUNTS)
def test_a_server_app_runs_unmodified(make_grid: Callable[..., InProcessGrid], workers: int) -> None:
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        replies = grid.send_and_receive(to_all(grid, record(payload=b"x")))
        context.state["n"] = ConfigRecord({"replies": len(list(replies)), "seed": context.run_config["seed"]})

    assert dict(make_grid(workers=workers).run_server_app(server_app).state["n"]) == {"replies": 4, "seed": 3}


@pytest.mark.parametrize("workers", WORKER_COUNTS)
def test_replies_come_in_the_order_of_the_messages(make_grid: Callable[..., InProcessGrid], workers: int) -> None:
    grid = make_grid(nodes=6, workers=workers)
    naps = [0.05, 0.0, 0.03, 0.0, 0.02, 0.0]
    node_ids = grid.get_node_ids()[::-1]
    messages = [Message(record(seconds=s), n, "train.sleep") for s, n in zip(naps, node_ids, strict=True)]
    replies = grid.send_and_receive(messages)
    assert [reply.metadata.src_node_id for reply in replies] == node_ids
    assert [reply.metadata.reply_to_message_id for reply in replies] == [m.metadata.message_id for m in messages]


@pytest.mark.parametrize("workers", WORKER_COUNTS)
def test_neither_side_can_change_what_the_other_holds(make_grid: Callable[..., InProcessGrid], workers: int) -> None:
    grid = make_grid(workers=workers)
    array = Array(np.arange(3.0))
    shared = RecordDict(
        {
            "m": ConfigRecord({"payload": b"p", "list": [1]}),
            "a": ArrayRecord({"w": array}),
            "n": MetricRecord({"v": [0.5]}),
        }
    )
    _ = shared.object_id  # makes Flower cache memoryviews, which cannot be pickled
    replies = grid.send_and_receive(to_all(grid, shared, "train.deface"))
    assert shared["m"] == {"payload": b"p", "list": [1]}
    assert np.array_equal(array.numpy(), np.arange(3.0))
    assert [reply.content["m"]["list"] for reply in replies] == [[1, 99]] * 4
    assert all(reply.content["a"]["w"].data == b"defaced" for reply in replies)

    first, second = grid.send_and_receive(to_all(grid, shared, "train.keep"))[:2]
    first.content["m"]["list"].append(1000)
    assert second.content["m"]["list"] == [1, 2]
    assert grid.state_of(FIRST_NODE_ID)["kept"]["list"] == [1, 2]


@pytest.mark.parametrize("workers", WORKER_COUNTS)
def test_a_generator_may_reuse_one_record_for_all_messages(
    make_grid: Callable[..., InProcessGrid], workers: int
) -> None:
    grid = make_grid(workers=workers)
    content = record(seconds=0.0, index=0)

    def messages() -> Iterator[Message]:
        for index, node_id in enumerate(grid.get_node_ids()):
            content["m"]["index"] = index
            yield Message(content, node_id, "train.sleep")

    assert [reply.content["m"]["index"] for reply in grid.send_and_receive(messages())] == [0, 1, 2, 3]


@pytest.mark.process
def test_a_late_reply_is_not_delivered_to_a_later_round(make_grid: Callable[..., InProcessGrid]) -> None:
    grid = make_grid(nodes=2, workers=2)
    slow, quick = grid.get_node_ids()
    sent = [
        Message(record(seconds=0.6), slow, "train.sleep"),
        Message(record(seconds=0.0), quick, "train.sleep"),
    ]
    assert [r.metadata.src_node_id for r in grid.send_and_receive(sent, timeout=0.3)] == [quick]

    later = to_all(grid, record(seconds=0.01), "train.sleep")
    replies = grid.send_and_receive(later)
    assert [r.metadata.reply_to_message_id for r in replies] == [m.metadata.message_id for m in later]
    assert [r.content["m"]["seconds"] for r in replies] == [0.01, 0.01]
    assert grid.pull_messages([m.metadata.message_id for m in sent]) == []


@pytest.mark.parametrize("workers", WORKER_COUNTS)
def test_messages_whose_turn_comes_after_the_deadline_are_never_run(
    make_grid: Callable[..., InProcessGrid], workers: int
) -> None:
    grid = make_grid(nodes=8, workers=workers)
    replies = grid.send_and_receive(to_all(grid, record(seconds=0.1), "train.sleep"), timeout=0.25)
    assert 1 <= len(replies) <= 2 * max(1, workers)
    time.sleep(0.2)
    assert "slept" not in grid.state_of(FIRST_NODE_ID + 7)
    assert len(grid.send_and_receive(to_all(grid, record(seconds=0.0), "train.sleep"))) == 8


@pytest.mark.parametrize("workers", WORKER_COUNTS)
@pytest.mark.parametrize("timeout", [0.0, -1.0])
def test_no_time_means_no_run(make_grid: Callable[..., InProcessGrid], workers: int, timeout: float) -> None:
    grid = make_grid(workers=0)
    assert grid.send_and_receive(to_all(grid, record(payload=b"")), timeout=timeout) == []
    assert all(len(grid.state_of(node_id)) == 0 for node_id in grid.get_node_ids())


@pytest.mark.process
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_worker_becomes_an_error_reply_and_the_next_round_works(
    make_grid: Callable[..., InProcessGrid], workers: int
) -> None:
    grid = make_grid(nodes=5, workers=workers)
    grid.start()
    before = set(grid.worker_pids())
    replies = grid.send_and_receive(to_all(grid, record(victim=2), "train.die"), timeout=20)
    assert [reply.has_error() for reply in replies] == [False, False, True, False, False]
    assert replies[2].error.reason == WORKER_DIED
    after = grid.send_and_receive(to_all(grid, record(seconds=0.05), "train.sleep"), timeout=20)
    assert [reply.has_error() for reply in after] == [False] * 5
    assert len(before - set(grid.worker_pids())) == 1
    assert len(grid.worker_pids()) == workers


@pytest.mark.process
def test_a_worker_killed_between_rounds_costs_no_message(make_grid: Callable[..., InProcessGrid]) -> None:
    grid = make_grid(workers=2)
    expected = rounds(make_grid(workers=0), 3)
    got = rounds(grid, 1)
    for pid in grid.worker_pids():
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not any(runs(pid) for pid in grid.worker_pids()))
    second = digests(grid.send_and_receive(to_all(grid, record(payload=bytes([1]))), timeout=20))
    third = digests(grid.send_and_receive(to_all(grid, record(payload=bytes([2]))), timeout=20))
    assert [*got, second, third] == expected


@pytest.mark.parametrize("workers", WORKER_COUNTS)
@pytest.mark.parametrize(
    ("kind", "reason"),
    [("train.fail", "FileNotFoundError"), ("train.exit", "SystemExit"), ("train.silent", "TypeError"),
     ("train.unheard_of", "ValueError")],
)  # fmt: skip
def test_exception_text_is_not_in_the_reply_nor_in_the_log(
    make_grid: Callable[..., InProcessGrid],
    caplog: pytest.LogCaptureFixture,
    workers: int,
    kind: str,
    reason: str,
) -> None:
    grid = make_grid(workers=workers)
    with caplog.at_level(logging.INFO, logger="medfed"):
        replies = grid.send_and_receive(to_all(grid, record(payload=b""), kind))
    assert {(reply.error.code, reply.error.reason) for reply in replies} == {(2, reason)}
    assert PATIENT_FILE not in caplog.text
    if not workers:
        assert f"node_id={FIRST_NODE_ID} error={reason}" in caplog.text
    assert len(grid.state_of(FIRST_NODE_ID)) == 0  # a failed call leaves no half-made state


@pytest.mark.parametrize("workers", WORKER_COUNTS)
def test_threads_that_share_the_grid_get_their_own_replies(
    make_grid: Callable[..., InProcessGrid], workers: int
) -> None:
    grid = make_grid(workers=workers)
    grid.start()
    wrong: list[object] = []

    def round_loop(arm: int) -> None:
        for round_number in range(15):
            sent = to_all(grid, record(seconds=0.0, arm=arm, round=round_number), "train.sleep")
            replies = grid.send_and_receive(sent, timeout=20)
            told = [(r.content["m"]["arm"], r.content["m"]["round"], r.metadata.src_node_id) for r in replies]
            if told != [(arm, round_number, node_id) for node_id in grid.get_node_ids()]:
                wrong.append(told)

    arms = [threading.Thread(target=round_loop, args=(arm,)) for arm in range(3)]
    for arm in arms:
        arm.start()
    for arm in arms:
        arm.join(30)
    assert not any(arm.is_alive() for arm in arms)
    assert wrong == []


@pytest.mark.parametrize("workers", WORKER_COUNTS)
def test_one_message_per_node_at_a_time(make_grid: Callable[..., InProcessGrid], workers: int) -> None:
    grid = make_grid(nodes=1, workers=workers)
    replies = grid.send_and_receive([Message(record(x=1), FIRST_NODE_ID, "train.overlap") for _ in range(4)])
    times = [(float(r.content["m"]["begun"]), float(r.content["m"]["ended"])) for r in replies]
    assert all(ended <= begun for (_, ended), (begun, _) in itertools.pairwise(times))


@pytest.mark.parametrize("workers", WORKER_COUNTS)
def test_one_hundred_nodes_with_large_messages(make_grid: Callable[..., InProcessGrid], workers: int) -> None:
    grid = make_grid(nodes=100, workers=workers)
    payload = bytes(200_000)
    for _ in range(3):
        replies = grid.send_and_receive(to_all(grid, record(payload=payload, seconds=0.0), "train.sleep"), timeout=60)
        assert [r.metadata.src_node_id for r in replies] == grid.get_node_ids()
        assert all(r.content["m"]["payload"] == payload for r in replies)


@pytest.mark.parametrize("workers", WORKER_COUNTS)
def test_pull_returns_each_finished_reply_once(make_grid: Callable[..., InProcessGrid], workers: int) -> None:
    grid = make_grid(workers=workers)
    ids = grid.push_messages(to_all(grid, record(payload=b"x")))
    assert len(set(ids)) == 4
    pulled: list[Message] = []

    def pull_the_rest() -> bool:
        pulled.extend(grid.pull_messages(ids))
        return len(pulled) == len(ids)

    wait_until(pull_the_rest)
    assert {reply.metadata.reply_to_message_id for reply in pulled} == set(ids)
    assert len({reply.metadata.message_id for reply in pulled} | set(ids)) == 8
    assert {reply.metadata.run_id for reply in pulled} == {grid.run.run_id}
    assert grid.pull_messages([*ids, "unknown"]) == []


def test_unknown_node_is_refused_before_anything_runs(make_grid: Callable[..., InProcessGrid]) -> None:
    grid = make_grid()
    messages = [*to_all(grid, record(payload=b"")), Message(record(payload=b""), 7, "train")]
    with pytest.raises(ValueError, match="Expected one of the grid's 4 node ids, got 7"):
        grid.send_and_receive(messages)
    assert len(grid.state_of(FIRST_NODE_ID)) == 0


def test_nodes_can_be_given_by_id_and_know_their_partition() -> None:
    grid = InProcessGrid(client_app, node_configs={50: {"site": "a"}, 40: {"site": "b"}}, run_config={"seed": 1})
    assert grid.get_node_ids() == [50, 40]
    assert grid._node(40).node_config == {"site": "b", "partition-id": 1, "num-partitions": 2}


@pytest.mark.parametrize(
    ("node_configs", "workers", "complaint"),
    [({}, 0, "at least one"), ({1: {}}, 0, "node ids > 1"), ([{}], -1, "workers >= 0")],
)
def test_constructor_refuses(node_configs: dict[int, dict[str, str]], workers: int, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        InProcessGrid(client_app, node_configs=node_configs, run_config={}, workers=workers)


def test_workers_are_refused_once_cuda_is_initialised(
    make_grid: Callable[..., InProcessGrid], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    grid = make_grid(workers=1)
    with pytest.raises(MedfedError, match="workers=0 on a GPU"):
        grid.send_and_receive(to_all(grid, record(payload=b"")))


@pytest.mark.process
def test_close_leaves_no_process_and_kills_one_that_hangs(
    make_grid: Callable[..., InProcessGrid], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simulation.grid._CLOSE_GRACE_S", 0.2)
    grid = make_grid(workers=2)
    grid.push_messages([Message(record(seconds=60.0), FIRST_NODE_ID, "train.sleep")])
    pids = grid.worker_pids()
    time.sleep(0.1)
    begun = time.monotonic()
    grid.close()
    grid.close()
    assert time.monotonic() - begun < 5
    assert not any(psutil.pid_exists(pid) for pid in pids)
    with pytest.raises(MedfedError, match="a closed one"):
        grid.push_messages([])


@pytest.mark.process
def test_close_wakes_a_thread_that_waits_for_replies(
    make_grid: Callable[..., InProcessGrid], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simulation.grid._CLOSE_GRACE_S", 0.2)
    grid = make_grid(workers=1)
    grid.start()
    got: list[str] = []
    messages = to_all(grid, record(seconds=60.0), "train.sleep")

    def send() -> None:
        try:
            grid.send_and_receive(messages)
        except MedfedError as error:
            got.append(str(error))

    waiting = threading.Thread(target=send)
    waiting.start()
    time.sleep(0.2)
    grid.close()
    waiting.join(5)
    assert len(got) == 1, "replies that were given up must not look like all there are"
    assert "closed" in got[0]


@pytest.mark.process
@pytest.mark.slow
def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import time\nfrom simulation.grid import InProcessGrid\nfrom flwr.clientapp import ClientApp\n"
        "grid = InProcessGrid(ClientApp(), node_configs=[{}], run_config={}, workers=2)\n"
        "grid.start()\nprint(*grid.worker_pids(), flush=True)\ntime.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, env=environment, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        parent.kill()
    assert len(pids) == 2
    wait_until(lambda: not any(runs(pid) for pid in pids))
