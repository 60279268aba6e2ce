"""Mutation testing of ``privacy/``: changes one operator, number, argument or name and looks whether a test fails.

Run by ``make mutate``; docs/mutation-testing.md tells what is changed and lists the survivors. This is mutmut's
own command line with three things added, without which it would leave out what matters most here:

* decorated functions (``@torch.no_grad``, ``@lru_cache``, ``@property``, ``@contextmanager``) are mutated as well;
* a mutant meets the tests of its own module, all of them and no others: a cache or a fixture of wider scope hides
  from mutmut which tests depend on a function, and tests of other modules are slow and kill by accident;
* tests are named without their parameters, whose names a second pytest in one process may not find again.

It patches private names of the mutmut that ``constraints.txt`` pins.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import libcst as cst
from mutmut import __main__ as mutmut
from mutmut.mutation import file_mutation
from mutmut.mutation.file_mutation import MutationVisitor
from mutmut.runners.harness import PytestRunner
from mutmut.state import state
from mutmut.utils.format_utils import mangled_name_from_mutant_name

MECHANISM = (  # each has a test file of its own
    "sampling", "noise", "clipping", "randomness", "plan", "accounting",
    "renyi", "skellam", "skellam_accounting", "integer_clipping",
)  # fmt: skip


def mutate_decorated_functions() -> None:
    """The decorators stay on the function that chooses between original and mutants, which are bare."""
    skips, arrange = MutationVisitor._skip_node_and_children, file_mutation.function_trampoline_arrangement

    def skips_node(self: MutationVisitor, node: cst.CSTNode) -> bool:
        return skips(self, node.with_changes(decorators=[]) if _is_wrapped(node) else node)

    def arrangement(function: cst.FunctionDef, mutants: Iterable[Any], class_name: str | None) -> Sequence[Any]:
        declared, methods, assigned, names = arrange(function, mutants, class_name)
        if _is_wrapped(function):
            methods = [methods[0], *(method.with_changes(decorators=[]) for method in methods[1:])]
        return declared, methods, assigned, names

    MutationVisitor._skip_node_and_children = skips_node
    file_mutation.function_trampoline_arrangement = arrangement


def _is_wrapped(node: cst.CSTNode) -> bool:
    """Whether a function has decorators other than the two that mutmut can place itself."""
    return isinstance(node, cst.FunctionDef) and any(
        not (isinstance(decorator.decorator, cst.Name) and decorator.decorator.value in ("classmethod", "staticmethod"))
        for decorator in node.decorators
    )


def meet_the_tests_of_the_module() -> None:
    """Replaces the tests that were seen to reach a function by those in the module's own files."""
    collect: Callable[..., None] = mutmut.collect_or_load_stats

    arguments = PytestRunner._pytest_args_regular_run

    def without_parameters(self: PytestRunner, tests: Iterable[str]) -> list[str]:
        return arguments(self, sorted({test.partition("[")[0] for test in tests}))

    def collect_and_replace(*args: Any, **options: Any) -> None:
        collect(*args, **options)
        mutants, _ = mutmut.collect_source_file_mutation_data(mutant_names=[])
        reaching, known = state().tests_by_mangled_function_name, state().duration_by_test
        for _, mutant, _ in mutants:
            module = mutant.split(".")[1]
            start = f"tests/privacy/test_{module if module in MECHANISM else 'ledger'}"
            reaching[mangled_name_from_mutant_name(mutant)] = {test for test in known if test.startswith(start)}

    mutmut.collect_or_load_stats = collect_and_replace
    PytestRunner._pytest_args_regular_run = without_parameters


if __name__ == "__main__":
    mutate_decorated_functions()
    meet_the_tests_of_the_module()
    sys.exit(mutmut.cli())
