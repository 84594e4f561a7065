"""A contract for `lint-imports` that import-linter does not have: a package imports itself, the standard library and what is named."""

from __future__ import annotations

import sys

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, fields, output


class OnlyContract(Contract):
    """`source_modules`, with all below them, import each other, the standard library and `allowed_modules` only."""

    type_name = "only"
    source_modules = fields.SetField(subfield=fields.ModuleField())
    allowed_modules = fields.SetField(subfield=fields.ModuleField(), required=False)

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        sources = {source.name for source in self.source_modules}  # type: ignore[attr-defined]
        inside = sources.union(*(graph.find_descendants(source) for source in sources))
        allowed = inside | sys.stdlib_module_names | {module.name for module in self.allowed_modules or ()}  # type: ignore[attr-defined]
        strangers = [
            (module, imported)
            for module in sorted(inside)
            for imported in sorted(graph.find_modules_directly_imported_by(module) - allowed)
        ]
        return ContractCheck(kept=not strangers, metadata={"strangers": strangers})

    def render_broken_contract(self, check: ContractCheck) -> None:
        for module, imported in check.metadata["strangers"]:
            output.print_error(f"{module} imports {imported}")
