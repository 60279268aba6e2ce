"""``medfed provision``: made once, kept for ever, and nobody is enrolled who is not invited."""

import json
import ssl
import stat
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from client.enrolment import init_site
from medfed.canonical import canonical_bytes
from medfed.cli import main
from medfed.errors import ConsortiumError, DocumentError, SiteError
from medfed.signing import fingerprint
from server import certificates, provisioning
from server.consortium_folder import open_consortium
from server.provisioning import provision
from server.service import newer_roster


def files_of(root: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(root)): (path.read_bytes(), stat.S_IMODE(path.stat().st_mode))
        for path in root.rglob("*")
        if path.is_file()
    }


def test_a_second_run_changes_no_byte_and_a_new_site_nothing_of_the_others(make_consortium: Callable) -> None:
    made = make_consortium("north", "south")
    root, before = made.coordinator.root, files_of(made.coordinator.root)
    assert not any(site.is_new for site in provision(made.file, root).sites)
    assert files_of(root) == before
    made.file.write_text(made.file.read_text() + '[[sites]]\nname = "west"\n')
    after = provision(made.file, root)
    assert [(site.site, site.is_new, site.fingerprint is None) for site in after.sites] == [
        ("north", False, False),
        ("south", False, False),
        ("west", True, True),
    ]
    changed = {name for name, content in files_of(root).items() if before.get(name) != content}
    assert changed == {"consortium.toml", "kits/west/startup/kit.json", "kits/west/local/README.txt"}


def test_secrets_are_for_the_owner_alone_and_no_kit_holds_one(make_consortium: Callable) -> None:
    root = make_consortium("north").coordinator.root
    files = files_of(root)
    secret = {"coordinator.key", "ca/ca.key", "server/server.key", "server/superexec.secret", ".lock"}
    assert {name for name, (_, mode) in files.items() if mode == 0o600} == secret
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    kits = b"".join(content for name, (content, _) in files.items() if name.startswith("kits/"))
    assert b"PRIVATE" not in kits
    assert files["server/superexec.secret"][0] not in kits


def test_tls_believes_the_server_with_the_kit_and_nothing_else(make_consortium: Callable, tmp_path: Path) -> None:
    folder = make_consortium("north").coordinator
    stranger = make_consortium("west", name="others").coordinator

    def shake(ca_certificate: str, host: str) -> None:
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        client.verify_flags |= ssl.VERIFY_X509_STRICT
        client.load_verify_locations(cadata=ca_certificate)
        server.load_cert_chain(folder.server_certificate, folder.server_key)
        to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
        sides = [
            client.wrap_bio(to_client, to_server, server_hostname=host),
            server.wrap_bio(to_server, to_client, server_side=True),
        ]
        for _ in range(4):
            for side in sides:
                try:
                    side.do_handshake()
                except ssl.SSLWantReadError:
                    continue

    for host in ("127.0.0.1", "localhost", "::1"):
        shake(folder.startup_kit("north").ca_certificate, host)
    with pytest.raises(ssl.SSLCertVerificationError, match="IP address mismatch|Hostname mismatch"):
        shake(folder.startup_kit("north").ca_certificate, "elsewhere.example")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(stranger.startup_kit("west").ca_certificate, "127.0.0.1")


def test_authority_signs_servers_and_no_further_authorities(make_consortium: Callable) -> None:
    folder = make_consortium("north").coordinator
    authority = x509.load_pem_x509_certificate(folder.ca_certificate.read_bytes())
    server = x509.load_pem_x509_certificate(folder.server_certificate.read_bytes())
    constraints = authority.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (constraints.critical, constraints.value.ca, constraints.value.path_length) == (True, True, 0)
    assert authority.extensions.get_extension_for_class(x509.KeyUsage).critical
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert server.not_valid_after_utc - datetime.now(UTC) < timedelta(days=826)


def test_certificate_of_another_authority_host_or_key_is_refused_until_renewed(make_consortium: Callable) -> None:
    made, other = make_consortium("north"), make_consortium("west", name="others")
    root, path = made.coordinator.root, made.coordinator.server_certificate
    kit = made.coordinator.kit_document("north").read_bytes()
    path.write_bytes(other.coordinator.server_certificate.read_bytes())
    made.coordinator.server_key.write_bytes(other.coordinator.server_key.read_bytes())
    with pytest.raises(ConsortiumError, match="signed by the consortium's authority"):
        provision(made.file, root)
    provision(made.file, root, renew_server_certificate=True)
    made.coordinator.server_key.write_bytes(other.coordinator.server_key.read_bytes())
    with pytest.raises(ConsortiumError, match="belong to the key beside it"):
        provision(made.file, root)
    provision(made.file, root, renew_server_certificate=True)
    assert made.coordinator.kit_document("north").read_bytes() == kit
    made.file.write_text(made.file.read_text().replace("127.0.0.1", "federation.example"))
    with pytest.raises(ConsortiumError, match="for host 'federation.example'"):
        provision(made.file, root)
    assert provision(made.file, root, renew_server_certificate=True).sites[0].is_new


