"""The limit: what a person would write for one workload, without messages, checks or checkpoints.

``python plain.py WORKLOAD SITES ROUNDS PROCESSES FOLDER`` trains every site in turn in one process (PROCESSES =
1), or splits the sites over forked processes that keep their data and exchange adapters over pipes. It starts
from ``initial.safetensors`` in FOLDER and leaves ``plain-PROCESSES.safetensors`` there.

Nothing of the product is used but ``prepare_cpu``: the allocator settings that the client app makes speed up a
plain loop as well, and the comparison is about the engine.
"""

from __future__ import annotations

import multiprocessing
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from clock import RoundClock
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from workload import BATCH_SIZE, LEARNING_RATE, LORA_ALPHA, LORA_RANK, TARGET, Workload, workload

from medfed.device import prepare_cpu

Adapter = dict[str, Tensor]
PREFIX = "base_model.model."
"""What PEFT puts before the names of tensors."""


class LowRankLinear(nn.Module):
    """A frozen linear layer plus ``B A x``."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.scale = LORA_ALPHA / LORA_RANK
        self.lora_A = nn.Linear(base.in_features, LORA_RANK, bias=False)
        self.lora_B = nn.Linear(LORA_RANK, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.lora_B(self.lora_A(x)) * self.scale
        return out


def trainable_module(work: Workload) -> tuple[Any, dict[str, nn.Parameter]]:
    """The module, and its parameters that train; all others are frozen."""
    module = work.module()
    module.requires_grad_(False)
    for block in module.vit.layers if hasattr(module, "vit") else ():
        for name in ("q_proj", "v_proj"):
            setattr(block.attention, name, LowRankLinear(getattr(block.attention, name)))
    for head in module.heads:
        getattr(module, head).requires_grad_(True)
    return module, {name: p for name, p in module.named_parameters() if p.requires_grad}


class Trainer:
    """Local steps on one module."""

    def __init__(self, work: Workload) -> None:
        self.module, self.parameters = trainable_module(work)

    @torch.no_grad()
    def load(self, adapter: Adapter) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(adapter[name])

    def read(self) -> Adapter:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def train(self, start: Adapter, images: Tensor, classes: Tensor) -> Adapter:
        self.load(start)
        self.module.train()
        optimizer = torch.optim.SGD(list(self.parameters.values()), lr=LEARNING_RATE)
        for first in range(0, len(images), BATCH_SIZE):
            batch = slice(first, first + BATCH_SIZE)
            optimizer.zero_grad()
            logits = self.module.classify(self.module.resume(images[batch], 0))[TARGET]
            nn.functional.cross_entropy(logits, classes[batch]).backward()
            optimizer.step()
        return self.read()


def in_one_process(work: Workload, trainer: Trainer, adapter: Adapter, num_rounds: int) -> Adapter:
    data = [work.data(site) for site in range(work.num_sites)]
    clock = RoundClock()
    for _ in range(num_rounds):
        locals_ = [trainer.train(adapter, *site) for site in data]
        adapter = {name: torch.stack([local[name] for local in locals_]).mean(0) for name in adapter}
        clock.mark()
    clock.report()
    return adapter


def in_forked_processes(
    work: Workload, trainer: Trainer, adapter: Adapter, num_rounds: int, num_processes: int
) -> Adapter:
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    for index in range(num_processes):
        ours, theirs = context.Pipe()
        sites = range(index, work.num_sites, num_processes)
        process = context.Process(target=_serve, args=(theirs, work, trainer, sites), daemon=True)
        process.start()
        pipes.append(ours)
        processes.append(process)
    clock = RoundClock(lambda: [process.pid for process in processes if process.pid])
    for _ in range(num_rounds):
        for pipe in pipes:
            pipe.send({name: tensor.numpy() for name, tensor in adapter.items()})
        sums = [pipe.recv() for pipe in pipes]
        adapter = {name: torch.from_numpy(sum(part[name] for part in sums) / work.num_sites) for name in adapter}
        clock.mark()
    clock.report()
    for pipe in pipes:
        pipe.send(None)
    return adapter


def _serve(pipe: Connection, work: Workload, trainer: Trainer, sites: range) -> None:
    torch.set_num_threads(1)
    data = [work.data(site) for site in sites]
    while (message := pipe.recv()) is not None:
        start = {name: torch.from_numpy(array) for name, array in message.items()}
        locals_ = [trainer.train(start, *site) for site in data]
        pipe.send({name: sum(local[name] for local in locals_).numpy() for name in start})  # type: ignore[union-attr]


def main(name: str, sites: str, rounds: str, processes: str, folder: str) -> None:
    prepare_cpu(1)
    work = workload(name, int(sites))
    trainer = Trainer(work)
    stored = load_file(Path(folder) / "initial.safetensors")
    adapter = {key.removeprefix(PREFIX): tensor for key, tensor in stored.items()}
    if processes == "1":
        adapter = in_one_process(work, trainer, adapter, int(rounds))
    else:
        adapter = in_forked_processes(work, trainer, adapter, int(rounds), int(processes))
    final = {PREFIX + key: tensor.contiguous() for key, tensor in adapter.items()}
    save_file(final, Path(folder) / f"plain-{processes}.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
