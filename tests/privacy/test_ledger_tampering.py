"""Whatever is changed in a ledger's files is found, and the first changed entry is named."""

import dataclasses
import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medfed.canonical import canonical_bytes, sha256_hex
from medfed.errors import LedgerError
from privacy.ledger import PrivacyLedger, Reservation
from privacy.ledger_chain import Chain
from privacy.ledger_entry import (
    NO_DIGEST,
    Body,
    Cap,
    Charge,
    Entry,
    Opened,
    Reserved,
    Settled,
    chained_digest,
    is_signed,
    read_body,
    signed_entry,
)
from privacy.ledger_head import Head, head_path, read_head, write_head
from privacy.ledger_store import append_entry, entries_from, transaction
from privacy.ledger_view import LedgerView, inspect_ledger
from privacy.skellam_accounting import SkellamMechanism

MakeCharge = Callable[..., Charge]
Tamper = Callable[..., None]

OTHER_KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))


@pytest.fixture
def written(ledger: PrivacyLedger, path: Path, make_charge: MakeCharge, cap: Cap) -> Path:
    """Entries: 1 opens; 2, 4, 6 reserve rounds 1 to 3; 3, 5 settle rounds 1 and 2."""
    for round in (1, 2):
        ledger.settle(ledger.reserve(make_charge(round), cap), "sent", b"reply %d" % round, {})
    ledger.reserve(make_charge(3), cap)
    return path


def every_way_to_read(path: Path, key: Ed25519PrivateKey) -> list[str]:
    """What each way to read a ledger says is wrong with it."""
    said = []
    for read in (
        lambda: PrivacyLedger.open(path, key),
        lambda: LedgerView(path, key.public_key()).verify(),
        lambda: LedgerView(path, key.public_key()).charges("chest-2024"),
        lambda: LedgerView(path, key.public_key()).stored_reply("chest-2024", f"{2:064x}"),
    ):
        with pytest.raises(LedgerError) as error:
            read()
        said.append(str(error.value))
    _, found = inspect_ledger(path, key.public_key())
    return [*said, str(found)]


def body_of(path: Path, sequence: int) -> bytes:
    with transaction(path, write=False) as connection:
        return next(entries_from(connection, sequence)).body


def set_body(path: Path, tamper: Tamper, sequence: int, body: bytes, *, digest: bool = False) -> None:
    """Replaces a body; with ``digest``, also the digest, as anybody can compute it."""
    tamper(path, ("UPDATE entries SET body = ? WHERE sequence = ?", (body, sequence)))
    if digest:
        with transaction(path, write=False) as connection:
            before = next(entries_from(connection, sequence - 1)).digest
        tamper(path, ("UPDATE entries SET digest = ? WHERE sequence = ?", (chained_digest(before, body), sequence)))


def cheaper(path: Path, sequence: int) -> bytes:
    body = body_of(path, sequence)
    assert b'"steps":3' in body
    return body.replace(b'"steps":3', b'"steps":1')


def flip(blob: str, sequence: int) -> Callable[[Path, Tamper], None]:
    def change(path: Path, tamper: Tamper) -> None:
        with transaction(path, write=False) as connection:
            value = bytearray(getattr(next(entries_from(connection, sequence)), blob))
        value[7] ^= 1
        tamper(path, (f"UPDATE entries SET {blob} = ? WHERE sequence = ?", (bytes(value), sequence)))

    return change


def sql(*statements: str) -> Callable[[Path, Tamper], None]:
    return lambda path, tamper: tamper(path, *statements)


def drop_trigger(path: Path, _: Tamper) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TRIGGER entries_keep")
    connection.close()


def add_trigger(path: Path, _: Tamper) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TRIGGER forget AFTER INSERT ON replies BEGIN DELETE FROM replies; END")
    connection.close()


def wal(path: Path, _: Tamper) -> None:
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA journal_mode=WAL").fetchone() == ("wal",)
    connection.close()


def no_head(path: Path, _: Tamper) -> None:
    head_path(path).unlink()


def head_bit(path: Path, _: Tamper) -> None:
    fields = json.loads(head_path(path).read_bytes())
    head_path(path).write_text(json.dumps({**fields, "sequence": 2}))


