"""The clipped sum of one step: every patient as a whole moves it by at most the clip norm.

Patients come in order, image after image, in micro-batches that may end anywhere. A patient's images are
added up first and clipped once, when the patient is complete; clipping each micro-batch would let a patient
who spans three of them move the sum three times as far.

What comes out is not private yet: noise is added by :func:`privacy.noise.add_gaussian`. Sums of integers, for noise
that sites share, are made in :mod:`privacy.integer_clipping`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medfed.errors import PrivacyError

# Legend: B samples (views of images) of one micro-batch, P flat adapter elements.

ROUNDING = 2.0**-53  # largest relative error of one float64 operation (IEEE 754, round to nearest)
# Between these no float64 square or quotient here overflows or loses its precision, whatever float32 brings.
SMALLEST_CLIP_NORM, LARGEST_CLIP_NORM = 1e-30, 1e30


def clip_factor(norm: float, *, clip_norm: float, num_parameters: int) -> float:
    """What to multiply a vector by so that its L2 norm is at most ``clip_norm``: min(1, C' / norm).

    Guarantee: for a float64 vector of ``num_parameters`` whose L2 norm was computed as ``norm`` by adding up
    squares in any order, the product, element by element in float64, has an L2 norm in exact arithmetic of at
    most ``clip_norm``. No "up to rounding": C' = C * (1 - (P + 16) * 2**-53) leaves room for all of it, which is
    P / 2 + 2 roundings in the norm and a few in the quotient and the product (Higham 2002, "Accuracy and
    Stability of Numerical Algorithms", section 3.1). For a million elements C' is 1e-10 below C.

    ==================  ===========================
    case                factor
    ==================  ===========================
    norm = 0            1
    norm <= C'          1: the vector is not changed
    norm NaN, inf       PrivacyError
    ==================  ===========================

    Raises:
        PrivacyError: if the norm is not finite, so that no factor would bound it.
    """
    if not math.isfinite(norm):
        raise PrivacyError("Expected a gradient of finite norm, got NaN or infinity; nothing may be released.")
    bound = clip_norm * (1.0 - (num_parameters + 16) * ROUNDING)
    return 1.0 if norm <= bound else bound / norm


@dataclass(frozen=True, eq=False, repr=False)
class PatientSum:
    """The clipped sum of one step, without noise. Nothing of it may leave the site or be logged as it is.

    Attributes:
        sum_P: sum of the patients' clipped gradients, float64; zeros when there was no patient. From
            :class:`~privacy.integer_clipping.IntegerClippedSum`: int64, see there for the unit.
        num_patients: patients in the step. Secret: amplification by sampling assumes that it is.
        num_clipped: how many of them were scaled down.
        norm: L2 norm of ``sum_P``, in its unit; at most ``num_patients`` times the clip norm.
        num_unusable: patients who added zeros because a gradient of theirs held NaN or infinity. Secret too.
        unusable_in: the tensor where that was seen first; empty if it was not.
    """

    sum_P: Tensor
    num_patients: int
    num_clipped: int
    norm: float
    num_unusable: int = 0
    unusable_in: str = ""


class ClippedSum:
    """Adds up per-sample gradients to patients, clips each patient to ``clip_norm``, adds up the patients.

    Guarantee (adjacency: add or remove one patient): the sum moves by at most ``clip_norm`` in L2 norm, beside
    the rounding of the sum itself, which is below n**2 * 2**-52 * clip_norm for n patients (2e-10 of it for a
    thousand). What a patient adds depends on that patient only.

    The same samples give the same bits, however they were cut into micro-batches: each sample is converted to
    float64, multiplied by its weight and added, one after the other. This holds on one device with one number
    of threads. Memory: three float64 vectors of length P, whatever B is.

    A patient with a gradient that is not finite adds zeros, and nobody else is touched by it: whoever chooses the
    adapter can make one patient's gradient overflow and no other's, and a refusal would tell that the patient is
    there. Any refusal closes the sum for good.

    ===========================  ===============================================
    case                         result
    ===========================  ===============================================
    no patient, or B = 0         sum of zeros; an ordinary step
    gradient of zeros            adds zeros; counted, not clipped
    gradient of 1e30             clipped like any other
    NaN or infinity              the patient adds zeros; counted, in ``num_unusable`` too
    patient comes back later     PrivacyError, nothing added
    ===========================  ===============================================

    Args:
        num_parameters: P, length of the flat gradients, >= 1.
        clip_norm: C, L2 norm, within 1e-30..1e30.
        device: where the gradients are.
        names: name of the tensor that holds an element of the flat gradient, for ``unusable_in``
            (:meth:`medfed.adapter_manifest.AdapterManifest.name_at`).

    Raises:
        PrivacyError: if ``clip_norm`` is out of range, NaN included.
        ValueError: if ``num_parameters`` is less than 1.
    """

    def __init__(
        self,
        num_parameters: int,
        *,
        clip_norm: float,
        device: torch.device | str,
        names: Callable[[int], str] | None = None,
    ) -> None:
        if num_parameters < 1:
            raise ValueError(f"Expected num_parameters >= 1, got {num_parameters}.")
        if not SMALLEST_CLIP_NORM <= clip_norm <= LARGEST_CLIP_NORM:
            raise PrivacyError(
                f"Expected a clip_norm within {SMALLEST_CLIP_NORM}..{LARGEST_CLIP_NORM}, got {clip_norm}; set the "
                "largest L2 norm that one patient may have."
            )
        self._clip_norm = float(clip_norm)
        self._names = names
        self._sum_P = torch.zeros(num_parameters, dtype=torch.float64, device=device)
        self._patient_P = torch.zeros_like(self._sum_P)
        self._product_P = torch.zeros_like(self._sum_P)
        self._patient: int | None = None
        self._complete: set[int] = set()
        self._num_clipped = 0
        self._unusable, self._num_unusable, self._unusable_in = False, 0, ""
        self._open = True

    @torch.no_grad()
    def add(self, gradients_BP: Tensor, patient_B: Sequence[int], weight_B: Sequence[float]) -> None:
        """Takes the next micro-batch, patients in order.

        A patient is clipped when the next one begins, or at :meth:`close`; until then further samples may come.

        Args:
            gradients_BP: float32 gradient of each sample, on the device of the sum. Not kept, not changed.
            patient_B: whose each sample is; any integers. All samples of a patient follow one another.
            weight_B: share of each sample in its patient's mean, in (0, 1]: 1 / (images * views). The bound
                does not depend on it.

        Raises:
            PrivacyError: on a patient who was complete already. Nothing of the micro-batch is added then.
            ValueError: on a wrong shape, dtype, device, length or weight.
        """
        self._require_open()
        # Reopened only at the end: whatever is raised in between, the sum cannot be used any more.
        self._open = False
        patients = [operator.index(patient) for patient in patient_B]
        weights = [float(weight) for weight in weight_B]
        self._check_form(gradients_BP, patients, weights)
        self._check_order(patients)
        usable_B = self._usable(gradients_BP)
        for gradient_P, patient, weight, usable in zip(gradients_BP, patients, weights, usable_B, strict=True):
            if patient != self._patient:
                self._complete_patient()
                self._patient = patient
            if not usable:
                self._unusable = True
                continue
            # A product and a sum, each rounded once: fused, the bits would depend on the kernel.
            self._product_P.copy_(gradient_P).mul_(weight)
            self._patient_P.add_(self._product_P)
        self._open = True

    def close(self) -> PatientSum:
        """Completes the last patient and returns the sum, once.

        Raises:
            PrivacyError: if the sum was closed before, or refused a micro-batch.
        """
        self._require_open()
        self._open = False
        self._complete_patient()
        norm = float(torch.linalg.vector_norm(self._sum_P.double()))
        return PatientSum(
            self._sum_P, len(self._complete), self._num_clipped, norm, self._num_unusable, self._unusable_in
        )

    def _complete_patient(self) -> None:
        """Clips the patient in progress, if there is one, and adds it to the sum."""
        if self._patient is None:
            return
        if self._unusable:
            self._patient_P.zero_()
            self._num_unusable += 1
            self._unusable = False
        norm = float(torch.linalg.vector_norm(self._patient_P))
        factor = clip_factor(norm, clip_norm=self._clip_norm, num_parameters=self._sum_P.numel())
        self._add_clipped(self._patient_P.mul_(factor))
        self._num_clipped += factor < 1.0
        self._complete.add(self._patient)
        self._patient_P.zero_()

    def _add_clipped(self, clipped_P: Tensor) -> None:
        """Adds a complete patient, whose L2 norm is at most the clip norm; ``clipped_P`` is not kept."""
        self._sum_P.add_(clipped_P)

    def _require_open(self) -> None:
        if not self._open:
            raise PrivacyError(
                "Expected an open sum, got one that was closed or that refused a micro-batch; begin the step again "
                "with a new sum."
            )

    def _check_form(self, gradients_BP: Tensor, patients: list[int], weights: list[float]) -> None:
        expected = (len(patients), self._sum_P.numel())
        if gradients_BP.shape != expected or gradients_BP.dtype != torch.float32:
            raise ValueError(
                f"Expected float32 gradients of shape {list(expected)}, got {gradients_BP.dtype} of shape "
                f"{list(gradients_BP.shape)}."
            )
        if gradients_BP.device != self._patient_P.device:
            raise ValueError(
                f"Expected gradients on {self._patient_P.device}, got {gradients_BP.device}; give the sum their device."
            )
        if len(weights) != len(patients):
            raise ValueError(f"Expected one weight per sample, got {len(weights)} for {len(patients)} samples.")
        for weight in weights:
            if not 0.0 < weight <= 1.0:
                raise ValueError(f"Expected weights in (0, 1], got {weight}; a weight is a share of a mean.")

    def _check_order(self, patients: list[int]) -> None:
        complete, current = set(self._complete), self._patient
        for patient in patients:
            if patient == current:
                continue
            if current is not None:
                complete.add(current)
            if patient in complete:
                raise PrivacyError(
                    "Expected all samples of a patient in one run, got a patient who comes back after another one "
                    "and would be counted twice; sort the batch by patient."
                )
            current = patient

    def _usable(self, gradients_BP: Tensor) -> list[bool]:
        """Whether each gradient is finite; notes where the first one that is not has its first such element."""
        if gradients_BP.numel() == 0:
            return []
        # Both extremes carry NaN, so two numbers tell about all of B * P without a copy.
        if all(bool(extreme.isfinite()) for extreme in torch.aminmax(gradients_BP)):
            return [True] * len(gradients_BP)
        finite_BP = torch.isfinite(gradients_BP)
        if not self._unusable_in:
            element = int(torch.nonzero(~finite_BP)[0, 1])
            self._unusable_in = self._names(element) if self._names else f"element {element}"
        usable: list[bool] = finite_BP.all(dim=1).tolist()
        return usable
