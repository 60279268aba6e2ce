"""What trains of an adapter in a round, as coordinates of a linear subspace.

Each adapter tensor may train as a whole, in a slice (half the columns of B), or through a small core (B = F R with
an orthonormal frame F); the rest stays as it came, bit for bit. All of these are orthonormal linear maps, so

- a mean of coordinates over sites is the coordinates of the mean,
- the norm of a gradient's coordinates is the norm of its part in the subspace: clipping one clips the other,
- noise on coordinates is noise of the same standard deviation in the subspace, and nowhere else.

Legend: P elements of the adapter, Q elements of the tensors of which something trains, Z coordinates, any leading
axes are kept (``...``).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from medfed.adapter_manifest import AdapterManifest, TensorSpec
from medfed.errors import AdapterMismatchError


class Part(ABC):
    """What trains of one tensor."""

    @abstractmethod
    def shape(self, spec: TensorSpec) -> tuple[int, ...]:
        """Shape of its coordinates."""

    @abstractmethod
    def coordinates(self, tensor: Tensor) -> Tensor:
        """Coordinates of a tensor, or of its orthogonal projection; leading axes are kept."""

    @abstractmethod
    def put(self, tensor: Tensor, coordinates: Tensor) -> None:
        """Write coordinates into a tensor in place; what does not train is not touched."""


@dataclass(frozen=True)
class Whole(Part):
    """All of the tensor."""

    def shape(self, spec: TensorSpec) -> tuple[int, ...]:
        """The tensor's own."""
        return spec.shape

    def coordinates(self, tensor: Tensor) -> Tensor:
        """The tensor."""
        return tensor

    def put(self, tensor: Tensor, coordinates: Tensor) -> None:
        """Replaces it."""
        tensor.copy_(coordinates)


@dataclass(frozen=True)
class Slice(Part):
    """Rows or columns ``start`` up to ``stop`` of a matrix.

    Attributes:
        axis: 0 for rows, 1 for columns.
        start: first of them.
        stop: first that is left out.
    """

    axis: int
    start: int
    stop: int

    def shape(self, spec: TensorSpec) -> tuple[int, ...]:
        """The matrix with fewer rows or columns."""
        return tuple(self.stop - self.start if axis == self.axis else size for axis, size in enumerate(spec.shape))

    def coordinates(self, tensor: Tensor) -> Tensor:
        """A view of the rows or columns."""
        return tensor.narrow(self.axis - 2, self.start, self.stop - self.start)

    def put(self, tensor: Tensor, coordinates: Tensor) -> None:
        """Replaces the rows or columns."""
        self.coordinates(tensor).copy_(coordinates)


@dataclass(frozen=True, eq=False)
class Core(Part):
    """R in B = F R: the columns of B within the span of a frame.

    Attributes:
        frame_OR: F, orthonormal columns, float32.
    """

    frame_OR: Tensor
    _moved: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    def shape(self, spec: TensorSpec) -> tuple[int, ...]:
        """R is square for a B of as many columns as the frame has."""
        return (self.frame_OR.shape[1], spec.shape[1])

    def coordinates(self, tensor: Tensor) -> Tensor:
        """F^T B."""
        return self._frame(tensor).T @ tensor

    def put(self, tensor: Tensor, coordinates: Tensor) -> None:
        """B = F R; what B had outside the span of F is gone."""
        tensor.copy_(self._frame(tensor) @ coordinates)

    def _frame(self, like: Tensor) -> Tensor:
        frame_OR = self._moved.setdefault(like.device, self.frame_OR.to(like.device))
        return frame_OR.to(like.dtype)