def head_garbage(path: Path, _: Tamper) -> None:
    head_path(path).write_bytes(b"\xff{}")


def head_of_another_key(path: Path, _: Tamper) -> None:
    with transaction(path, write=False) as connection:
        entry = next(entries_from(connection, 3))
    write_head(head_path(path), Head(3, entry.digest), OTHER_KEY)


SWAP = (
    "UPDATE entries SET sequence = -1 WHERE sequence = 4",
    "UPDATE entries SET sequence = 4 WHERE sequence = 5",
    "UPDATE entries SET sequence = 5 WHERE sequence = -1",
)
ROUND_1, ROUND_2, ROUND_3 = (f"study 'lesions', round {number}" for number in (1, 2, 3))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        pytest.param(flip("digest", 4), f"entry 4 ({ROUND_2})", id="digest"),
        pytest.param(flip("signature", 4), f"entry 4 ({ROUND_2})", id="signature"),
        pytest.param(flip("signature", 3), f"entry 3 (settles entry 2: {ROUND_1})", id="signature of a settlement"),
        pytest.param(flip("signature", 1), "entry 1 (opens the ledger)", id="signature of the first"),
        pytest.param(flip("signature", 6), f"entry 6 ({ROUND_3})", id="signature of the last"),
        pytest.param(flip("body", 4), "entry 4 (", id="body"),
        pytest.param(
            lambda path, tamper: set_body(path, tamper, 4, cheaper(path, 4)),
            f"Expected ledger entry 4 ({ROUND_2}) to have the digest of its bytes",
            id="steps",
        ),
        pytest.param(
            lambda path, tamper: set_body(path, tamper, 4, cheaper(path, 4), digest=True),
            f"Expected ledger entry 4 ({ROUND_2}) to be signed",
            id="steps and digest",
        ),
        pytest.param(
            lambda path, tamper: set_body(path, tamper, 6, cheaper(path, 6), digest=True),
            f"Expected ledger entry 6 ({ROUND_3}) to be signed",
            id="steps and digest of the last",
        ),
        pytest.param(
            lambda path, tamper: set_body(path, tamper, 4, b"{}", digest=True),
            "Expected ledger entry 4 (unreadable) to be signed",
            id="nothing in it",
        ),
        pytest.param(
            sql("DELETE FROM entries WHERE sequence = 4"),
            f"after entry 3 (settles entry 2: {ROUND_1}), got entry 5: entry 4 is missing",
            id="deleted in the middle",
        ),
        pytest.param(
            sql("DELETE FROM entries WHERE sequence = 1"),
            "Expected entry 1 of the ledger after no entry, got entry 2: entry 1 is missing",
            id="deleted at the start",
        ),
        pytest.param(
            sql("DELETE FROM entries WHERE sequence IN (4, 5)", "UPDATE entries SET sequence = 4 WHERE sequence = 6"),
            f"got entry 4 ({ROUND_3}), which was written as entry 6",
            id="deleted and numbered anew",
        ),
        pytest.param(
            sql("DELETE FROM entries WHERE sequence = 6"),
            f"reach entry 6, which its head file remembers, got one that ends with entry 5 (settles entry 4: {ROUND_2})",
            id="deleted at the end",
        ),
        pytest.param(
            sql("DELETE FROM entries WHERE sequence > 3", "DELETE FROM replies"),
            "restored from a backup, or cut off?",
            id="cut off",
        ),
        pytest.param(sql("DELETE FROM entries", "DELETE FROM replies"), "ends with no entry", id="all deleted"),
        pytest.param(sql(*SWAP), "got entry 4 (unreadable), which was written as entry 5", id="two swapped"),
        pytest.param(
            sql("INSERT INTO entries SELECT 7, body, digest, signature FROM entries WHERE sequence = 6"),
            f"got entry 7 ({ROUND_3}), which was written as entry 6",
            id="the last again",
        ),
        pytest.param(
            sql("INSERT INTO entries SELECT -5, body, digest, signature FROM entries WHERE sequence = 2"),
            f"got entry -5 ({ROUND_1}), which was inserted",
            id="inserted before the first",
        ),
        pytest.param(
            sql("INSERT INTO entries VALUES (7, x'00', x'00', x'00')"),
            "entry 7 (unreadable)",
            id="inserted after the last",
        ),
        pytest.param(
            sql("UPDATE replies SET reply = x'00'"),
            f"stored reply of entry 4 ({ROUND_2}) as it was sent, got other bytes",
            id="reply",
        ),
        pytest.param(
            sql("DELETE FROM replies"), f"reply of entry 4 ({ROUND_2}) as it was sent, got none", id="no reply"
        ),
        pytest.param(
            sql("UPDATE replies SET reservation = 2"), "no stored reply for entry 2 of the ledger", id="reply moved"
        ),
        pytest.param(
            sql("INSERT INTO replies VALUES (99, x'00')"), "no stored reply for entry 99", id="reply inserted"
        ),
        pytest.param(drop_trigger, "(entries_keep)", id="trigger dropped"),
        pytest.param(add_trigger, "(forget)", id="trigger added"),
        pytest.param(wal, "journal mode 'wal'", id="journal mode"),
        pytest.param(no_head, f"beside a ledger that ends with entry 6 ({ROUND_3}), got none", id="no head file"),
        pytest.param(head_bit, "as this ledger's key signed it", id="head file"),
        pytest.param(head_garbage, "as this ledger's key signed it", id="head file of other bytes"),
        pytest.param(head_of_another_key, "as this ledger's key signed it", id="head file of another key"),
    ],
)
def test_change_is_found_and_named(
    written: Path, key: Ed25519PrivateKey, tamper: Tamper, change: Callable[[Path, Tamper], None], says: str
) -> None:
    LedgerView(written, key.public_key()).verify()
    change(written, tamper)
    for said in every_way_to_read(written, key):
        assert says in said


