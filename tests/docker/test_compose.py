"""The compose file: valid after the schema of the Compose specification, hardened, and of commands that exist.

No engine runs it here. The schema is the one that ``check-jsonschema`` carries.
"""

import json
import re
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
SITES = ("north", "east", "south")
STAY = ("superlink", *SITES)
SCHEMA = json.loads((files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json").read_text())


def faults(compose: dict[str, Any]) -> list[str]:
    return [error.message for error in jsonschema.Draft202012Validator(SCHEMA).iter_errors(compose)]


def test_file_follows_the_schema_of_the_compose_specification() -> None:
    assert faults(COMPOSE) == []


@pytest.mark.parametrize(
    ("key", "value"), [("read_only", ["yes"]), ("cap_drop", "ALL"), ("restarts", "always"), ("healthcheck", [])]
)
def test_schema_finds_a_wrong_key(key: str, value: object) -> None:
    assert faults({**COMPOSE, "services": {"north": {**SERVICES["north"], key: value}}}) != []


@pytest.mark.parametrize("name", SERVICES)
def test_service_may_do_no_more_than_it_must(name: str) -> None:
    service = SERVICES[name]
    assert (service["read_only"], service["cap_drop"], service["tmpfs"]) == (True, ["ALL"], ["/tmp"])
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["user"].startswith("${MEDFED_USER:?")
    assert not {"privileged", "cap_add", "ports", "network_mode", "pid", "devices"} & set(service)
    assert service["environment"]["HOME"] == "/tmp"
    assert service["networks"] == ["consortium"]
    assert COMPOSE["networks"]["consortium"]["internal"] is True


@pytest.mark.parametrize("name", STAY)
def test_service_that_stays_is_restarted_and_checked(name: str) -> None:
    service = SERVICES[name]
    assert (service["restart"], "profiles" in service) == ("unless-stopped", False)
    assert service["healthcheck"]["test"][:2] == ["CMD", "medfed"]


def test_sites_differ_by_their_folders_alone_and_cannot_write_images() -> None:
    for site in SITES:
        mine, norths = json.dumps(SERVICES[site]), json.dumps(SERVICES["north"])
        assert mine.replace(f"/{site}", "/north") == norths
        assert {v["target"]: v.get("read_only", False) for v in SERVICES[site]["volumes"]} == {
            "/site": False,
            "/post": True,
            "/data": True,
        }


def test_sites_reach_the_service_by_the_name_in_its_certificate() -> None:
    config = tomllib.loads((ROOT / "docker/consortium.toml").read_text())
    assert config["server"]["host"] in SERVICES
    assert [site["name"] for site in config["sites"]] == list(SITES)


@pytest.mark.parametrize(("image", "where"), [("server", "superlink"), ("site", "north")])
def test_image_has_the_same_check_as_its_service(image: str, where: str) -> None:
    text = (ROOT / f"docker/{image}.Dockerfile").read_text()
    (check,) = re.findall(r"^HEALTHCHECK .* CMD (\[.*\])$", text, re.MULTILINE)
    assert json.loads(check)[:-1] == SERVICES[where]["healthcheck"]["test"][1:-1]
    assert SERVICES[where]["build"]["dockerfile"] == f"docker/{image}.Dockerfile"
