"""The adapter manifest: which tensors may travel, and nothing else may.

A model's adapter is one flat float32 vector on the wire. The manifest says how it is cut: names, shapes,
dtypes, in a fixed order. Both ends build it from the study, compare fingerprints, and refuse whatever does
not fit; so an image, a backbone weight or a forgotten buffer has no way to leave a site.
"""

from __future__ import annotations

import bisect
import hashlib
import math
from collections.abc import Callable, Mapping
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from medfed.canonical import canonical_bytes
from medfed.errors import AdapterMismatchError

if TYPE_CHECKING:  # imported where tensors are at hand: whoever only reads a study does not wait for it
    from torch import Tensor


class TensorSpec(BaseModel):
    """Name, shape and dtype of one tensor that may travel."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    shape: tuple[int, ...]
    dtype: Literal["float32"] = "float32"

    @cached_property
    def num_elements(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)


class AdapterManifest(BaseModel):
    """The tensors of one adapter, sorted by name.

    Part of the study digest: a site that approves a study approves exactly these tensors.

    Attributes:
        method: the PEFT method, for people; the tensors are what counts.
        rank: LoRA rank, or None for methods without one.
        tensors: at least one, sorted by name, no name twice.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    method: str
    rank: int | None = None
    tensors: tuple[TensorSpec, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_are_sorted_and_unique(self) -> AdapterManifest:
        names = [spec.name for spec in self.tensors]
        if names != sorted(set(names)):
            raise ValueError("Expected tensors sorted by name, each name once; sort them.")
        return self

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], *, method: str, rank: int | None) -> AdapterManifest:
        """The manifest that admits exactly ``tensors`` (all float32)."""
        import torch

        for name, tensor in tensors.items():
            if tensor.dtype != torch.float32:
                raise AdapterMismatchError(
                    f"Expected adapter tensor {name!r} to be float32, got {tensor.dtype}; cast it before use."
                )
        specs = tuple(TensorSpec(name=name, shape=tuple(tensors[name].shape)) for name in sorted(tensors))
        return cls(method=method, rank=rank, tensors=specs)

    def __eq__(self, other: object) -> bool:
        """Equal fingerprints: fast, for tables keyed by manifest."""
        return isinstance(other, AdapterManifest) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        """As :meth:`__eq__`."""
        return hash(self.fingerprint)

    @cached_property
    def fingerprint(self) -> bytes:
        """SHA-256 of the canonical form, 32 bytes; travels with every payload."""
        return hashlib.sha256(canonical_bytes(self.model_dump(mode="json"))).digest()

    @cached_property
    def num_elements(self) -> int:
        """Length P of the flat vector."""
        return self._ends[-1]

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(self._sizes))

    @cached_property
    def _sizes(self) -> list[int]:
        return [spec.num_elements for spec in self.tensors]

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {spec.name: spec.shape for spec in self.tensors}

    def name_at(self, index: int) -> str:
        """Name of the tensor that holds element ``index`` of the flat vector."""
        return self.tensors[bisect.bisect_right(self._ends, index)].name

    def subset(self, keep: Callable[[str], bool]) -> AdapterManifest:
        """The manifest of the tensors whose name ``keep`` accepts.

        Raises:
            AdapterMismatchError: if none is left.
        """
        kept = tuple(spec for spec in self.tensors if keep(spec.name))
        if not kept:
            raise AdapterMismatchError("Expected at least one tensor to travel, got none; widen the selection.")
        return AdapterManifest(method=self.method, rank=self.rank, tensors=kept)

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """One contiguous float32 CPU vector of length P, in manifest order.

        Raises:
            AdapterMismatchError: names the first unknown or missing tensor, wrong shape, wrong dtype, or
                non-finite value.
        """
        import torch

        if unknown := sorted(tensors.keys() - self._shapes.keys()):
            raise AdapterMismatchError(
                f"Expected only tensors of the adapter manifest, got {unknown[0]!r}"
                f"{f' and {len(unknown) - 1} more' if len(unknown) > 1 else ''}; only named tensors may travel."
            )
        for name, shape in self._shapes.items():
            if name not in tensors:
                raise AdapterMismatchError(
                    f"Expected tensor {name!r} of the adapter manifest, got nothing; send all {len(self.tensors)}."
                )
            if tensors[name].shape != shape:
                raise AdapterMismatchError(
                    f"Expected {name!r} with shape {list(shape)}, got {list(tensors[name].shape)}."
                )
            if tensors[name].dtype != torch.float32:
                raise AdapterMismatchError(f"Expected {name!r} as float32, got {tensors[name].dtype}.")
        vector_P = torch.cat([tensors[name].detach().reshape(-1).cpu() for name in self._shapes])
        self.check_vector(vector_P)
        return vector_P

    def unflatten(self, vector_P: Tensor) -> dict[str, Tensor]:
        """Views into ``vector_P`` by name: no copy, and no look at the values.

        Raises:
            AdapterMismatchError: on a wrong length or dtype.
        """
        self.check_form(vector_P)
        pieces = vector_P.split_with_sizes(self._sizes)
        return {name: piece.view(shape) for (name, shape), piece in zip(self._shapes.items(), pieces, strict=True)}

    def check_vector(self, vector_P: Tensor) -> None:
        """Refuse a flat vector that is not a finite float32 one of length P.

        Raises:
            AdapterMismatchError: names the tensor that holds the first non-finite value.
        """
        self.check_form(vector_P)
        # A finite sum proves finite elements in one pass; only a suspicious sum pays for the search.
        if not math.isfinite(float(vector_P.sum())):
            import torch

            finite = torch.isfinite(vector_P)
            if not bool(finite.all()):
                name = self.name_at(int(torch.nonzero(~finite)[0]))
                raise AdapterMismatchError(
                    f"Expected finite values in {name!r}, got NaN or infinity; lower the learning rate."
                )

    def check_form(self, vector_P: Tensor) -> None:
        """Refuse a flat vector that is not a float32 one of length P, without a look at its values.

        Raises:
            AdapterMismatchError: on a wrong length or dtype.
        """
        import torch

        if vector_P.dtype != torch.float32 or vector_P.dim() != 1 or vector_P.numel() != self.num_elements:
            raise AdapterMismatchError(
                f"Expected a float32 vector of {self.num_elements} elements, "
                f"got {vector_P.dtype} of shape {list(vector_P.shape)}."
            )