def test_shared_noise_that_became_a_sites_own_is_found(
    ledger: PrivacyLedger, path: Path, key: Ed25519PrivateKey, make_charge: MakeCharge, cap: Cap, tamper: Tamper
) -> None:
    ledger.reserve(make_charge(1, mechanism=SkellamMechanism(6.2244, 0.2, 1, 10528, 50_000)), cap)
    body = body_of(path, 2)
    own = body.replace(b'"l2_bound":10528,', b"").replace(b'"num_parameters":50000,', b"")
    assert len(own) < len(body)
    set_body(path, tamper, 2, own)
    for said in every_way_to_read(path, key):
        assert "entry 2 (study 'lesions', round 1) to have the digest of its bytes" in said


def test_unreadable_settlement_is_not_taken_for_the_entry_before(
    written: Path, key: Ed25519PrivateKey, tamper: Tamper
) -> None:
    tamper(written, "DELETE FROM entries WHERE sequence = 2")
    chain, error = inspect_ledger(written, key.public_key())
    assert len(chain) == 1
    assert "after entry 1 (opens the ledger), got entry 3: entry 2 is missing" in str(error)


def test_what_is_before_the_change_can_still_be_looked_at(
    written: Path, key: Ed25519PrivateKey, tamper: Tamper
) -> None:
    set_body(written, tamper, 4, cheaper(written, 4), digest=True)
    chain, error = inspect_ledger(written, key.public_key())
    assert error is not None
    assert [spending.charge.round for spending in chain.spendings("chest-2024")] == [1]
    view = LedgerView(written, key.public_key())
    for _ in range(2):  # and nothing of it is taken for the ledger
        with pytest.raises(LedgerError):
            view.charges("chest-2024")


def test_reply_that_changed_is_refused_at_every_attempt(written: Path, key: Ed25519PrivateKey, tamper: Tamper) -> None:
    live = PrivacyLedger.open(written, key)
    tamper(written, "UPDATE replies SET reply = x'00'")
    for _ in range(2):
        with pytest.raises(LedgerError, match="got other bytes"):
            live.stored_reply("chest-2024", f"{2:064x}")
        with pytest.raises(LedgerError, match="got other bytes"):
            live.verify()
    view = LedgerView(written, key.public_key())
    for _ in range(2):
        with pytest.raises(LedgerError, match="got other bytes"):
            view.spent("chest-2024", 1e-5)