def test_certificate_that_has_ended_is_refused(make_consortium: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_consortium("north")
    monkeypatch.setattr(certificates, "SERVER_VALIDITY", timedelta(minutes=-1))
    with pytest.raises(ConsortiumError, match=r"got one that ended on"):
        provision(made.file, made.coordinator.root, renew_server_certificate=True)


def test_keys_are_what_flower_reads(make_consortium: Callable) -> None:
    made = make_consortium("north")
    private = load_ssh_private_key(made.sites["north"].node_key.read_bytes(), None)
    member = made.coordinator.roster().member("north")
    assert load_ssh_public_key(member.node_key.encode()) == private.public_key()
    assert private.public_key().curve.name == "secp384r1"


def test_enrolment_for_another_consortium_coordinator_or_site_is_refused(make_consortium: Callable) -> None:
    made, other = make_consortium("north", "south"), make_consortium("west", name="others")
    root, request = made.coordinator.root, other.sites["west"].enrolment_file
    with pytest.raises(ConsortiumError, match="expected an enrolment in 'brains'.*got one in 'others'"):
        provision(made.file, root, enrolments=[request])
    namesake = other.file.with_name("same.toml")
    namesake.write_text(made.file.read_text())
    provision(namesake, root.parent / "namesake")
    with pytest.raises(ConsortiumError, match="'brains' with another"):
        provision(namesake, root.parent / "namesake", enrolments=[made.sites["north"].enrolment_file])
    made.file.write_text(made.file.read_text().replace('[[sites]]\nname = "south"\n', ""))
    assert provision(made.file, root).left == ("south",)
    with pytest.raises(ConsortiumError, match="expected a site of north, got 'south'"):
        provision(made.file, root, enrolments=[made.sites["south"].enrolment_file])
    assert made.coordinator.roster().member("south") is None


def test_second_enrolment_with_other_keys_is_refused_until_the_first_is_removed(
    make_consortium: Callable, tmp_path: Path
) -> None:
    made = make_consortium("north")
    root, data = made.coordinator.root, made.sites["north"].settings().data
    provision(made.file, root, enrolments=[made.sites["north"].enrolment_file])
    again = init_site(made.coordinator.kit("north"), tmp_path / "again", data=data)
    with pytest.raises(ConsortiumError, match="Expected the keys with which 'north' has enrolled"):
        provision(made.file, root, enrolments=[again.enrolment_file])
    made.coordinator.enrolment("north").unlink()
    after = provision(made.file, root, enrolments=[again.enrolment_file])
    assert after.sites[0].fingerprint == fingerprint(again.enrolment().signing_key)


def test_two_sites_with_one_key_are_refused(make_consortium: Callable, tmp_path: Path) -> None:
    made = make_consortium("north", "south")
    south, identity = made.sites["south"], made.sites["north"].own_identity()
    copied = south.enrolment().model_copy(update={"signing_key": identity.signing_key.hex()})
    (tmp_path / "copied.json").write_bytes(identity.signed_document(copied))
    made.coordinator.enrolment("south").unlink()
    with pytest.raises(ConsortiumError, match="keys of its own for each site"):
        provision(made.file, made.coordinator.root, enrolments=[tmp_path / "copied.json"])
    assert not made.coordinator.enrolment("south").exists()


@pytest.mark.parametrize("name", ["roster.json", "kits/north/startup/kit.json", "enrolments/north.json"])
def test_flipped_byte_is_refused(make_consortium: Callable, name: str) -> None:
    folder = make_consortium("north").coordinator
    path = folder.root / name
    data = bytearray(path.read_bytes())
    data[data.index(b'"version":') + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(DocumentError):
        {"roster.json": folder.roster, "kits/north/startup/kit.json": lambda: folder.startup_kit("north")}.get(
            name, lambda: folder.enrolled(bytes(data), name)
        )()


def test_serial_of_the_roster_grows_with_every_change_of_its_members_and_with_nothing_else(
    make_consortium: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_consortium("north", "south")
    root, folder = made.coordinator.root, made.coordinator
    serials = [folder.roster().serial]
    assert abs(serials[0] - time.time()) < 600

    def after(*enrolments: Path, now: float) -> int:
        monkeypatch.setattr(provisioning.time, "time", lambda: now)
        provision(made.file, root, enrolments=enrolments)
        return folder.roster().serial

    assert after(now=serials[0] + 100) == serials[0]
    data = made.sites["north"].settings().data
    again = init_site(folder.kit("north"), tmp_path / "again", data=data)
    folder.enrolment("north").unlink()
    serials.append(after(again.enrolment_file, now=serials[-1] - 1000))  # other keys, and a clock that was set back
    assert serials[-1] == serials[-2] + 1
    made.file.write_text(made.file.read_text().replace('[[sites]]\nname = "south"\n', ""))
    serials.append(after(now=serials[-1] + 50.9))  # south has left
    assert serials[-1] == serials[-2] + 50
    folder.roster_file.unlink()
    assert after(now=serials[-1] + 7) == serials[-1] + 7  # lost, the next one is newer all the same


def test_a_roster_without_a_serial_is_replaced_by_the_next_provision(make_consortium: Callable) -> None:
    made = make_consortium("north")
    folder = made.coordinator
    data = json.loads(folder.roster_file.read_bytes())
    del data["body"]["serial"]
    folder.roster_file.write_bytes(canonical_bytes(data) + b"\n")
    with pytest.raises(DocumentError, match="serial"):
        folder.roster()
    provision(made.file, folder.root)
    assert folder.roster().member("north") is not None


def test_a_service_that_runs_registers_no_roster_older_than_it_has_seen(make_consortium: Callable) -> None:
    roster = make_consortium("north").coordinator.roster()
    assert newer_roster(roster, 0) is roster
    assert newer_roster(roster, roster.serial) is roster
    with pytest.raises(ConsortiumError, match="an old file was put back"):
        newer_roster(roster, roster.serial + 1)


def test_roster_of_another_coordinator_is_refused(make_consortium: Callable) -> None:
    folder, other = make_consortium("north").coordinator, make_consortium("west", name="others").coordinator
    folder.roster_file.write_bytes(other.roster_file.read_bytes())
    with pytest.raises(DocumentError, match="not believed here"):
        folder.roster()


def test_key_that_others_can_read_is_refused(make_consortium: Callable) -> None:
    made = make_consortium("north")
    for path in (made.coordinator.coordinator_key_file, made.coordinator.ca_key, made.coordinator.server_key):
        path.chmod(0o640)
        with pytest.raises(SiteError, match="mode 0600.*got mode 0640"):
            provision(made.file, made.coordinator.root)
        path.chmod(0o600)


def test_folder_with_other_files_or_of_another_consortium_is_left_alone(
    make_consortium: Callable, tmp_path: Path
) -> None:
    made = make_consortium("north")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(ConsortiumError, match=r"thesis\.txt"):
        provision(made.file, tmp_path / "full")
    made.file.write_text(made.file.read_text().replace("brains", "hearts"))
    with pytest.raises(ConsortiumError, match="Expected consortium 'brains'"):
        provision(made.file, made.coordinator.root)
    with pytest.raises(ConsortiumError, match="run 'medfed provision' first"):
        open_consortium(tmp_path / "full")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("port = 8443", "port = 0", "server.port"),
        ('host = "127.0.0.1"', 'host = "https://x"', "expected a host name"),
        ('name = "north"', 'name = "pooled"', "reserved"),
        ("port", "prot", "server.prot|server.port"),
        ("[server]", "[server", "valid TOML"),
    ],
)
def test_mistake_in_the_file_is_one_line(tmp_path: Path, old: str, new: str, says: str) -> None:
    text = 'name = "brains"\n[server]\nhost = "127.0.0.1"\nport = 8443\n[[sites]]\nname = "north"\n'
    (tmp_path / "c.toml").write_text(text.replace(old, new, 1))
    with pytest.raises(ConsortiumError, match=says) as refused:
        provision(tmp_path / "c.toml", tmp_path / "out")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_command_prints_the_fingerprints(make_consortium: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    made = make_consortium("north")
    main(["provision", str(made.file), "--out", str(made.coordinator.root), "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["fingerprint"] == fingerprint(made.coordinator.coordinator_public_key)
    assert shown["sites"][0]["fingerprint"] == fingerprint(made.sites["north"].enrolment().signing_key)
    main(["provision", str(made.file), "--out", str(made.coordinator.root)])
    assert shown["fingerprint"] in capsys.readouterr().out
