"""How parts of older schema versions are read: what each version lacks, and what it follows from.

One idea: a table's declaration is the newest version, and a step from one version to the next only says which columns a
part of the older one lacks; the store fills those while reading, in Arrow and in its SQL views alike. Parts are never
rewritten for it. tests/fixtures/schema_v* has one partition of each older version.
"""

from schemas.columns import Table


def lengths_of_lists(table: Table) -> dict[str, str]:
    """1 -> 2: rollouts say how long their lists are. New column -> the list column that it counts."""
    return {c.name: c.counts for c in table.columns if c.counts is not None}


STEPS = {1: lengths_of_lists}  # from this version to the next


def lacking(table: Table, version: int) -> dict[str, str]:
    """Columns that a part of this version lacks -> the list column whose lengths they are."""
    return {name: of for before, step in STEPS.items() if version <= before for name, of in step(table).items()}