def resign(
    path: Path, tamper: Tamper, key: Ed25519PrivateKey, change: Callable[[Body], Body] = lambda body: body
) -> None:
    """Writes the whole chain anew with a key, its bodies changed."""
    with transaction(path, write=False) as connection:
        bodies = [read_body(entry.body) for entry in entries_from(connection, None)]
    digest, entries = NO_DIGEST, []
    for body in bodies:
        entries.append(signed_entry(change(body), digest, key))
        digest = entries[-1].digest
    tamper(path, "DELETE FROM entries")
    with transaction(path, write=True) as connection:
        for entry in entries:
            append_entry(connection, entry)


def test_chain_signed_anew_with_another_key_is_found(written: Path, key: Ed25519PrivateKey, tamper: Tamper) -> None:
    resign(written, tamper, OTHER_KEY)
    for said in every_way_to_read(written, key):
        assert "entry 1 (opens the ledger) to be signed with this ledger's key" in said


def test_history_written_anew_with_the_sites_own_key_is_not_the_one_the_head_remembers(
    written: Path, key: Ed25519PrivateKey, tamper: Tamper, make_charge: MakeCharge
) -> None:
    def cheap(body: Body) -> Body:
        return body.model_copy(update={"charge": make_charge(1, steps=1)}) if isinstance(body, Reserved) else body

    live = PrivacyLedger.open(written, key)
    resign(written, tamper, key, cheap)
    for said in every_way_to_read(written, key):
        assert "entry 6 to be the one that its head file remembers" in said
    with pytest.raises(LedgerError, match="another history"):
        live.charges("chest-2024")


@pytest.mark.parametrize(
    "body",
    [
        Opened(sequence=7, time_ms=0, public_key="00" * 32, nonce="00" * 32),
        Settled(sequence=7, time_ms=0, reservation=2, outcome="failed", reply_digest=None, facts={}),
        Settled(sequence=7, time_ms=0, reservation=3, outcome="failed", reply_digest=None, facts={}),
        Settled(sequence=7, time_ms=0, reservation=0, outcome="failed", reply_digest=None, facts={}),
        Settled(sequence=7, time_ms=0, reservation=7, outcome="failed", reply_digest=None, facts={}),
    ],
    ids=["opened again", "settled again", "settles a settlement", "settles nothing", "settles itself"],
)
def test_signed_entry_that_does_not_follow_is_refused(written: Path, key: Ed25519PrivateKey, body: Body) -> None:
    live = PrivacyLedger.open(written, key)
    with transaction(written, write=True) as connection:
        append_entry(connection, signed_entry(body, live._chain.last_digest, key))
    for said in [*every_way_to_read(written, key)]:
        assert "Expected ledger entry 7" in said
        assert "to follow from the entries before it" in said
    with pytest.raises(LedgerError, match="to follow from"):
        live.charges("chest-2024")


def test_chain_begins_with_the_entry_that_names_its_key(
    key: Ed25519PrivateKey, make_charge: MakeCharge, cap: Cap
) -> None:
    for first in (
        Reserved(sequence=1, time_ms=0, charge=make_charge(), cap=cap),
        Opened(sequence=1, time_ms=0, public_key="00" * 32, nonce="00" * 32),
    ):
        with pytest.raises(LedgerError, match="to follow from"):
            Chain(key.public_key()).extend([signed_entry(first, NO_DIGEST, key)])


def test_signed_entry_of_an_unknown_version_is_refused(written: Path, key: Ed25519PrivateKey) -> None:
    live = PrivacyLedger.open(written, key)
    body = canonical_bytes({"kind": "refund", "sequence": 7, "time_ms": 0})
    digest = chained_digest(live._chain.last_digest, body)
    template = signed_entry(live.entries()[0], NO_DIGEST, key)
    domain = b"medfed privacy ledger entry v1\0"
    assert is_signed(template, key.public_key())
    with transaction(written, write=True) as connection:
        append_entry(connection, Entry(7, body, digest, key.sign(domain + digest)))
    for said in every_way_to_read(written, key):
        assert "entry 7 (unreadable) to follow from" in said


