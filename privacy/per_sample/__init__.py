"""One gradient per sample, exact on every backbone that is not refused.

DP-SGD clips what each patient contributes, so it needs each sample's gradient by itself. The engines here take
a *batch*, any nesting of tensors whose leading axis is the sample, and ``losses(batch) -> (B,)``. All give the
same answer as a loop over batches of one, which is what :mod:`privacy.per_sample.self_check` makes sure of on
the real model before anything is trained or spent.
"""
