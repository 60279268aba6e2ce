"""CONSORTIUM.toml: what a coordinator writes down of a consortium.

::

    name = "brain-north"

    [server]
    host = "federation.hospital.example"   # as the hospitals reach it
    port = 8443

    [[sites]]
    name = "north"

    [[sites]]
    name = "south"
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from medfed.consortium import MAX_SITES
from medfed.consortium_documents import ServerAddress
from medfed.errors import ConsortiumError
from medfed.study import ALL_SITES, POOLED_SITE
from medfed.study_sections import Name, distinct
from medfed.toml_file import parse_toml


class InvitedSite(BaseModel):
    """A hospital of the consortium.

    Attributes:
        name: as studies call it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name


class ConsortiumConfig(BaseModel):
    """A consortium.

    Attributes:
        name: of the consortium.
        server: where hospitals connect to.
        sites: who is invited.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    server: ServerAddress
    sites: Annotated[tuple[InvitedSite, ...], Field(min_length=1, max_length=MAX_SITES)]

    @field_validator("sites")
    @classmethod
    def _names_are_free(cls, sites: tuple[InvitedSite, ...]) -> tuple[InvitedSite, ...]:
        names = distinct(tuple(site.name for site in sites), "site")
        for reserved in (POOLED_SITE, ALL_SITES):
            if reserved in names:
                raise ValueError(f"site name {reserved!r} is reserved; rename the site")
        return sites

    @property
    def site_names(self) -> tuple[str, ...]:
        """In the order of the file."""
        return tuple(site.name for site in self.sites)


def parse_consortium(text: bytes, origin: str) -> ConsortiumConfig:
    """The consortium that a file describes.

    Raises:
        ConsortiumError: one line that names the file and the key.
    """
    try:
        return ConsortiumConfig.model_validate(parse_toml(text.decode()))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConsortiumError(f"Expected valid TOML in {origin}, got: {error}; correct it.") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ConsortiumError(f"{origin}: {where}: {str(first['msg']).removeprefix('Value error, ')}.") from None


def read_consortium_file(path: Path) -> bytes:
    """The bytes of a consortium file.

    Raises:
        ConsortiumError: if there is none.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConsortiumError(f"Expected a consortium file at {path}, got: {error}; check the path.") from None