def test_entry_that_another_process_forged_stops_a_ledger_in_use(
    written: Path, key: Ed25519PrivateKey, tamper: Tamper, make_charge: MakeCharge, cap: Cap
) -> None:
    live = PrivacyLedger.open(written, key)
    body = Reserved(sequence=7, time_ms=0, charge=make_charge(4, steps=1), cap=cap)
    with transaction(written, write=True) as connection:
        append_entry(connection, signed_entry(body, live._chain.last_digest, OTHER_KEY))
    open_round = Reservation(6, make_charge(3))
    for _ in range(2):
        with pytest.raises(LedgerError, match="entry 7 .* to be signed"):
            live.reserve(make_charge(5, steps=1), cap)
        with pytest.raises(LedgerError, match="entry 7 .* to be signed"):
            live.settle(open_round, "failed", None, {})
    tamper(written, "DELETE FROM entries WHERE sequence = 7", "INSERT INTO entries VALUES (-1, x'00', x'00', x'00')")
    with pytest.raises(LedgerError, match="Expected 6 entries .* got 7"):
        live.reserve(make_charge(5, steps=1), cap)


@pytest.mark.parametrize("both", [False, True], ids=["database", "database and head file"])
def test_backup_restored_under_a_ledger_in_use_is_found(
    written: Path, key: Ed25519PrivateKey, tmp_path: Path, make_charge: MakeCharge, cap: Cap, both: bool
) -> None:
    """A process that has read further remembers, even when the head file was restored too."""
    live = PrivacyLedger.open(written, key)
    backup = tmp_path / "backup"
    shutil.copytree(written.parent, backup)
    live.reserve(make_charge(4, steps=1), cap)
    for name in (written.name, head_path(written).name) if both else (written.name,):
        (backup / name).replace(written.parent / name)
    for call in (lambda: live.reserve(make_charge(5, steps=1), cap), live.verify, live.entries):
        with pytest.raises(LedgerError, match="got another history: the database was exchanged"):
            call()


def test_backup_of_the_database_is_refused(
    written: Path, key: Ed25519PrivateKey, tmp_path: Path, make_charge: MakeCharge, cap: Cap
) -> None:
    shutil.copy2(written, tmp_path / "backup.sqlite")
    PrivacyLedger.open(written, key).reserve(make_charge(4, steps=1), cap)
    (tmp_path / "backup.sqlite").replace(written)
    for said in every_way_to_read(written, key):
        assert f"reach entry 7, which its head file remembers, got one that ends with entry 6 ({ROUND_3})" in said


def test_ledger_of_the_same_key_cannot_stand_in(
    written: Path, key: Ed25519PrivateKey, make_charge: MakeCharge, cap: Cap
) -> None:
    other = written.with_name("south.sqlite")
    ledger = PrivacyLedger.open(other, key)
    for round in range(7):
        ledger.reserve(make_charge(round, steps=1), cap)
    other.replace(written)
    for said in every_way_to_read(written, key):
        assert "entry 6 to be the one that its head file remembers" in said


@pytest.mark.parametrize("empty", [False, True], ids=["removed", "emptied"])
def test_lost_database_is_not_made_anew(written: Path, key: Ed25519PrivateKey, empty: bool) -> None:
    written.unlink()
    if empty:
        written.touch(mode=0o600)
    for _ in range(2):
        with pytest.raises(LedgerError, match="of at least 6 entries, which its head file remembers, got none"):
            PrivacyLedger.open(written, key)
    with pytest.raises(LedgerError, match="empty database" if empty else "unable to open"):
        LedgerView(written, key.public_key()).verify()


def test_head_file_that_is_behind_is_brought_forward(
    written: Path, key: Ed25519PrivateKey, make_charge: MakeCharge, cap: Cap
) -> None:
    """That is what a crash between commit and head leaves."""
    old = head_path(written).read_bytes()
    ledger = PrivacyLedger.open(written, key)
    ledger.reserve(make_charge(4, steps=1), cap)
    new = head_path(written).read_bytes()
    head_path(written).write_bytes(old)
    LedgerView(written, key.public_key()).verify()
    assert head_path(written).read_bytes() == old
    PrivacyLedger.open(written, key)
    assert head_path(written).read_bytes() == new
    head = read_head(head_path(written), key.public_key())
    assert head == Head(7, ledger._chain.last_digest)