@dataclass(frozen=True, eq=False)
class Subspace:
    """What trains of an adapter.

    Attributes:
        adapter: manifest of the adapter.
        parts: what trains of which tensor, at least one; the other tensors do not train.

    Raises:
        AdapterMismatchError: if nothing trains, or a tensor is not the adapter's.
    """

    adapter: AdapterManifest
    parts: Mapping[str, Part]

    def __post_init__(self) -> None:
        if not self.parts:
            raise AdapterMismatchError("Expected at least one trainable tensor in the phase, got none.")
        known = {spec.name for spec in self.adapter.tensors}
        if unknown := sorted(self.parts.keys() - known):
            raise AdapterMismatchError(f"Expected tensors of the adapter, got {unknown[0]!r}.")

    @classmethod
    def of(cls, adapter: AdapterManifest, part_of: Callable[[TensorSpec], Part | None]) -> Subspace:
        """What ``part_of`` says trains of each tensor."""
        parts = {spec.name: part_of(spec) for spec in adapter.tensors}
        return cls(adapter, {name: part for name, part in parts.items() if part is not None})

    @classmethod
    def everything(cls, adapter: AdapterManifest) -> Subspace:
        """All of every tensor."""
        return cls.of(adapter, lambda _spec: Whole())

    @cached_property
    def is_everything(self) -> bool:
        """Whether coordinates are the adapter itself."""
        whole = all(isinstance(part, Whole) for part in self.parts.values())
        return whole and len(self.parts) == len(self.adapter.tensors)

    @cached_property
    def support(self) -> AdapterManifest:
        """The tensors of which something trains, whole: what gradients are computed of."""
        return self.adapter.subset(self.parts.__contains__)

    @cached_property
    def manifest(self) -> AdapterManifest:
        """The coordinates, under the names of their tensors."""
        specs = tuple(
            TensorSpec(name=spec.name, shape=self.parts[spec.name].shape(spec)) for spec in self.support.tensors
        )
        return AdapterManifest(method=self.adapter.method, rank=self.adapter.rank, tensors=specs)

    def coordinates(self, vector_P: Tensor) -> Tensor:
        """Coordinates (Z,) of an adapter (P,); a view where everything trains."""
        if self.is_everything:
            return vector_P
        pieces = vector_P.split_with_sizes([spec.num_elements for spec in self.adapter.tensors])
        kept = zip(self.adapter.tensors, pieces, strict=True)
        return self._joined({spec.name: piece.view(spec.shape) for spec, piece in kept if spec.name in self.parts}, ())

    def coordinates_of_support(self, rows_BQ: Tensor) -> Tensor:
        """Coordinates (..., Z) of gradients (..., Q) of the support's tensors."""
        if self.is_everything:
            return rows_BQ
        leading = rows_BQ.shape[:-1]
        pieces = rows_BQ.split_with_sizes([spec.num_elements for spec in self.support.tensors], dim=-1)
        named = zip(self.support.tensors, pieces, strict=True)
        return self._joined({spec.name: piece.reshape(*leading, *spec.shape) for spec, piece in named}, leading)

    def place(self, origin_P: Tensor, coordinates_Z: Tensor) -> Tensor:
        """The adapter (P,) with these coordinates, and equal to ``origin_P`` in all that does not train."""
        placed_P = origin_P.clone()
        self.put(placed_P, coordinates_Z)
        return placed_P

    def put(self, vector_P: Tensor, coordinates_Z: Tensor) -> None:
        """Write coordinates into an adapter in place."""
        if self.is_everything:
            vector_P.copy_(coordinates_Z)
            return
        pieces = coordinates_Z.split_with_sizes([spec.num_elements for spec in self.manifest.tensors])
        values = {spec.name: piece.view(spec.shape) for spec, piece in zip(self.manifest.tensors, pieces, strict=True)}
        targets = vector_P.split_with_sizes([spec.num_elements for spec in self.adapter.tensors])
        for spec, target in zip(self.adapter.tensors, targets, strict=True):
            if spec.name in self.parts:
                self.parts[spec.name].put(target.view(spec.shape), values[spec.name])

    def _joined(self, tensors: Mapping[str, Tensor], leading: tuple[int, ...]) -> Tensor:
        pieces = [self.parts[name].coordinates(tensor) for name, tensor in tensors.items()]
        # The size is said, not inferred: there may be no row at all.
        sizes = [math.prod(piece.shape[len(leading) :]) for piece in pieces]
        return torch.cat([piece.reshape(*leading, size) for piece, size in zip(pieces, sizes, strict=True)], dim=-1)