def test_head_file_may_be_missing_only_before_the_first_charge(
    ledger: PrivacyLedger, path: Path, key: Ed25519PrivateKey, make_charge: MakeCharge, cap: Cap
) -> None:
    """Before it, a crash between the making of the database and of the head file leaves just that."""
    head_path(path).unlink()
    LedgerView(path, key.public_key()).verify()
    with pytest.raises(LedgerError, match="removed while the ledger was in use"):
        ledger.reserve(make_charge(1), cap)
    assert PrivacyLedger.open(path, key).charges("chest-2024") == ()
    ledger.reserve(make_charge(1), cap)
    head_path(path).unlink()
    for said in every_way_to_read(path, key):
        assert f"beside a ledger that ends with entry 2 ({ROUND_1}), got none" in said


def test_exchanged_public_key_is_put_right(written: Path, key: Ed25519PrivateKey) -> None:
    public = written.with_suffix(".pub")
    right = public.read_bytes()
    for wrong in (b"other", None):
        public.write_bytes(wrong) if wrong else public.unlink()
        PrivacyLedger.open(written, key)
        assert public.read_bytes() == right


def test_ledger_never_changes_what_it_has_written(written: Path) -> None:
    for statement in (
        "UPDATE entries SET body = x'00' WHERE sequence = 2",
        "DELETE FROM entries WHERE sequence = 6",
        "DELETE FROM entries",
    ):
        with pytest.raises(LedgerError, match="append-only"), transaction(written, write=True) as connection:
            connection.execute(statement)


def test_any_flipped_byte_is_found_or_changes_nothing(written: Path, key: Ed25519PrivateKey) -> None:
    """SQLite leaves room unused, where a byte says nothing; everywhere else it is found."""
    whole = written.read_bytes()
    truth = LedgerView(written, key.public_key()).entries()
    found = 0
    for position in range(0, len(whole), 61):
        for bit in (1, 128):
            changed = bytearray(whole)
            changed[position] ^= bit
            written.write_bytes(changed)
            view = LedgerView(written, key.public_key())
            try:
                assert view.entries() == truth, f"byte {position}"
                assert view.stored_reply("chest-2024", f"{2:064x}") == b"reply 2"
            except LedgerError:
                found += 1
    assert found > 100


def test_format_is_fixed(key: Ed25519PrivateKey, make_charge: MakeCharge, cap: Cap) -> None:
    """Ledgers are kept for years: what version 1 writes stays readable, byte for byte."""
    charge = dataclasses.replace(make_charge(3), request_digest="cd" * 32)
    body = Reserved(sequence=2, time_ms=1_700_000_000_123, charge=charge, cap=cap)
    entry = signed_entry(body, bytes(range(32)), key)
    assert entry.body == (
        b'{"cap":{"delta":1e-05,"epsilon":10.0,"unit":"patient"},"charge":{"adjacency":"add-remove","clip_norm":1.0,'
        b'"cohort":"chest-2024","delta":1e-05,"mechanism":{"noise_multiplier":1.1,"sampling_rate":0.2,"steps":3},'
        b'"request_digest":"' + b"cd" * 32 + b'","round":3,"scope":"federated","study":"lesions","study_digest":"'
        + b"ab" * 32 + b'","unit":"patient"},"kind":"reserve","sequence":2,"time_ms":1700000000123}'
    )  # fmt: skip
    assert entry.digest.hex() == sha256_hex(bytes(range(32)) + entry.body)
    assert entry.signature == key.sign(b"medfed privacy ledger entry v1\0" + entry.digest)
    assert read_body(entry.body) == body
    assert is_signed(entry, key.public_key())
    bare = dataclasses.replace(entry, signature=key.sign(entry.digest))
    assert not is_signed(bare, key.public_key())
    head = Head(2, entry.digest)
    assert head.signed_bytes == b'medfed privacy ledger head v1\0[2,"' + entry.digest.hex().encode() + b'"]'
